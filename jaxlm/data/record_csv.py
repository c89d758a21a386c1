"""CSV and its relatives: which delimiter, are there quotes, is there a header, which rows are whole."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxlm.data.column_names import is_known_name
from jaxlm.data.record_base import Found, Problem, ReadOptions, Record, log, read_text, unnamed

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
HEADERS = ("auto", "yes", "no")
MAX_FIELD_CHARS = 16 << 20
_ONE_COLUMN = "\x1f"  # a delimiter that no text has
_NAME_LIKE = re.compile(r"[^\W\d][\w .\-/()]{0,39}")
_IN_QUOTES = re.compile('".*"')
_NUMBER = re.compile(r"[-+]?(\d+[.,]?\d*|[.,]\d+)([eE][-+]?\d+)?")


class Row(NamedTuple):
    """A row of a table. line: of the file, from 1. cells: as they stand there."""

    line: int
    cells: list[str]


class Table(NamedTuple):
    """Rows, and the lines that are none because of their quotes."""

    rows: list[Row]
    broken: list[tuple[int, str]]

    @property
    def width(self) -> int:
        """Cells of the first row, which all others should have."""
        return len(self.rows[0].cells) if self.rows else 0

    @property
    def num_bad(self) -> int:
        """Rows that cannot be read, or have another width."""
        return len(self.broken) + sum(len(row.cells) != self.width for row in self.rows)


def read_tsv(path: Path, options: ReadOptions) -> Found:
    """Like `read_csv`, and a tab in the first line is the delimiter."""
    return read_csv(path, options, prefer_tab=True)


def read_csv(path: Path, options: ReadOptions, prefer_tab: bool = False) -> Found:
    """One record a row, with strings. What was decided about the file is said in the log.

    A row of another width than the first is a problem, and so is one whose quotes are broken. A
    repeated header is one, too. Blank lines are skipped. Columns without a name are column0, column1, …
    """
    if options.header not in HEADERS:
        raise ValueError(f"found: header={options.header!r}; expected: one of {', '.join(HEADERS)}")
    lines = list(io.StringIO(read_text(path), newline=""))
    delimiter = options.delimiter or guess_delimiter(lines, prefer_tab)
    table, quoted = _best_table(lines, delimiter)
    rows = table.rows
    header, why = _has_header(rows, options.header)
    names = _unique_names(rows[0].cells) if header else [unnamed(i) for i in range(table.width)]
    log.info(
        "%s: %s; %s (%s): columns %s%s",
        path,
        "one column" if delimiter == _ONE_COLUMN else DELIMITERS.get(delimiter, repr(delimiter)),
        "a header" if header else "no header",
        why,
        ", ".join(map(repr, names)),  # a name may have any characters
        "" if quoted else "; quotes are read as text",
    )
    problems = [Problem(str(path), line, text) for line, text in table.broken]
    records = []
    for row in rows[header:]:
        if len(row.cells) != len(names):
            text = f"found {len(row.cells)} columns, expected {len(names)}"
            problems.append(Problem(str(path), row.line, text))
        elif header and row.cells == rows[0].cells:
            problems.append(Problem(str(path), row.line, "the header once more"))
        else:
            fields = dict(zip(names, row.cells, strict=True))
            records.append(Record(str(path), row.line, fields))
    return records, sorted(problems, key=lambda problem: problem.line)


def guess_delimiter(lines: Sequence[str], prefer_tab: bool = False) -> str:
    """The delimiter that cuts the first row into several cells and most of the first 200 lines into as
    many. One that makes a well-known name of the header wins. A file without any has one column."""
    if prefer_tab and lines and "\t" in lines[0]:
        return "\t"
    best, best_score = _ONE_COLUMN, (False, 0.5, 1)
    for delimiter in DELIMITERS:
        table = _best_table(lines[:200], delimiter)[0]
        if table.width < 2:
            continue
        known = any(map(is_known_name, table.rows[0].cells))
        whole = 1 - table.num_bad / (len(table.rows) + len(table.broken))
        if (score := (known, whole, table.width)) > best_score:
            best, best_score = delimiter, score
    return best


def _best_table(lines: Sequence[str], delimiter: str) -> tuple[Table, bool]:
    """The table read with quotes, or without (False) where that leaves fewer bad rows, or, in files with
    tabs, where quotes would join lines that are whole rows already: such files often have quotes as text.
    Not if the whole first row is in quotes, for then whoever wrote the file means them."""
    quoted = _quoted_table(lines, delimiter)
    if delimiter == _ONE_COLUMN or not any('"' in line for line in lines):
        return quoted, True
    plain = Table(
        [
            Row(number, line.rstrip("\r\n").split(delimiter))
            for number, line in enumerate(lines, 1)
            if line.strip()
        ],
        [],
    )
    joined = delimiter == "\t" and plain.num_bad == 0 and len(plain.rows) > len(quoted.rows)
    means_quotes = bool(plain.rows) and all(map(_IN_QUOTES.fullmatch, plain.rows[0].cells))
    if (joined and plain.width > 1 and not means_quotes) or plain.num_bad < quoted.num_bad:
        return plain, False
    return quoted, True


def _quoted_table(lines: Sequence[str], delimiter: str) -> Table:
    """A row with broken quotes costs its first line, not the rows up to the next quote: reading goes
    on in the line after."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_CHARS))
    spaced = bool(lines) and f'{delimiter} "' in lines[0]
    rows, broken, start = [], [], 0
    while start < len(lines):
        begin = start
        rest = (lines[i] for i in range(begin, len(lines)))
        reader = csv.reader(rest, delimiter=delimiter, strict=True, skipinitialspace=spaced)
        try:
            for cells in reader:
                if len(cells) > 1 or "".join(cells).strip():
                    rows.append(Row(start + 1, cells))
                start = begin + reader.line_num
        except csv.Error as error:
            broken.append((start + 1, f"broken quotes: {error}"))
            start += 1
    return Table(rows, broken)


def _has_header(rows: list[Row], wanted: str) -> tuple[bool, str]:
    """Whether the first row names the columns, and why."""
    if wanted != "auto" or not rows:
        return wanted == "yes" and bool(rows), "as given"
    first = [cell.strip() for cell in rows[0].cells]
    body = [r.cells for r in rows if len(r.cells) == len(first) and r.cells != rows[0].cells]
    columns = list(zip(*body, strict=True)) or [()] * len(first)
    if any(first) and all(is_known_name(cell) for cell in first if cell):
        return True, "well-known names"
    if any(cell and cell in column for cell, column in zip(first, columns, strict=True)):
        return False, "the first row's cells come again below"
    if any(map(is_known_name, first)):
        return True, "a well-known name"
    if any(_NUMBER.fullmatch(cell) for cell in first):
        return False, "a number in the first row"
    if any(column and all(map(_NUMBER.fullmatch, column)) for column in columns):
        return True, "a word over numbers"
    longest = max((sum(map(len, column)) / max(len(column), 1) for column in columns), default=0)
    name_like = all(_NAME_LIKE.fullmatch(cell) for cell in first if cell)
    if len(first) > 1 and name_like and longest > 2 * max(map(len, first)):
        return True, "short names over longer texts"
    return False, "the first row looks like the others; header=yes or no decides"


def _unique_names(cells: list[str]) -> list[str]:
    names: list[str] = []
    for number, cell in enumerate(cells):
        name = cell.strip() or unnamed(number)
        names.append(f"{name}.{number}" if name in names else name)
    return names
