"""tools/search.py: a corpus is searched, its vectors are kept, and an index of anything else is refused."""

import json

import numpy as np
import pytest

from jaxlm.inference.search import Index
from tests import tiny
from tools import search

TEXTS = ["import json", "def read(path):", "class Reader: pass", "for x in range(3): print(x)"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Two random encoders of one shape."""
    folder = tmp_path_factory.mktemp("encoders")
    store = tiny.make_store(folder / "store")
    for seed in (0, 1):
        config = tiny.tiny_config("configs/bert.py:tiny", store, seed=seed)
        tiny.save_untrained(config, folder / str(seed))
    return folder


def run(encoders, *arguments, seed=0):
    return search.main([f"--checkpoint={encoders / str(seed)}", *map(str, arguments)])


def first_hits(printed):
    """query -> the text of its first hit."""
    lines = printed.splitlines()
    return {
        line: lines[number + 1].split(maxsplit=1)
        for number, line in enumerate(lines)
        if not line.startswith("  ")
    }


@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl", "texts.csv"])
def test_a_text_is_its_own_nearest_whatever_the_file(encoders, tmp_path, capsys, name):
    file = tmp_path / name
    rows = {
        "txt": TEXTS,
        "jsonl": [json.dumps({"text": t}) for t in TEXTS],
        "csv": ["text", *TEXTS],
    }
    file.write_text("\n".join(rows[file.suffix[1:]]) + "\n", encoding="utf-8")
    assert (
        run(encoders, f"--corpus={file}", f"--query={TEXTS[1]}", f"--query={TEXTS[3]}", "--k=2")
        == 0
    )
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 2 * 3
    assert first_hits(printed) == {t: ["1.000", t] for t in (TEXTS[1], TEXTS[3])}


def test_an_index_serves_without_its_corpus_but_no_other_model_and_no_other_texts(
    encoders, tmp_path, capsys
):
    file, index = tmp_path / "texts.txt", tmp_path / "texts.npz"
    file.write_text("\n".join(TEXTS), encoding="utf-8")
    assert run(encoders, f"--corpus={file}", f"--index={index}", "--query=x") == 0
    fresh = capsys.readouterr().out
    assert run(encoders, f"--index={index}", "--query=x") == 0
    assert capsys.readouterr().out == fresh
    assert run(encoders, f"--index={index}", "--query=x", seed=1) == 2
    assert "made by another model" in capsys.readouterr().err
    file.write_text("\n".join(TEXTS[::-1]), encoding="utf-8")
    assert run(encoders, f"--corpus={file}", f"--index={index}", "--query=x") == 2
    assert "index of other texts" in capsys.readouterr().err
    wide = Index(np.ones((1, 3)), ["a"])
    wide.save(index)
    assert run(encoders, f"--index={index}", "--query=x") == 2
    assert "made by another model" in capsys.readouterr().err


def test_what_is_missing_is_said(encoders, tmp_path, capsys):
    assert run(encoders, "--query=x") == 2
    assert "give --corpus=FILE" in capsys.readouterr().err
    (tmp_path / "empty.csv").write_text("text\n\n", encoding="utf-8")
    assert run(encoders, f"--corpus={tmp_path / 'empty.csv'}", "--query=x") == 2
    assert "no rows" in capsys.readouterr().err
