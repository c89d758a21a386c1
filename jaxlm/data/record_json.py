"""JSON: lines of objects, lists of objects, objects of lists (splits), and SQuAD's tree."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxlm.data.record_base import Found, Problem, ReadOptions, Record, log, read_text, unnamed


def read_json_lines(path: Path, options: ReadOptions) -> Found:
    """One object, or one list of cells, a line. Blank lines are skipped."""
    records: list[Record] = []
    problems: list[Problem] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except ValueError as error:
            problems.append(Problem(str(path), number, str(error)))
        else:
            _add_row(row, str(path), number, records, problems)
    return records, problems


def read_json(path: Path, options: ReadOptions) -> Found:
    """A list of rows; an object of lists of rows, of which `options.split` names one or several
    ('train+oos_train'); SQuAD; or, under the wrong name, JSON lines. A row is an object or a list of
    cells, which become column0, column1, …"""
    text = read_text(path)
    try:
        tree = _parsed(text)
    except ValueError as error:
        if _is_json_lines(text):
            log.info("%s: read as JSON lines", path)
            return read_json_lines(path, options)
        raise ValueError(f"found: {path}: {error}") from error
    if is_squad(tree):
        return _squad(tree, str(path))
    records: list[Record] = []
    problems: list[Problem] = []
    for source, rows in _splits(tree, path, options.split):
        for number, row in enumerate(rows, 1):
            _add_row(row, source, number, records, problems)
    return records, problems


def read_squad(path: Path, options: ReadOptions) -> Found:
    """SQuAD v1.1 or v2 (Rajpurkar et al. 2016, 2018): one record a question, numbered through the file.

    Fields: id, question, context, and answers as the file has them (a list of objects with `text` and
    `answer_start`, in characters of the context), [] where a question is impossible. Whether the
    context has the answer there is for the task to check.
    """
    try:
        tree = _parsed(read_text(path))
    except ValueError as error:
        raise ValueError(f"found: {path}: {error}") from error
    if not is_squad(tree):
        expected = '{"data": [{"paragraphs": [{"context": …, "qas": […]}]}]}'
        raise ValueError(f"found: {path} is not SQuAD's format; expected: {expected}")
    return _squad(tree, str(path))


def is_squad(tree: Any) -> bool:
    """Whether a parsed JSON file has SQuAD's articles and paragraphs."""
    articles = tree.get("data") if isinstance(tree, dict) else None
    return isinstance(articles, list) and any(
        isinstance(article, dict) and "paragraphs" in article for article in articles
    )


def _parsed(text: str) -> Any:
    """Raises ValueError in words, also where the nesting is deeper than the parser can follow."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else error.colno
        raise ValueError(f"broken JSON: {error.msg} at {at}") from error
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def _is_json_lines(text: str) -> bool:
    try:
        return isinstance(_parsed(text.lstrip().partition("\n")[0]), dict)
    except ValueError:
        return False


def _add_row(row, source: str, number: int, records: list[Record], problems: list[Problem]):
    if isinstance(row, list):
        row = {unnamed(i): cell for i, cell in enumerate(row)}
    if isinstance(row, dict):
        records.append(Record(source, number, row))
    else:
        kind = type(row).__name__
        problems.append(Problem(source, number, f"found {kind}, expected an object or a list"))


def _splits(tree: Any, path: Path, wanted: str) -> Iterable[tuple[str, list]]:
    """(source, rows) of the wanted splits."""
    if isinstance(tree, list) and not wanted:
        return [(str(path), tree)]
    lists = {k: v for k, v in tree.items() if isinstance(v, list)} if isinstance(tree, dict) else {}
    names = wanted.split("+") if wanted else list(lists)
    if not set(names) <= set(lists) or not names or (len(names) > 1 and not wanted):
        found = ", ".join(f"{name} ({len(rows):,} rows)" for name, rows in lists.items())
        raise ValueError(
            f"found: {path} has {f'the splits {found}' if found else 'no rows and no splits'}"
            f"\nexpected: {f'the split {wanted}' if wanted else 'a list of rows, or the name of a split'}"
            f"\nchange: {path}:NAME, or NAME+NAME for several"
        )
    return [(f"{path}:{name}" if wanted else str(path), lists[name]) for name in names]


def _squad(tree: dict, source: str) -> Found:
    records: list[Record] = []
    problems: list[Problem] = []
    number = 0
    for article in tree["data"]:
        for paragraph in _children(article, "paragraphs"):
            for question in _children(paragraph, "qas"):
                number += 1
                try:
                    records.append(Record(source, number, _squad_fields(paragraph, question)))
                except (KeyError, TypeError) as error:
                    problems.append(Problem(source, number, f"a question without {error}"))
    return records, problems


def _children(node: Any, key: str) -> list:
    """[None] where there is no list, so that what is missing becomes a problem and is not passed over."""
    value = node.get(key) if isinstance(node, dict) else None
    return value if isinstance(value, list) else [None]


def _squad_fields(paragraph: Any, question: Any) -> dict[str, Any]:
    if not isinstance(question, dict):
        raise KeyError("paragraphs or qas")
    fields = {
        "id": question.get("id"),
        "question": question["question"],
        "context": paragraph["context"],
    }
    if question.get("is_impossible"):
        fields["answers"] = []
    elif "answers" in question:
        fields["answers"] = question["answers"]
    return fields
