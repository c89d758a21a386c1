"""The picture of a notebook has its plots."""

import base64
import io

import nbformat
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tests.browser.notebook_picture import photograph, to_page

pytestmark = pytest.mark.browser


def red_square() -> str:
    figure = Figure(figsize=(2, 2), facecolor="red")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return base64.b64encode(file.getvalue()).decode()


def test_the_picture_of_a_notebook_shows_its_plots_and_no_code(tmp_path):
    make = nbformat.v4
    plot = make.new_output("display_data", {"image/png": red_square()})
    words = make.new_output("stream", text="printed")
    notebook = make.new_notebook(
        cells=[
            make.new_markdown_cell("# Title"),
            make.new_code_cell("code = 1", outputs=[words]),
            make.new_markdown_cell("## Curves"),
            make.new_code_cell("code = 2", outputs=[words, plot]),
        ]
    )
    page = to_page(notebook)
    assert "Curves" in page and "code = " not in page and "printed" not in page
    assert "data:image/png" in page and "data:image/png" not in to_page(notebook, left_out=[0])
    photograph(page, tmp_path / "a.png", 800)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width == 800 and (255, 0, 0) in {
            color for _, color in picture.convert("RGB").getcolors(1 << 20)
        }
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
