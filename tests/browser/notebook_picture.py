"""A picture of what a notebook shows: `python -m tests.browser.notebook_picture --runs=DIR --output=docs/notebook.png`.

Runs the notebook for real, on the runs in DIR, and lays its headings and plots out in columns.
"""

import argparse
from collections.abc import Collection
from pathlib import Path

import nbformat

from tests.browser.chromium import open_browser
from tests.colab.notebooks import ROOT, pictures, run_notebook

STYLE = """
html { overflow: hidden; }
body { margin: 24px; font: 15px/1.4 sans-serif; background: white; column-count: COLUMNS; column-gap: 28px; }
h1 { column-span: all; margin: 0 0 16px; font-size: 26px; } h2 { margin: 0 0 4px; font-size: 19px; }
section { break-inside: avoid; margin-bottom: 14px; } p { margin: 0 0 6px; } img { width: 100%; }
"""


def to_page(
    notebook: nbformat.NotebookNode, columns: int = 2, left_out: Collection[int] = ()
) -> str:
    """HTML with nothing from elsewhere: each section's text and its plots, without code and printed text.

    left_out: numbers of plots, from 0.
    """
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_anchor_links=True)
    title, text, shown = "", [], []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = [cell]
            title = title or cell.source.splitlines()[0].removeprefix("# ")
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                plot = nbformat.v4.new_code_cell(outputs=[output])
                shown.append(nbformat.v4.new_notebook(cells=[*text, plot]))
                text = []
    sections = [
        exporter.from_notebook_node(plot)[0]
        for number, plot in enumerate(shown)
        if number not in left_out
    ]
    style = STYLE.replace("COLUMNS", str(columns))
    body = "".join(f"<section>{section}</section>" for section in sections)
    return f"<!doctype html><meta charset=utf-8><style>{style}</style><h1>{title}</h1>{body}"


def photograph(html: str, output: Path, width: int) -> None:
    """Writes a PNG as high as the page."""
    page = output.with_suffix(".html")
    output.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(html, encoding="utf-8")
    try:
        with open_browser(width, 800) as driver:
            driver.get(page.resolve().as_uri())
            height = driver.execute_script("return document.documentElement.scrollHeight")
            size = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            driver.save_screenshot(str(output))
    finally:
        page.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--notebook", default="read_a_run", help="of colab/")
    parser.add_argument("--runs", type=Path, required=True, help="the folder of its runs")
    parser.add_argument("--set", action="append", default=[], help="NAME=VALUE: a text of its form")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--columns", type=int, default=2)
    parser.add_argument("--leave_out", type=int, nargs="*", default=[], help="numbers of plots")
    parser.add_argument("--width", type=int, default=1280)
    args = parser.parse_args()
    settings = dict(option.split("=", 1) for option in args.set)
    notebook = run_notebook(
        ROOT / "colab" / f"{args.notebook}.ipynb", {"DRIVE": str(args.runs.resolve())} | settings
    )
    print(f"{len(pictures(notebook))} pictures")
    photograph(to_page(notebook, args.columns, args.leave_out), args.output, args.width)


if __name__ == "__main__":
    main()
