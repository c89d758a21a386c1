"""Files and folders that are there whole, or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when it is whole; where another process was first, its folder stays."""
    with tempfile.TemporaryDirectory(".partial", f"{target.name}.", target.parent) as beside:
        folder = Path(beside) / target.name
        folder.mkdir()
        yield folder
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():
                raise


def write_whole(path: str, write: Callable[[Any], None]) -> None:
    """`write` to a file beside `path`, which takes its place when it is whole."""
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as file:
            write(file)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
