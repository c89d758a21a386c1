"""One HTML page of a run, from the files in its workdir: `write_page("W")` writes W/report.html.

    config.json  recipe.json  metrics.jsonl      sections.py: lists       page.html: one file,
    samples.jsonl  goodput.jsonl  report.json ─▶ of notes, tables, ─▶ pictures and style in it
    environment.json  rewinds.json  plots/ …     pictures, quotes

The page asks for nothing and runs nothing (a policy in its head forbids both). All that a run says is shown as text: escaped,
and with secrets redacted.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from markupsafe import Markup

from jaxlm.files import as_path, write_text
from jaxlm.page.blocks import cleaned, shown
from jaxlm.page.files import Files
from jaxlm.page.sections import make_sections
from jaxlm.page.summary import describe, figures

__all__ = ["write_page"]

HERE = Path(__file__).parent
NAME = "report.html"
UNBROKEN = 16  # characters of a cell that stay in one line


def write_page(workdir: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page of a run, finished, running or broken, and returns its path.

    output: default W/report.html. A file of the run that cannot be read is named on the page, in its place.

    Raises:
      FileNotFoundError: without a config.json there is no run. Damaged: if that is none.
    """
    files = Files(as_path(workdir))
    title, sentence = describe(files)
    text = template().render(
        title=title,
        sentence=sentence,
        figures=figures(files),
        sections=make_sections(files),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
    )
    path = files.workdir / NAME if output is None else as_path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


@functools.cache
def template() -> Any:
    """The page's template: every value that it shows is cleaned, then escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        finalize=cleaned,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["short"] = lambda cell: len(shown(cell)) <= UNBROKEN
    return environment.get_template("page.html")
