"""Notebooks are made from their twins, and are what Colab needs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tools import build_notebooks

ROOT = Path(__file__).resolve().parents[2]
TWINS = sorted((ROOT / "colab").glob("*.py"))


def test_there_is_a_notebook_for_each_runtime():
    assert {twin.stem for twin in TWINS} == set(build_notebooks.RUNTIMES)


@pytest.mark.parametrize("twin", TWINS, ids=lambda p: p.stem)
def test_a_notebook_is_what_its_twin_says(twin):
    text = twin.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert text == build_notebooks.render(twin.stem, twin.read_text(encoding="utf-8"))
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    runtime = build_notebooks.RUNTIMES[twin.stem]
    assert notebook.metadata.accelerator == runtime["accelerator"]
    assert notebook.metadata.colab.gpuType == runtime["gpuType"]
    repository = build_notebooks.REPOSITORY.removeprefix("https://github.com/")
    badge = (
        f"(https://colab.research.google.com/github/{repository}/blob/main/colab/{twin.stem}.ipynb)"
    )
    assert badge in notebook.cells[0].source
    assert runtime["gpuType"] in notebook.cells[0].source
    assert f'REPOSITORY = "{build_notebooks.REPOSITORY}"' in text.replace('\\"', '"')


def test_no_name_of_a_notebook_is_undefined_or_unused():
    ruff = shutil.which("ruff", path=Path(sys.executable).parent)
    assert ruff, "ruff is a development dependency"
    check = [ruff, "check", "--isolated", "--select=F", *sorted((ROOT / "colab").glob("*.ipynb"))]
    found = subprocess.run(check, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_a_notebook_out_of_step_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_notebooks, "COLAB", tmp_path)
    monkeypatch.setattr(build_notebooks, "SHARED", tmp_path / "shared")
    monkeypatch.setitem(build_notebooks.RUNTIMES, "a", build_notebooks.RUNTIMES["pretrain"])
    (tmp_path / "shared").mkdir()
    (tmp_path / "a.py").write_text("# %% [markdown]\n# # A\n\n# %% [include] b\n")
    (tmp_path / "shared" / "b.py").write_text("# %%\nx = 1\n")
    assert build_notebooks.main(["--check"]) == 1
    assert "a.ipynb" in capsys.readouterr().err and not (tmp_path / "a.ipynb").exists()
    assert build_notebooks.main([]) == 0
    assert json.loads((tmp_path / "a.ipynb").read_text())["cells"][1]["source"] == ["x = 1"]
    assert build_notebooks.main(["--check"]) == 0
    (tmp_path / "shared" / "b.py").write_text("# %%\nx = 2\n")
    assert build_notebooks.main(["--check"]) == 1


def test_cells_keep_their_kind_and_their_text():
    source = (
        "# %% [markdown]\n# # Title\n#\n# text\n\n# %% [include] setup\n\n# %%\nx = 1\n\ny = 2\n"
    )
    assert build_notebooks.parse_cells(source) == [
        ("markdown", "# Title\n\ntext"),
        ("include", "setup"),
        ("code", "x = 1\n\ny = 2"),
    ]


@pytest.mark.parametrize(
    "source",
    ["x = 1\n# %%\n", "# %% [markdown]\nx = 1\n", "# %% [include] a\nx = 1\n", "# %% [code]\n"],
)
def test_what_is_no_cell_is_refused(source):
    with pytest.raises(ValueError, match="line"):
        build_notebooks.parse_cells(source)
