"""docs/overview.svg is what its script draws, and can be read."""

from xml.etree import ElementTree

from jaxlm.objectives import OBJECTIVES
from tests.readme.markdown import ROOT
from tools import draw_overview


def test_the_picture_is_the_one_that_the_script_draws():
    drawn = draw_overview.draw()
    assert (ROOT / "docs" / "overview.svg").read_text("utf-8") == drawn
    assert f"{len(OBJECTIVES)} objectives" in drawn


def test_every_box_is_within_the_picture_and_no_two_meet():
    root = ElementTree.fromstring(draw_overview.draw())
    width, height = (int(root.attrib[name]) for name in ("width", "height"))
    boxes = list(draw_overview.BOXES.values())
    for number, one in enumerate(boxes):
        assert one.x >= 0 and one.x + one.width <= width
        assert one.y >= 0 and one.y + one.height <= height
        for other in boxes[number + 1 :]:
            beside = one.x + one.width <= other.x or other.x + other.width <= one.x
            above = one.y + one.height <= other.y or other.y + other.height <= one.y
            assert beside or above, (one.title, other.title)
