"""The quickstart, whole, with a model of no use, in a copy of the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.smoke]

SMALL = {
    "tokenizer.vocab_size": 384,
    "model.vocab_size": 384,
    "model.emb_dim": 32,
    "model.num_layers": 2,
    "batch_size": 8,
    "seq_len": 32,
    "num_train_steps": 20,
    "eval_every_steps": 10,
    "checkpoint_every_steps": 10,
    "eval.batch_size": 8,
}


@pytest.fixture
def copy(tmp_path):
    """A checkout whose .venv has jaxlm of its own, and all else of the environment that runs this test."""
    root = tmp_path / "a copy"  # a space in the path must not matter
    for name in ("jaxlm", "configs", "tools"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / ".venv"], check=True)
    (site_packages,) = root.glob(".venv/lib/python*/site-packages")
    (site_packages / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return root


def quickstart(root: Path, *arguments: str, cwd: Path) -> str:
    flags = [f"--config.{name}={value}" for name, value in SMALL.items()]
    done = subprocess.run(
        ["bash", str(root / "tools" / "quickstart.sh"), *arguments, "--", *flags],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        | {"PIP_NO_BUILD_ISOLATION": "0"},  # pip's way to say: with the setuptools that is here
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_quickstart_trains_evaluates_draws_writes_and_reuses_it_all(copy, tmp_path):
    text = tmp_path / "texts"
    text.mkdir()
    for source in sorted((ROOT / "jaxlm").glob("*.py")):
        shutil.copy(source, text)
    out = quickstart(copy, "--text", "texts", "my run", cwd=tmp_path)
    for said in ("this model", "gzip -9", "xz -9", "The ", "Four things to do next"):
        assert said in out
    workdir = tmp_path / "my run"  # paths are the caller's
    assert (workdir / "plots" / "loss.png").is_file()
    metrics = (workdir / "metrics.jsonl").read_text()
    began = os.stat(workdir / "store").st_mtime_ns
    again = quickstart(copy, "--text", "texts", "my run", cwd=tmp_path)
    assert (workdir / "metrics.jsonl").read_text() == metrics
    assert os.stat(workdir / "store").st_mtime_ns == began
    rows = [
        [line for line in o.splitlines() if " -9" in line or "this model" in line]
        for o in (out, again)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 3
