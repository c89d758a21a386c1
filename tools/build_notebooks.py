"""Makes each colab/NAME.ipynb from its twin colab/NAME.py: `python tools/build_notebooks.py [--check]`.

The twin is a Python file in the percent format: `# %%` begins a code cell, `# %% [markdown]` a text
cell, whose lines are comments. `# %% [include] NAME` stands for the cells of colab/shared/NAME.py. It is what
people edit, review and lint; the notebook is never edited.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLAB = Path(__file__).resolve().parents[1] / "colab"
SHARED = COLAB / "shared"
MARKER = "# %%"
HEADER = re.compile(r"# %%(?: \[(?P<kind>markdown)\]| \[include\] (?P<include>\w+))?")
COLAB_SITE = "https://colab.research.google.com"
# Where the published code is: what a notebook clones, and what its badge opens.
REPOSITORY = "https://github.com/USER/jaxlm"
# By notebook, the runtime that Colab is asked for; its own words, as its notebooks' metadata have them.
RUNTIMES = {
    "pretrain": {"accelerator": "TPU", "gpuType": "V5E1"},
    "finetune": {"accelerator": "TPU", "gpuType": "V5E1"},
    "hugging_face": {"accelerator": "GPU", "gpuType": "T4"},
    "read_a_run": {"accelerator": "GPU", "gpuType": "T4"},
}


def parse_cells(source: str) -> list[tuple[str, str]]:
    """The (kind, text) of each cell, kind being 'code', 'markdown' or 'include', whose text is a name.

    Raises:
      ValueError: text before the first cell or in an include, an unknown marker, or a line of a text cell that is no comment.
    """
    cells: list[tuple[str, list[str]]] = []
    problems = []
    for number, line in enumerate(source.splitlines(), 1):
        kind = cells[-1][0] if cells else ""
        if line.startswith(MARKER):
            header = HEADER.fullmatch(line)
            if header is None:
                problems.append(
                    f"line {number}: found {line!r}; expected {MARKER}, alone or with "
                    "[markdown] or [include] NAME"
                )
                continue
            name = header["include"]
            cells.append(("include", [name]) if name else (header["kind"] or "code", []))
        elif not cells or (kind == "include" and line.strip()):
            if line.strip():
                problems.append(
                    f"line {number}: found {line!r} outside a cell; expected `{MARKER}` before"
                )
        elif kind == "markdown" and line.strip() and not line.startswith("#"):
            problems.append(f"line {number}: found {line!r} in a text cell; expected a comment")
        elif kind == "markdown":
            cells[-1][1].append(line.removeprefix("#").removeprefix(" "))
        else:
            cells[-1][1].append(line)
    if problems:
        raise ValueError("\n".join(problems))
    return [(kind, "\n".join(lines).strip("\n")) for kind, lines in cells]


def read_cells(source: str) -> list[tuple[str, str]]:
    """The cells of a twin, those of colab/shared in the place of their includes."""
    cells = []
    for kind, text in parse_cells(source):
        if kind == "include":
            cells += read_cells((SHARED / f"{text}.py").read_text(encoding="utf-8"))
        else:
            cells.append((kind, text.replace("$REPOSITORY", REPOSITORY)))
    return cells


def with_badge(title: str, name: str) -> str:
    """The first text cell, its heading followed by the button that opens the notebook in Colab."""
    heading, _, text = title.partition("\n")
    repository = REPOSITORY.removeprefix("https://github.com/")
    address = f"{COLAB_SITE}/github/{repository}/blob/main/colab/{name}.ipynb"
    badge = f"[![Open in Colab]({COLAB_SITE}/assets/colab-badge.svg)]({address})"
    runtime = "{gpuType} {accelerator}".format(**RUNTIMES[name])
    return f"{heading}\n\n{badge} on a {runtime} (*Runtime → Change runtime type*)\n{text}"


def to_notebook(name: str, source: str) -> dict[str, Any]:
    """The notebook (nbformat 4.5) of a percent-format file, without outputs. name: of RUNTIMES."""
    cells = []
    (_, title), *rest = read_cells(source)
    for index, (kind, text) in enumerate([("markdown", with_badge(title, name)), *rest]):
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
        "accelerator": RUNTIMES[name]["accelerator"],
        "colab": {"gpuType": RUNTIMES[name]["gpuType"], "provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def render(name: str, source: str) -> str:
    return json.dumps(to_notebook(name, source), indent=1, ensure_ascii=False) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if one is out of step"
    )
    args = parser.parse_args(argv)
    stale = []
    for twin in sorted(COLAB.glob("*.py")):
        notebook = twin.with_suffix(".ipynb")
        wanted = render(twin.stem, twin.read_text(encoding="utf-8"))
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
