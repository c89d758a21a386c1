"""Every link between Markdown files leads somewhere, and every file that they name is there."""

import pytest

from tests.docs.links import dead_links, dead_paths
from tests.tiny import ROOT

PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
# They say what was.
HISTORY = {ROOT / "CHANGELOG.md", ROOT / "docs" / "decisions.md", ROOT / "docs" / "speed_log.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    assert dead_links(page) == []
    assert page in HISTORY or dead_paths(page, ROOT) == []


def test_dead_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading\n[a](#a-heading) [b](#b) [c](no.md) [d](page.md#a-heading)\n`tests/no.py`"
    )
    assert dead_links(page) == ["#b", "no.md"]
    assert dead_paths(page, ROOT) == ["tests/no.py"]
