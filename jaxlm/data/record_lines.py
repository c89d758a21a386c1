"""Formats of several lines a record: CoNLL columns, CoNLL-U, and the relations of SemEval-2010 task 8."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from jaxlm.data.record_base import Found, Problem, ReadOptions, Record, read_text, unnamed

CONLLU_COLUMNS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
RELATION_LINE = re.compile(r'(\d+)\t"?(.*?)"?\s*')
_KEY_VALUE = re.compile(r"#\s*\S+\s+=\s")  # '# sent_id = 7'
_PART_OF_WORD = re.compile(
    r"\d+[-.]\d+"
)  # CoNLL-U's '3-4' (written as one) and '3.1' (not written)


class Line(NamedTuple):
    """A line of a file with columns. number: from 1. cells: its columns."""

    number: int
    text: str
    cells: list[str]


def read_conll(path: Path, options: ReadOptions) -> Found:
    """Sentences of one word a line, with a blank line (or only white space) after each.

    Cells are between tabs where most lines have one, else between spaces. A record has a list for
    each column: column0, column1, … A line that starts with '#' is a comment where it has not as many
    columns as the others; a hashtag has. -DOCSTART- ends a sentence. A sentence with a line of
    another number of columns, or with an empty cell, is a problem as a whole.
    """
    return _read_sentences(path, ())


def read_conllu(path: Path, options: ReadOptions) -> Found:
    """Universal Dependencies' CoNLL-U (universaldependencies.org/format.html): like CoNLL with named
    columns; ranges of words and empty nodes are left out, as they are no words of their own."""
    return _read_sentences(path, CONLLU_COLUMNS)


def _read_sentences(path: Path, names: tuple[str, ...]) -> Found:
    lines = _column_lines(read_text(path))
    if names == CONLLU_COLUMNS:
        lines = [line for line in lines if not _PART_OF_WORD.fullmatch("".join(line.cells[:1]))]
    width = len(names) or _usual_width(lines)
    names = names or tuple(map(unnamed, range(width)))
    records: list[Record] = []
    problems: list[Problem] = []
    for sentence in _sentences(lines, width):
        bad = next(
            (line for line in sentence if len(line.cells) != width or "" in line.cells), None
        )
        if bad:
            found = f"{len(bad.cells)} columns" if len(bad.cells) != width else "an empty cell"
            where = f"in the sentence of line {sentence[0].number}"
            problems.append(
                Problem(str(path), bad.number, f"found {found} {where}, expected {width} columns")
            )
            continue
        columns = zip(*(line.cells for line in sentence), strict=True)
        fields = {name: list(column) for name, column in zip(names, columns, strict=True)}
        records.append(Record(str(path), sentence[0].number, fields))
    return records, problems


def _column_lines(text: str) -> list[Line]:
    """All lines; a blank one has no cells."""
    # Not splitlines(): tweets have U+0085 and U+2028 inside words.
    lines = [line.rstrip("\r") for line in text.split("\n")]
    filled = [line for line in lines if line.strip()]
    tabs = 2 * sum("\t" in line for line in filled) > len(filled)

    def cells(line: str) -> list[str]:
        if not line.strip():
            return []
        if tabs:
            return [cell.strip(" ") for cell in line.split("\t")]
        return re.split("[ \t]+", line.strip(" \t"))

    return [Line(number, line, cells(line)) for number, line in enumerate(lines, 1)]


def _usual_width(lines: list[Line]) -> int:
    filled = [line for line in lines if line.cells]
    plain = [line for line in filled if not line.text.startswith("#")]
    widths = Counter(len(line.cells) for line in plain or filled)
    return widths.most_common(1)[0][0] if widths else 0


def _sentences(lines: list[Line], width: int) -> list[list[Line]]:
    sentences: list[list[Line]] = [[]]
    for line in lines:
        if not line.cells or line.text.startswith("-DOCSTART-"):
            sentences.append([])
        elif not _is_comment(line, width, first=not sentences[-1]):
            sentences[-1].append(line)
    return [sentence for sentence in sentences if sentence]


def _is_comment(line: Line, width: int, first: bool) -> bool:
    if not line.text.startswith("#"):
        return False
    return len(line.cells) != width or (first and _KEY_VALUE.match(line.text) is not None)


def read_semeval(path: Path, options: ReadOptions) -> Found:
    """SemEval-2010 task 8 (Hendrickx et al. 2010): `NUMBER TAB "sentence"` with <e1>…</e1> and
    <e2>…</e2> in it, then the relation's line, then a comment's; a test file may have the sentences only.

    Fields: id, text (without its quotes) and, where there is one, label.
    """
    records: list[Record] = []
    problems: list[Problem] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        line = line.strip("\r ")
        if match := RELATION_LINE.fullmatch(line):
            fields = {"id": match[1], "text": match[2]}
            records.append(Record(str(path), number, fields))
        elif line and not line.startswith("Comment"):
            if records and number == records[-1].line + 1:
                records[-1].fields["label"] = line
            else:
                found = f"found {line[:40]!r}, expected a number, a tab and a sentence"
                problems.append(Problem(str(path), number, found))
    return records, problems
