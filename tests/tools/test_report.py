"""tools/report.py: a page has what a run left, as text, and nothing of anybody else's. How it looks: tests/browser/test_report.py."""

import html.parser
import json

import numpy as np
import pytest

from jaxlm import page
from jaxlm.training.confusion import plot_confusion
from jaxlm.training.goodput import Ledger
from tests import tiny
from tests.tools.test_plot_run import write_run
from tools import report

MARKUP = '<script>window.hacked=1</script><img src=x onerror="window.hacked=1">'
CANARY = "ca&nary<of>a'token\"1"


class Reader(html.parser.HTMLParser):
    """What a browser makes of a page: its elements and its text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.words = [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def addresses(self):
        return [attrs[key] for _, attrs in self.elements for key in ("src", "href") if key in attrs]

    @property
    def sections(self):
        return [attrs["id"] for tag, attrs in self.elements if tag == "section"]


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_json(path, content):
    path.write_text(json.dumps(content))


def write_whole_run(workdir, said="a text"):
    """A folder with every file that a page reads; `said` stands wherever a run may say what it likes."""
    evals = [
        {"step": s, "split": "eval", "params": "raw", "loss": 3 - s / 10, said: 0.5}
        for s in range(1, 10)
    ]
    write_run(workdir, extra=evals)
    config = tiny.tiny_config("configs/gpt.py:tiny", "store", seed=7)
    (workdir / "config.json").write_text(config.to_json())
    recipe = json.loads(config.to_json()) | {"seed": 0, "init_from": said}
    del recipe["model"]  # as of a fine-tuning recipe, whose model the checkpoint says
    write_json(workdir / "recipe.json", {"name": f"configs/gpt.py:tiny{said}", "config": recipe})
    samples = [{"step": s, "prompt": said, "text": f"{said} {s}"} for s in range(10, 200, 10)]
    write_lines(workdir / "samples.jsonl", samples)
    ledger = Ledger(workdir / "goodput.jsonl")
    ledger.did(1, useful=True)
    ledger.did(2, useful=False)
    ledger.close()
    scores = {"dev": {"accuracy": 0.75}, "test": {"accuracy": 0.5}}
    about = {"step": 30, "task": said, "records": {"dev": 8, "test": 9}, "truncated": {}}
    write_json(workdir / "report.json", about | scores)
    predicted = [{"text": said, "prediction": {"label": said}} for _ in range(12)]
    write_lines(workdir / "predictions.jsonl", predicted)
    plot_confusion(np.eye(2, dtype=int), ["a", "b"], workdir / "plots" / "confusion.png")
    write_json(workdir / "origin.json", {"init_from": said, "new": [said] * 30, "dropped": []})
    rewind = {"step": 3, "batch": 9, "bad_steps": [4, 6]}
    write_json(workdir / "rewinds.json", [rewind])
    (workdir / "bad_steps" / "4-3").mkdir(parents=True)
    (workdir / "checkpoints.damaged").mkdir()
    (workdir / "checkpoints.damaged" / "20-1.txt").write_text(f"{said}\n", errors="replace")
    (workdir / "checkpoints" / "30").mkdir(parents=True)
    (workdir / "stacks-0.txt").write_text("stacks")
    problem = {"source": said, "line": 3, "text": said}
    write_lines(workdir / "problems.jsonl", [problem] * 12)
    write_json(
        workdir / "environment.json", {"python": "3.11", "devices": [said] * 9, "parameters": 7}
    )
    return workdir


def test_a_page_has_all_that_a_run_left(tmp_path, capsys):
    workdir = write_whole_run(tmp_path / "run")
    assert report.main([str(workdir)]) == 0
    assert capsys.readouterr().out.strip() == str(workdir / "report.html")
    found = Reader(workdir / "report.html")
    assert found.sections == [title.lower() for title in page.sections.SECTIONS]
    missing = [words for words in EXPECTED if words not in found.text]
    assert not missing, found.text


EXPECTED = (
    "A decoder pretrained by the objective causal.",
    "steps 30 of 12",
    "best held-out loss 2.1 at step 9",
    "step 10 a text 10",
    "step 190 a text 190",
    "held-out, at step 30 2",
    "accuracy 0.75 0.5 records 8 9",
    "The first 10 of 12 predictions",
    "From the recipe configs/gpt.py:tinya text, changed: field recipe this run",
    "seed 0 7",
    "init_from a text none",
    "fields that it left open field value model.vocab_size 264",
    "optimizer.learning_rate",
    "new 30: a text",
    "steps 4-6 were bad: back to step 3, on with batch 9",
    "bad steps 1: loss or gradient was not finite",
    "checkpoint 20-1 set aside a text",
    "a text:3 a text",
    "12 in all, in problems.jsonl",
    "stacks-0.txt",
    "Steps 30.",
    "(9)",
)


def test_a_page_asks_for_nothing_and_runs_nothing(tmp_path):
    found = Reader(page.write_page(write_whole_run(tmp_path / "run")))
    pictures = [attrs for tag, attrs in found.elements if tag == "img"]
    assert len(pictures) == 4 and all(attrs["alt"] for attrs in pictures)
    assert all(address.startswith(("#", "data:")) for address in found.addresses)
    policy = [attrs for _, attrs in found.elements if "http-equiv" in attrs]
    assert policy[0]["content"].startswith("default-src 'none'; img-src data:;")


@pytest.mark.parametrize("name", ["run", "<script>window.hacked=1<"])
def test_what_a_run_says_is_text_and_never_markup(name, tmp_path):
    plain = Reader(page.write_page(write_whole_run(tmp_path / "plain")))
    found = Reader(page.write_page(write_whole_run(tmp_path / name, MARKUP)))
    shape = lambda reader: [
        (tag, sorted(attrs.keys() - {"class"})) for tag, attrs in reader.elements
    ]
    assert shape(found) == shape(plain)
    assert found.text.count("<script>window.hacked=1</script><img src=x") >= 12


def test_a_secret_is_on_no_page_however_it_is_written(tmp_path, monkeypatch):
    workdir = write_whole_run(tmp_path / "run", f"see {CANARY} and hf_{'a' * 20}")
    for name in ("config.json", "recipe.json"):  # where a run refuses it
        assert CANARY not in (workdir / name).read_text()
    monkeypatch.setenv("HF_TOKEN", CANARY)
    path = page.write_page(workdir)
    found = Reader(path)
    for text in (path.read_text(), found.text, html.unescape(path.read_text())):
        assert CANARY not in text and "nary<of>" not in text and "hf_aaaa" not in text
    assert found.text.count("see [$HF_TOKEN] and [secret]") >= 12


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    config = tiny.tiny_config("configs/bert.py:tiny", "store")
    (tmp_path / "config.json").write_text(config.to_json())
    found = Reader(page.write_page(tmp_path, tmp_path / "there" / "page.html"))
    assert "An encoder pretrained by the objective mlm." in found.text
    assert found.sections == ["curves", "config"] and "No step has been logged yet." in found.text
    assert "steps 0 of 12" in found.text


def test_the_page_of_a_run_that_still_writes_leaves_out_what_is_not_whole(tmp_path):
    workdir = write_whole_run(tmp_path / "run")
    for name in ("metrics.jsonl", "samples.jsonl", "goodput.jsonl", "predictions.jsonl"):
        with (workdir / name).open("a") as file:
            file.write('{"step": 9')
    found = Reader(page.write_page(workdir))
    assert [words for words in EXPECTED if words not in found.text] == []


def test_a_damaged_file_is_named_and_the_rest_is_there(tmp_path):
    workdir = write_whole_run(tmp_path / "run")
    whole = Reader(page.write_page(workdir)).sections
    for name in ("metrics.jsonl", "samples.jsonl", "goodput.jsonl", "problems.jsonl"):
        (workdir / name).write_text("{no JSON\n")
    (workdir / "environment.json").write_text("[]")
    found = Reader(page.write_page(workdir))
    assert found.sections == whole
    assert found.text.count("This cannot be read: ") == 6
    assert "environment.json: found JSON of a list, expected an object" in found.text
    assert "steps ?" in found.text and "optimizer.learning_rate" in found.text


def test_what_no_page_can_hold_is_shown_by_a_sign(tmp_path):
    found = Reader(page.write_page(write_whole_run(tmp_path / "run", "\ud800\x00\x1b[31m")))
    assert "?" in found.text and "samples" in found.sections


def test_a_long_text_is_cut_and_a_long_run_thinned(tmp_path):
    workdir = write_whole_run(tmp_path / "run", "x" * 100_000)
    path = page.write_page(workdir)
    assert path.stat().st_size < 2_000_000 and "(100,003 characters)" in Reader(path).text
    assert "step 20" not in Reader(path).text  # 6 of 19 samples


@pytest.mark.parametrize("content", [None, "[]"])
def test_a_folder_that_is_no_run_is_refused(content, tmp_path, capsys):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(SystemExit) as ended:
        report.main([str(tmp_path)])
    said = capsys.readouterr().err
    assert (
        ended.value.code and "found" in said and "config.json" in said and "Traceback" not in said
    )
    assert not (tmp_path / "report.html").exists()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run of the command line, as a user starts it: a recipe, and flags that change it."""
    folder = tmp_path_factory.mktemp("ran")
    store = tiny.make_store(folder / "store")
    changes = tiny.OVERRIDES | {
        "data.sources": (str(store),),
        "num_train_steps": 4,
        "eval_every_steps": 2,
    }
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    tiny.run(tiny.pretrain_command("configs/gpt.py:tiny", folder / "run", *flags))
    return folder / "run"


def test_the_page_of_a_real_run_says_what_its_flags_changed(ran):
    found = Reader(page.write_page(ran))
    assert found.sections == [
        "curves",
        "samples",
        "evaluation",
        "config",
        "time",
        "checkpoints",
        "environment",
    ]
    config = found.text.partition("From the recipe configs/gpt.py:tiny, changed: ")[2]
    changed = config.partition(" All ")[0]
    recipe, mine = (json.loads((ran / name).read_text()) for name in ("recipe.json", "config.json"))
    assert recipe["config"]["model"]["emb_dim"] == 256 and "model.emb_dim 256 16" in changed
    assert (
        f"data.sources {recipe['config']['data']['sources'][0]} {mine['data']['sources'][0]}"
        in changed
    )
    assert "optimizer.learning_rate" not in changed, "no flag has changed it"
    assert "steps 4 of 4" in found.text and "cpu:0" in found.text
    assert not any("This cannot be read" in words for words in found.words)
