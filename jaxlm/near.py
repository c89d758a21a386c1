"""What somebody meant who wrote a name that does not exist."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from jaxlm.files import is_remote


def meant(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?', or '' where nothing known is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def meant_path(path: Path) -> str:
    """As `meant`, of a file or folder: by what lies beside the first part of it that is not there."""
    if is_remote(path) or path.exists():
        return ""
    while not path.parent.exists():
        path = path.parent
    beside = [found.name for found in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
