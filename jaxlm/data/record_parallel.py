"""Parallel texts: two files whose lines belong together, as translations come."""

from pathlib import Path

from jaxlm.data.record_base import Found, Record, read_text
from jaxlm.files import as_path


def parallel_files(name: str) -> tuple[Path, Path] | None:
    """'a.en+a.de' -> (a.en, a.de) where both are files, else None: it names something else."""
    parts = [as_path(part).expanduser() for part in name.split("+")]
    if len(parts) != 2 or not all(part.name and part.is_file() for part in parts):
        return None
    return parts[0], parts[1]


def read_parallel(source: Path, target: Path) -> Found:
    """One record a line, with the fields source and target.

    Raises ValueError for files of different lengths: from some line on what stands beside one another would not belong
    together.
    """
    lines = [_lines(read_text(path)) for path in (source, target)]
    if len(lines[0]) != len(lines[1]):
        raise ValueError(
            f"found: {source} has {len(lines[0]):,} lines and {target} has {len(lines[1]):,}"
            "\nexpected: as many in both, line n of one being the translation of line n of the other"
            "\nchange: the files; a line that is missing is an empty line"
        )
    name = f"{source}+{target}"
    pairs = enumerate(zip(*lines, strict=True), 1)
    return [Record(name, number, {"source": s, "target": t}) for number, (s, t) in pairs], []


def _lines(text: str) -> list[str]:
    """Cut at line feeds only: other characters that end lines for Python are inside of sentences."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]
