"""A wheel in a fresh environment and an empty folder: pretraining, fine-tuning, evaluation and generation by its commands."""

import json
import os
import subprocess
import sys

import jax
import pytest

from tests import tiny
from tests.package.wheels import ROOT, build, copy_of_the_tree

# The smoke test has the packages of this environment; the other asks pip for all of them (a minute, and a network).
pytestmark = pytest.mark.slow

TINY = [f"--config.{name}={value}" for name, value in tiny.OVERRIDES.items()]
TINY += ["--config.data.sources=('text=text',)", "--config.data.split=tail"]
TINY += ["--config.data.num_workers=0", "--config.eval.num_batches=1"]
TUNED = ["--config.batch_size=8", "--config.log.tensorboard=False", "--config.num_epochs=1"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    tree = copy_of_the_tree(tmp_path_factory.mktemp("package") / "tree")
    return build(tree, "wheel", tmp_path_factory.mktemp("wheel"))


def make_environment(folder, *options):
    """An environment of its own with `options` of venv; its commands."""
    subprocess.run([sys.executable, "-m", "venv", *options, folder], check=True)
    return folder / "bin"


def somebodys_project(folder):
    """An empty folder; the environment and it lie in a git repository, which is not jaxlm's."""
    git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message=1"], check=True)
    (folder / "empty").mkdir()
    return folder / "empty"


def run(folder, *command):
    """What a command prints in `folder`, where nothing of the clone or of this environment is to be found."""
    environment = {name: os.environ[name] for name in ("PATH", "JAX_PLATFORMS")}
    if cache := jax.config.jax_compilation_cache_dir:
        environment["JAX_COMPILATION_CACHE_DIR"] = cache
    done = subprocess.run(
        [*map(str, command)],
        cwd=folder,
        env={**environment, "HOME": str(folder), "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def check_a_first_hour(bin, folder):
    """Every console script, from nothing to a tuned model and a Hugging Face folder."""
    text = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "jaxlm").glob("*.py"))]
    (folder / "text").write_text("\n\n".join(text)[:60_000])
    rows = ["text,label", *(f"{a} {b},{a}" for a in ("up", "down") for b in range(20))]
    (folder / "my.csv").write_text("\n".join(rows) + "\n")
    said = run(folder, bin / "jaxlm-pretrain", "--config=configs/gpt.py:tiny", "--workdir=W", *TINY)
    assert "shipped/configs/gpt.py:tiny" in said and str(ROOT) not in said
    environment = json.loads((folder / "W" / "environment.json").read_text(encoding="utf-8"))
    assert environment["git_revision"] is None
    tune = "--config=configs/finetune/classification.py:train=my.csv"
    run(folder, bin / "jaxlm-finetune", tune, "--config.init_from=W", "--workdir=F", *TUNED)
    assert (folder / "F" / "report.json").is_file()
    scored = run(folder, bin / "jaxlm-evaluate", "--checkpoint=W")
    assert "bits_per_byte" in scored
    assert "accuracy" in run(folder, bin / "jaxlm-evaluate", "--checkpoint=F", "--data=my.csv")
    written = run(
        folder, bin / "jaxlm-generate", "--checkpoint=W", "--prompt=def", "--max_new_tokens=4"
    )
    assert "def" in written
    run(folder, bin / "jaxlm-tool", "convert_checkpoint", "to_hf", "--source=W", "--target=HF")
    assert json.loads((folder / "HF" / "config.json").read_text())["model_type"]


@pytest.mark.smoke
def test_a_wheel_works_in_an_empty_folder(wheel, tmp_path):
    bin = make_environment(tmp_path / "venv", "--without-pip")
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        bin / "python",
        "install",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, "--quiet", wheel], check=True)
    # After its own: what this environment has, without the file that puts the clone on the path.
    others = [path for path in map(str, sys.path) if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others) + "\n")
    check_a_first_hour(bin, somebodys_project(tmp_path))


def test_pip_brings_all_that_a_wheel_needs(wheel, tmp_path):
    bin = make_environment(tmp_path / "venv")
    subprocess.run([bin / "python", "-m", "pip", "install", "--quiet", wheel], check=True)
    check_a_first_hour(bin, somebodys_project(tmp_path))
