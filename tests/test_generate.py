"""The command line: what it prints and writes for each task, and that it refuses in one line."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from jaxlm import api, generate
from jaxlm.inference.search import Index
from tests import tiny
from tests.test_api import save_random


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save_random("configs/gpt.py:tiny", tmp_path_factory.mktemp("gpt"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_random("configs/bert.py:tiny,objective=mlm_nsp", tmp_path_factory.mktemp("bert"))


def run(*arguments):
    values = flags.FlagValues()
    generate.define_flags(values)
    values(["generate", *map(str, arguments)])
    generate.run(values)


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_prompt_is_written_token_by_token(workdir, capsys, monkeypatch):
    flushed = []
    original = api.stream

    def stream(*args, **options):
        for piece in original(*args, **options):
            yield piece
            flushed.append(capsys.readouterr().out)

    monkeypatch.setattr(api, "stream", stream)
    run(f"--checkpoint={workdir}", "--prompt=def ", "--max_new_tokens=6", "--seed=4")
    assert flushed[0].startswith("def ") and sum(map(bool, flushed)) > 2
    [[whole]] = api.generate(api.load(workdir), ["def "], max_new_tokens=6, seed=4)
    assert "".join(flushed) + capsys.readouterr().out == f"def {whole.text}\n"


def test_several_prompts_and_samples_are_written_whole(workdir, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("x\n")
    options = [f"--checkpoint={workdir}", "--prompt=def ", f"--prompts_file={tmp_path}/p.txt"]
    options += ["--max_new_tokens=3"]
    options += ["--num_samples=2", "--stop=q", "--stop=zz", "--batch_size=2"]
    run(*options)
    said = capsys.readouterr().out
    run(*options, f"--output={tmp_path}/o.jsonl")
    rows = lines_of(tmp_path / "o.jsonl")
    assert [row["prompt"] for row in rows] == ["def ", "def ", "x", "x"]
    assert said == "\n\n".join(row["prompt"] + row["text"] for row in rows) + "\n"
    assert capsys.readouterr().out == "" and rows[0]["score"] < 0
    assert {row["finish"] for row in rows} <= {"length", "stop", "eos"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_prompts_come_from_a_file(tmp_path, name, encoding):
    path, texts = tmp_path / name, ["def ", "  import os", "é"]
    if name == "p.txt":
        path.write_text("def \r\n\n  import os\né", encoding=encoding, newline="")
    else:
        rows = [{"prompt": texts[0]}, {"text": texts[1]}, {"prompt": texts[2], "text": "no"}]
        path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding=encoding)
    assert generate.read_prompts(path) == texts


def test_masks_are_ranked_in_a_table(encoder, capsys, tmp_path):
    texts = ["--prompt=import [MASK]", "--prompt=def [MASK](self, [MASK]):"]
    run(f"--checkpoint={encoder}", *texts, "--top_k=3")
    rows = capsys.readouterr().out.splitlines()
    assert [row for row in rows if "MASK" in row] == [t.removeprefix("--prompt=") for t in texts]
    assert [row.strip() for row in rows if row.startswith("  mask")] == ["mask 1", "mask 2"]
    figures = [float(row.split()[-1]) for row in rows if re.match("  (?!mask )", row)]
    assert len(figures) == 9 and figures[:3] == sorted(figures[:3], reverse=True)
    run(f"--checkpoint={encoder}", *texts, "--top_k=3", f"--output={tmp_path}/m.jsonl")
    assert [len(row["masks"]) for row in lines_of(tmp_path / "m.jsonl")] == [1, 2]


def test_vectors_are_written_as_an_index_or_lines(encoder, tmp_path):
    options = [f"--checkpoint={encoder}", "--task=embed", "--prompt=a text", "--prompt=é"]
    run(*options, f"--output={tmp_path}/v.npz")
    run(*options, f"--output={tmp_path}/v.jsonl")
    stored, rows = Index.load(tmp_path / "v.npz"), lines_of(tmp_path / "v.jsonl")
    assert stored.ids == [row["text"] for row in rows] == ["a text", "é"]
    np.testing.assert_allclose([row["vector"] for row in rows], stored.vectors, rtol=1e-6)


def test_a_long_text_takes_no_room_from_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "embed", lambda lm, texts: np.ones((len(texts), 4), np.float32))
    generate.embed(None, [*"ab" * 99, "x" * 9999], str(tmp_path / "v.npz"), {})
    assert (tmp_path / "v.npz").stat().st_size < 20_000


def test_texts_are_scored(workdir, capsys):
    run(f"--checkpoint={workdir}", "--task=score", "--prompt=def f(x):")
    title, row = capsys.readouterr().out.splitlines()
    assert title.split() == ["logprob", "tokens", "bits/byte", "text"]
    logprob, tokens, bits, *text = row.split()
    assert float(logprob) < 0 and tokens == "9" and " ".join(text) == "def f(x):"
    assert float(bits) == pytest.approx(-float(logprob) / np.log(2) / 9, abs=1e-3)


def test_the_model_runs_on_as_many_devices_as_wanted(workdir, monkeypatch):
    meshes, load = [], api.load
    monkeypatch.setattr(api, "load", lambda *a, mesh: meshes.append(mesh) or load(*a, mesh=mesh))
    for tensor in (1, 2):
        with pytest.raises(api.BadInput, match="is a decoder"):
            run(f"--checkpoint={workdir}", "--task=fill_mask", "--prompt=a", f"--tensor={tensor}")
    assert [mesh.shape["tensor"] for mesh in meshes] == [1, 2]


REFUSED = {
    "no texts": ([], "found no texts: give --prompt or --prompts_file"),
    "an empty file": (["--prompts_file={tmp}/empty.txt"], "empty.txt is empty: expected a text a line"),
    "no file": (["--prompts_file={tmp}/none.txt"], "No such file or directory: .*none.txt"),
    "a bad line": (["--prompts_file={tmp}/bad.jsonl"], "bad.jsonl:2: expected an object with a text"),
    "no UTF-8": (["--prompts_file={tmp}/latin.txt"], "latin.txt: no UTF-8 at byte 1"),
    "vectors on the terminal": (["--prompt=a", "--task=embed"], "--output=F.npz or F.jsonl"),
    "a strange output": (["--prompt=a", "--output={tmp}/o.csv"], "ends with .jsonl"),
    "no folder": (["--prompt=a", "--output={tmp}/none/o.jsonl"], "there is no folder"),
    "another task's option": (
        ["--prompt=a", "--task=score", "--top_k=3", "--seed=1"],
        "--top_k, --seed: not for --task=score",
    ),
    "another model's task": (["--prompt=[MASK]", "--task=fill_mask"], "is a decoder"),
    "more devices than there are": (["--prompt=a", "--tensor=99"], "does not cover"),
    "a long prompt": (["--prompt=" + "x" * 40, "--prompt=a", "--output={tmp}/o.jsonl"], "41 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(case, workdir, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    (tmp_path / "latin.txt").write_bytes(b"a\xe9")
    before = sorted(tmp_path.iterdir())
    arguments, says = REFUSED[case]
    with pytest.raises((ValueError, FileNotFoundError), match=says) as error:
        run(f"--checkpoint={workdir}", *(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before and capsys.readouterr().out == ""


def test_a_failed_writing_leaves_what_was_there(tmp_path):
    path = tmp_path / "o.jsonl"
    path.write_text("before")

    def fail(file):
        file.write(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        generate.write_whole(str(path), fail)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_an_error_is_one_line_and_no_traceback():
    command = [sys.executable, "-m", "jaxlm.generate", "--checkpoint=nowhere", "--prompt=a"]
    done = subprocess.run(
        command, cwd=tiny.ROOT, env=tiny.environment(), capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "no checkpoint in nowhere: there is no such folder; expected a run's workdir, or hf:FOLDER_OR_HUB_ID\n"
    )
