"""Links of Markdown files that lead nowhere: a file that is not there, or a heading that it does not have."""

import re
from pathlib import Path

LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)
FENCED = re.compile(r"^(`{3,}).*?^\1", re.M | re.S)
# `tests/docs/links.py`, and not `configs/NAME.py` or `jaxlm/data/record_*.py`.
PATH = re.compile(r"`((?:jaxlm|configs|tools|tests|docs|colab)/[a-z_0-9/.]+)`")


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def dead_links(page: Path) -> list[str]:
    """The links of a page to files that are not there, or have no such heading."""
    text = FENCED.sub("", page.read_text("utf-8"))
    return [link for link in LINK.findall(text) if ":" not in link and not is_alive(link, page)]


def is_alive(link: str, page: Path) -> bool:
    target, _, anchor = link.partition("#")
    path = page.parent / target if target else page
    # Anchors of the reference are made with the site, whose build asks for them.
    if not path.exists() or not anchor or "reference" in path.parts:
        return path.exists()
    headings = HEADING.findall(FENCED.sub("", path.read_text("utf-8")))
    return anchor in map(slug, headings)


def dead_paths(page: Path, root: Path) -> list[str]:
    """Names of files in backticks that the repository does not have."""
    text = FENCED.sub("", page.read_text("utf-8"))
    return [path for path in PATH.findall(text) if not (root / path).exists()]
