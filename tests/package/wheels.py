"""The package as pip builds it, without pip and without network: setuptools' own backend, in a copy of the tree."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "requirements.txt", "README.md", "LICENSE")
FOLDERS = ("jaxlm", "configs", "tools")


def copy_of_the_tree(folder: Path) -> Path:
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


def build(tree: Path, what: str, into: Path) -> Path:
    """what: wheel or sdist. The file that was made."""
    code = (
        "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"build_{what}", str(into)],
        cwd=tree,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = into.iterdir()
    return made
