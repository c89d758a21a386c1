"""The notebooks: in step with their twins, and run from top to bottom in a real kernel on the CPU."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests import tiny
from tests.tools.test_convert_checkpoint import make_source
from tools import build_notebooks

ROOT = Path(__file__).resolve().parents[2]
TWINS = sorted((ROOT / "colab").glob("*.py"))


def test_there_is_a_notebook():
    assert [twin.name for twin in TWINS] == ["finetune.py", "pretrain.py"]


@pytest.mark.parametrize("twin", TWINS, ids=lambda p: p.stem)
def test_a_notebook_is_what_its_twin_says(twin):
    notebook = twin.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert notebook == build_notebooks.render(twin.read_text(encoding="utf-8"))
    nbformat.validate(nbformat.reads(notebook, as_version=4))


def test_a_notebook_out_of_step_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_notebooks, "COLAB", tmp_path)
    (tmp_path / "a.py").write_text("# %%\nx = 1\n")
    assert build_notebooks.main(["--check"]) == 1
    assert "a.ipynb" in capsys.readouterr().err and not (tmp_path / "a.ipynb").exists()
    assert build_notebooks.main([]) == 0
    assert build_notebooks.main(["--check"]) == 0
    (tmp_path / "a.py").write_text("# %%\nx = 2\n")
    assert build_notebooks.main(["--check"]) == 1


def test_cells_keep_their_kind_and_their_text():
    source = "# %% [markdown]\n# # Title\n#\n# text\n\n# %%\nx = 1\n\ny = 2\n"
    assert build_notebooks.parse_cells(source) == [
        ("markdown", "# Title\n\ntext"),
        ("code", "x = 1\n\ny = 2"),
    ]


@pytest.mark.parametrize("source", ["x = 1\n# %%\n", "# %% [markdown]\nx = 1\n"])
def test_code_outside_a_code_cell_is_refused(source):
    with pytest.raises(ValueError, match="line"):
        build_notebooks.parse_cells(source)


def run_notebook(path: Path, settings: dict) -> nbformat.NotebookNode:
    """Executes it with other values in its form fields; raises what a cell raises."""
    notebook = nbformat.read(path, as_version=4)
    form = next(cell for cell in notebook.cells if "# @title" in cell.source)
    lines = form.source.splitlines()
    for name, value in settings.items():
        (index,) = (i for i, line in enumerate(lines) if line.startswith(f"{name} = "))
        field = lines[index].partition("  # @param")
        lines[index] = f"{name} = {value!r}{field[1]}{field[2]}"
    form.source = "\n".join(lines)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    client.execute()
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stdout"
    )


@pytest.mark.parametrize(
    "config",
    [
        pytest.param("configs/gpt.py:tiny", marks=[pytest.mark.core, pytest.mark.smoke]),
        pytest.param("configs/bert.py:tiny", marks=pytest.mark.slow),
    ],
)
def test_the_pretraining_notebook_runs_on_the_cpu(config, tmp_path):
    settings = {"CONFIG": config, "WORKDIR": str(tmp_path / "run"), "FAST": True}
    notebook = run_notebook(ROOT / "colab" / "pretrain.ipynb", settings)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in lines) == 20
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2
    assert ("gzip -9" in printed(notebook)) == (config == "configs/gpt.py:tiny")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A jaxlm run and a Hugging Face folder to begin with, of models of no use, and a labelled file."""
    folder = tmp_path_factory.mktemp("sources")
    store = tiny.make_store(folder / "store")
    tiny.save_untrained(
        tiny.tiny_config("configs/bert.py:tiny,objective=mlm_nsp", store), folder / "W"
    )
    make_source(folder / "hf", "bert_base")
    rows = [
        f"{'good' if n % 2 else 'bad'} number {n},{'yes' if n % 2 else 'no'}" for n in range(40)
    ]
    (folder / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return folder


@pytest.mark.parametrize(
    "start",
    [pytest.param("W", marks=pytest.mark.core), pytest.param("hf", marks=pytest.mark.slow)],
)
def test_the_fine_tuning_notebook_runs_on_the_cpu(start, sources, tmp_path):
    settings = {
        "TRAIN": str(sources / "rows.csv"),
        "INIT_FROM": ("hf:" if start == "hf" else "") + str(sources / start),
        "WORKDIR": str(tmp_path / "run"),
        "NUM_EPOCHS": 1.0,
        "SEQ_LEN": 16,
    }
    notebook = run_notebook(ROOT / "colab" / "finetune.ipynb", settings)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["records"] == {"train": 36, "dev": 4}
    assert "restored" in json.loads((tmp_path / "run" / "origin.json").read_text())
    text = printed(notebook)
    assert "accuracy" in text and ("yes" in text or "no" in text)


def test_a_cell_that_fails_fails_the_notebook(tmp_path):
    path = tmp_path / "a.ipynb"
    path.write_text(
        build_notebooks.render("# %%\n# @title Settings\nX = 1\n\n# %%\nassert X == 1\n")
    )
    run_notebook(path, {"X": 1})
    with pytest.raises(nbclient.exceptions.CellExecutionError):
        run_notebook(path, {"X": 2})
