"""What a page is made of: sections of notes, tables, pictures and quoted texts."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from markupsafe import Markup

from jaxlm.private import redact

MAX_CHARS = 4000  # of one text
MAX_ITEMS = 8  # of one list


@dataclass(frozen=True)
class Note:
    """A sentence or two. is_bad: of something that went wrong."""

    text: str
    is_bad: bool = False
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head, or none. folded: the line that opens it, '' if it is open."""

    rows: Sequence[Sequence[Any]]
    head: Sequence[str] = ()
    folded: str = ""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Picture:
    """A PNG, within the page."""

    png: bytes
    alt: str
    kind: ClassVar[str] = "picture"

    @property
    def address(self) -> Markup:
        """The picture itself, as a URL."""
        return Markup("data:image/png;base64," + base64.b64encode(self.png).decode())


@dataclass(frozen=True)
class Quote:
    """Texts with their line ends, each under a title."""

    title: str
    parts: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "quote"


Block = Note | Table | Picture | Quote


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]

    @property
    def id(self) -> str:
        """The section's anchor."""
        return self.title.lower().replace(" ", "-")


def shown(value: Any) -> str:
    """A value of JSON as a reader likes it: 4 digits of a fraction, 2,689,792, the first items of a long list."""
    if value is None or value == "" or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 or value != value else f"{value:,.0f}"
    if isinstance(value, list) and len(value) > MAX_ITEMS:
        return f"{', '.join(map(shown, value[:MAX_ITEMS]))}, … ({len(value):,})"
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, dict):  # not as JSON, whose escapes would hide a secret from `redact`
        return ", ".join(f"{name}: {shown(item)}" for name, item in value.items())
    return str(value)


def cleaned(value: Any) -> Any:
    """What is put into the page for a value: its text without secrets, and without what no file of UTF-8 may hold.

    Not of markup, which is the page's own.
    """
    if isinstance(value, Markup):
        return value
    text = redact(shown(value)).encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]} … ({len(text):,} characters)"


def thinned(items: Iterable[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spread, the first and the last among them."""
    items = list(items)
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
