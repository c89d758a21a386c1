"""tools/look.py on a tiny run: the pictures that it leaves, and what it refuses. The functions: tests/look."""

import json

import numpy as np
import pytest

from jaxlm.api import BadInput
from tests.test_api import save_random
from tests.tools.test_plot_run import ink
from tools import look


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save_random("configs/gpt.py:tiny", tmp_path_factory.mktemp("gpt"))


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"said": f"{kind} {i}", "what": kind} for i in range(12) for kind in ("import", "def")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_every_kind_of_picture_is_drawn_in_one_call(workdir, rows, tmp_path, capsys):
    flags = ["--text=def f(x):", "--tokens=40", f"--labelled={rows}", "--text_column=said"]
    output = tmp_path / "pictures"
    command = [f"--checkpoint={workdir}", f"--output={output}", *flags, "--label_column=what"]
    assert look.main(command) == 0
    names = ["attention-self", "attention-self-0", "attention-self-1", "tokens", "texts", "probe"]
    paths = [output / f"{name}.png" for name in names]
    assert sorted(output.iterdir()) == sorted(paths)
    assert all(ink(path) > 1000 for path in paths)
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.endswith(".png")] == [*map(str, paths)]
    assert "(6 held-out texts)" in said and "the commonest label: 0.500" in said


def test_rows_are_drawn_at_random_and_always_the_same(rows):
    columns = {"text": "said", "label": "what"}
    texts, labels = look.read_labelled(rows, columns, most=10)
    assert len(texts) == 10 and all(
        t.startswith(label) for t, label in zip(texts, labels, strict=True)
    )
    assert (texts, labels) == look.read_labelled(rows, columns, most=10)
    assert 2 < labels.count("def") < 8 and len(np.unique(texts)) == 10


@pytest.mark.parametrize(
    ("last", "error", "says"),
    [
        ({"said": "x", "what": ""}, ValueError, "rows.jsonl:25: there is no label"),
        ({"said": "x", "what": "rare"}, BadInput, "the rarest 1 times"),
    ],
)
def test_labels_that_cannot_be_probed_are_refused_before_a_text_is_read(last, error, says, rows):
    with rows.open("a") as file:
        file.write(json.dumps(last))
    with pytest.raises(error, match=says):
        columns = {"text": "said", "label": "what"}
        next(look.labelled(None, *look.read_labelled(rows, columns, most=99)))


@pytest.mark.parametrize(
    ("flags", "says"),
    {
        ("--text=" + "x" * 99,): "100 tokens, and the context holds 32",
        ("--labelled=nothing.csv",): "found: nothing at nothing.csv",
        ("--tokens=1",): "count=1: expected 2 or more",
    }.items(),
)
def test_what_cannot_be_looked_at_is_said_in_one_message(flags, says, workdir, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        look.main([f"--checkpoint={workdir}", f"--output={tmp_path / 'none'}", *flags])
    assert ended.value.code and says in capsys.readouterr().err


def test_nothing_to_look_at_is_refused_before_a_model_is_loaded(capsys):
    with pytest.raises(SystemExit) as ended:
        look.main(["--checkpoint=none", "--output=none"])
    assert ended.value.code == 2 and "nothing to look at" in capsys.readouterr().err
