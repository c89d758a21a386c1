"""Makes each colab/NAME.ipynb from its twin colab/NAME.py: `python tools/build_notebooks.py [--check]`.

The twin is a Python file in the percent format: `# %%` begins a code cell, `# %% [markdown]` a text
cell, whose lines are comments. It is what people edit, review and lint; the notebook is never edited.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLAB = Path(__file__).resolve().parents[1] / "colab"
MARKER = "# %%"


def parse_cells(source: str) -> list[tuple[str, str]]:
    """The (kind, text) of each cell, kind being 'code' or 'markdown'.

    Raises:
      ValueError: text before the first cell, or a line of a text cell that is no comment.
    """
    cells: list[tuple[str, list[str]]] = []
    problems = []
    for number, line in enumerate(source.splitlines(), 1):
        if line.startswith(MARKER):
            kind = "markdown" if line.strip() == f"{MARKER} [markdown]" else "code"
            cells.append((kind, []))
        elif not cells:
            if line.strip():
                problems.append(f"line {number}: found {line!r} before the first `{MARKER}`")
        elif cells[-1][0] == "markdown" and line.strip() and not line.startswith("#"):
            problems.append(f"line {number}: found {line!r} in a text cell; expected a comment")
        elif cells[-1][0] == "markdown":
            cells[-1][1].append(line.removeprefix("#").removeprefix(" "))
        else:
            cells[-1][1].append(line)
    if problems:
        raise ValueError("\n".join(problems))
    return [(kind, "\n".join(lines).strip("\n")) for kind, lines in cells]


def to_notebook(source: str) -> dict[str, Any]:
    """The notebook (nbformat 4.5) of a percent-format file, without outputs."""
    cells = []
    for index, (kind, text) in enumerate(parse_cells(source)):
        cell: dict[str, Any] = {
            "cell_type": kind,
            "id": f"cell-{index:02d}",
            "metadata": {"cellView": "form"} if "# @title" in text else {},
            "source": text.splitlines(keepends=True),
        }
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        cells.append(cell)
    metadata = {
        "accelerator": "TPU",
        "colab": {"provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def render(source: str) -> str:
    return json.dumps(to_notebook(source), indent=1, ensure_ascii=False) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if one is out of step"
    )
    args = parser.parse_args(argv)
    stale = []
    for twin in sorted(COLAB.glob("*.py")):
        notebook = twin.with_suffix(".ipynb")
        wanted = render(twin.read_text(encoding="utf-8"))
        if notebook.is_file() and notebook.read_text(encoding="utf-8") == wanted:
            continue
        stale.append(notebook.name)
        if not args.check:
            notebook.write_text(wanted, encoding="utf-8")
            print(notebook)
    if args.check and stale:
        print(
            f"found: {', '.join(stale)} out of step with the .py twin\n"
            "change: edit the twin, then run `python tools/build_notebooks.py`",
            file=sys.stderr,
        )
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
