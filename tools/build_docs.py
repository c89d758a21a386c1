"""Builds the documentation site from docs/ and the docstrings of jaxlm, without importing it.

    pip install -e '.[docs]'
    python tools/build_docs.py --output=site && python -m http.server --directory site

A warning is an error: a link or anchor that leads nowhere, a name in a docstring that its signature lacks. README.md is a
page of it, too; links to other files than those of docs/ become links to the repository that mkdocs.yml names.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)\s#]+)")
REPOSITORY = re.compile(r"^  repository: (\S+)", re.M)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="site", help="folder of the site; it is replaced")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("zensical") is None:
        print("zensical is missing: pip install -e '.[docs]'", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        stage(ROOT, Path(folder))
        build = [sys.executable, "-m", "zensical", "build", "--strict"]
        built = subprocess.run(build, cwd=folder, stderr=subprocess.PIPE, text=True)
        # griffe's warnings about docstrings are none of Zensical's.
        warnings = [line for line in built.stderr.splitlines() if line.startswith("griffe: ")]
        if built.returncode or warnings:
            print(built.stderr, file=sys.stderr)
            return 1
        shutil.rmtree(args.output, ignore_errors=True)
        shutil.move(Path(folder, "site"), args.output)
    print(f"{args.output}/index.html")
    return 0


def stage(root: Path, target: Path) -> None:
    """What the site is made of, below `target`: mkdocs.yml, the pages with their links mended, and the code."""
    settings = (root / "mkdocs.yml").read_text("utf-8")
    (target / "mkdocs.yml").write_text(settings, "utf-8")
    shutil.copytree(root / "docs", target / "docs")
    for folder in ("jaxlm", "configs", "tools"):
        (target / folder).symlink_to(root / folder)
    repository = REPOSITORY.search(settings)[1]
    for page in (root / "README.md", *(root / "docs").rglob("*.md")):
        mend = lambda match, page=page: match[1] + mended(match[2], page, root, repository)
        text = LINK.sub(mend, page.read_text("utf-8"))
        (target / "docs" / place_of(page, root)).write_text(text, "utf-8")


def place_of(path: Path, root: Path) -> Path | None:
    """Where in the site a file is; None if it is not there."""
    if path == root / "README.md":
        return Path("readme.md")
    docs = root / "docs"
    return path.relative_to(docs) if path.is_relative_to(docs) and not path.is_dir() else None


def mended(link: str, page: Path, root: Path, repository: str) -> str:
    """A link of a page, within the site or, to what that does not have, to the repository."""
    path = (page.parent / link).resolve()
    if ":" in link or not path.exists():
        return link
    if place := place_of(path, root):
        return os.path.relpath(place, place_of(page, root).parent)
    return f"{repository}/blob/main/{path.relative_to(root)}"


if __name__ == "__main__":
    sys.exit(main())
