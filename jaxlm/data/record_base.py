"""What the readers of labelled files share: records, problems, and text in whatever encoding it came."""

import dataclasses
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.files import write_text

MAX_FILE_BYTES = 1 << 30  # a labelled file is read as a whole
MAX_DEPTH = 16  # of lists and objects inside a record
_BROKEN_BYTE = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte
_PROPER = re.compile("[^\x00-\x7f\udc80-\udcff]")

log = logging.getLogger("jaxlm")


class Record(NamedTuple):
    """A row. line: the first line of it, from 1; for Parquet and JSON its number in the file, from 1."""

    source: str
    line: int
    fields: dict[str, Any]


class Problem(NamedTuple):
    """Why a row cannot be used."""

    source: str
    line: int
    text: str

    def __str__(self):
        return f"{self.source}:{self.line}: {self.text}"


Found = tuple[list[Record], list[Problem]]


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """What a user may say of a file; see `records.read_records`."""

    header: str = "auto"
    delimiter: str = ""
    split: str = ""


def format_problems(problems: Sequence[Problem], shown: int = 10) -> str:
    """The first `shown` problems, one a line, and how many more there are; '' for none."""
    lines = [f"  {problem}" for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"  … and {len(problems) - shown:,} more")
    return "\n".join(lines)


def write_problems(problems: Sequence[Problem], path: Path | str) -> None:
    """All problems as JSON lines with the keys source, line and text."""
    write_text(path, "".join(json.dumps(problem._asdict()) + "\n" for problem in problems))


def check_problems(
    problems: Sequence[Problem],
    num_rows: int,
    path: Path | str,
    max_share: float = 0.1,
    *,
    write: bool = True,
) -> str:
    """Writes all problems to `path` (problems.jsonl) and returns what to print of them, '' for none.

    num_rows: all rows, the unusable ones included. write: False in processes beside the one that writes.

    Raises ValueError if more than `max_share` of the rows cannot be used. 0: none may be unusable.
    """
    if write:
        write_problems(problems, path)
    if not problems:
        return ""
    share = len(problems) / max(num_rows, len(problems))
    listed = format_problems(problems)
    text = f"{len(problems):,} of {num_rows:,} rows ({share:.1%}) cannot be used; all are in {path}:\n{listed}"
    if share > max_share:
        raise ValueError(
            f"{text}\nexpected: at most {max_share:.0%} of the rows"
            "\nchange: the rows, or how the file is read (format, columns, delimiter, header)"
        )
    return text


def read_text(path: Path) -> str:
    """A text file. UTF-8 with or without a byte order mark, UTF-16 with one, else cp1252, said in the log.

    Bytes that are not UTF-8 in a file that mostly is become lone surrogates, which `value_problem` finds.

    Raises ValueError for a file that is too large, or no text.
    """
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(
            f"found: {path} has {size:,} bytes; expected: at most {MAX_FILE_BYTES:,}"
            "\nchange: cut it, or fine-tune on a sample of its rows"
        )
    return decode_text(path.read_bytes(), str(path))


def decode_text(data: bytes, source: str) -> str:
    """The text of a file's bytes: UTF-8, with or without its mark, or UTF-16 with one."""
    marked = data.startswith(b"\xef\xbb\xbf")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _decoded(data, "utf-16", source)
    if b"\0" in data[:4096]:
        raise _no_text(source, "it has zero bytes")
    text = data.decode("utf-8-sig", errors="surrogateescape")
    broken = _BROKEN_BYTE.search(text)
    if not broken:
        return text
    line = text.count("\n", 0, broken.start()) + 1
    num_broken = len(_BROKEN_BYTE.findall(text))
    if marked or len(_PROPER.findall(text)) > num_broken:
        log.warning("%s: %d bytes are not UTF-8, first in line %d", source, num_broken, line)
        return text
    decoded = _decoded(data, "cp1252", source)
    log.warning("%s: line %d is not UTF-8, so the file is read as cp1252", source, line)
    return decoded


def _decoded(data: bytes, encoding: str, source: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _no_text(source, str(error)) from error


def _no_text(source: str, why: str) -> ValueError:
    return ValueError(
        f"found: {source} is no text in a known encoding ({why})"
        "\nexpected: UTF-8, UTF-16 with a byte order mark, or cp1252"
        "\nchange: save it as CSV in UTF-8; unpack it if it is compressed"
    )


def value_problem(value: Any, depth: int = 0) -> str:
    """Why a value cannot be part of a record, or ''."""
    if isinstance(value, str):
        return "" if value.isascii() else _surrogate_problem(value)
    if depth > MAX_DEPTH:
        return f"lists and objects are nested more than {MAX_DEPTH} deep"
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return next(filter(None, (value_problem(part, depth + 1) for part in value)), "")
    return ""


def _surrogate_problem(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        near = text[max(error.start - 10, 0) : error.start]
        return f"bytes that are not UTF-8, or half a surrogate pair, after {near!r}"
    return ""


def unnamed(number: int) -> str:
    """The name of a column that has none."""
    return f"column{number}"
