"""From a file's columns to the roles that a task knows: which column is the text, which the label.

    choose_columns                       as_role_records
    sentence,intent   ─▶ {text: sentence, label: intent} ─▶ {"text": "book a flight", "label": "book"}

A column that the user names wins; then a well-known name (`column_names.NAMES`), of which the role's own
(text, label) wins over others; then what is left. Where two columns would do, the user is asked.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.data.column_names import NAMES, OTHER_FORMS, ROLES, Roles, normal
from jaxlm.data.record_base import Problem, Record, log
from jaxlm.data.role_values import CONVERTERS, LABELS, is_missing, label_of_columns

__all__ = [
    "NAMES",
    "ROLES",
    "Roles",
    "as_role_records",
    "choose_columns",
    "choose_roles",
    "columns_of",
]

Columns = dict[str, str | tuple[str, ...]]
NONE = "none"  # as a given column: the role is not in this file
_ONE_CHOICE = re.compile(r"(choice|option|ending|answer|a|opt|)_?([0-9a-h])")


def choose_columns(
    records: Sequence[Record],
    roles: Roles,
    given: Mapping[str, str | Sequence[str]] | None = None,
    labelled: bool = True,
) -> Columns:
    """Which column has which role: role -> column, or several (the choices; a multi-label table's labels).

    roles: as in ROLES. given: role -> a column's name, whatever its case, or its number from 0 (from the
    last one: -1, …); or several, also as 'a,b,c'; 'none': the file has no such column; '': guess.
    labelled: False where targets may be missing, also given ones: then the records are for prediction.

    Raises ValueError that lists the columns and says which option decides.
    """
    if not records:
        raise ValueError("found: no row that can be read; expected: some, to choose columns from")
    columns = columns_of(records)
    given = {role: value for role, value in (given or {}).items() if value not in ("", (), None)}
    chosen, problems = _given_columns(columns, roles, given, labelled)
    for role in (*roles.inputs, *roles.targets, *roles.optional):
        fitting = [] if role in given else _fitting(role, columns, chosen)
        if len(fitting) == 1:
            chosen[role] = fitting[0]
        elif fitting:
            problems[role] = f"several columns may be it: {', '.join(map(repr, fitting))}"
    needed = roles.inputs + (roles.targets if labelled else ())
    missing = {role for role in needed if role not in chosen and role not in given}
    if missing and not problems:
        chosen |= _by_elimination(records, columns, chosen, missing)
    problems |= {r: "no column is it" for r in needed if r not in chosen and r not in problems}
    if problems:
        raise ValueError(_repair_list(records, columns, problems))
    for role, column in chosen.items():
        log.info(
            "%s: %s is %s", records[0].source, role, ", ".join(map(repr, _flat({role: column})))
        )
    return chosen


def choose_roles(
    records: Sequence[Record], task: str, given: Mapping[str, str | Sequence[str]]
) -> Roles:
    """The roles of a task's columns: those of its other form where the file lacks an input of the first."""
    roles, other = ROLES[task], OTHER_FORMS.get(task)
    columns = columns_of(records)
    is_there = lambda role: given.get(role) or _fitting(role, columns, {})
    return roles if other is None or all(map(is_there, roles.inputs)) else ROLES[other]


def as_role_records(
    records: Sequence[Record],
    columns: Mapping[str, str | tuple[str, ...]],
    label_kind: str = "class",
    label_separator: str = "",
) -> tuple[list[Record], list[Problem]]:
    """Records whose fields are named by role and have the role's type, and the rows where that fails, or
    which lack an input of their task.

    text, text_pair, negative, question, context, id: str, as in the file ('' for a null); a question without an
        id has its line for it
    label: str ('class'), list[str] ('multilabel': a list, a string cut at `label_separator`, or the
        names of the columns with a 1), finite float ('number'), or int ('choice': a number from 0, a
        letter from A, or the text of a choice). An empty cell is no label, in 'multilabel' an empty list.
    words, labels: list[str] of the same length, from lists or strings with spaces
    predicate: int, from a number or from a column of marks, one of which is set
    answers: list of {"text": str, "start": int}, from SQuAD's lists, `datasets`' lists in an object, or
        a string: then start is `answer_start`'s, or the first place in the context, -1 without one
    choices: list[str]; of several columns without the empty ones at the end
    messages: list of {"role", "content"}, also from {"from", "value"}
    chosen, rejected: str, or such a list
    source: str; a list of sentences is joined by spaces. target: list[str], one or several right texts
    spans: two [start, end] pairs
    """
    if label_kind not in LABELS:
        raise ValueError(f"found: label_kind={label_kind!r}; expected: one of {', '.join(LABELS)}")
    inputs = [set(roles.inputs) for roles in ROLES.values()]
    needed = set().union(*(roles for roles in inputs if roles <= columns.keys()))
    found, problems = [], []
    for record in records:
        try:
            fields = _role_fields(record.fields, columns, needed, label_kind, label_separator)
        except ValueError as error:
            problems.append(Problem(record.source, record.line, str(error)))
        else:
            if "context" in columns:
                fields.setdefault("id", str(record.line))
            found.append(Record(record.source, record.line, fields))
    return found, problems


def check_inputs(record: Record, task: str) -> None:
    """Raises ValueError if a record, whose fields are named by role, lacks an input of its task."""
    if not record.fields.keys() >= set(ROLES[task].inputs):
        found, needed = ", ".join(record.fields), ", ".join(ROLES[task].inputs)
        raise ValueError(f"{record.source}:{record.line}: found {found}; {task} needs {needed}")


def columns_of(records: Sequence[Record]) -> list[str]:
    """The names of all fields in the order in which they are first met."""
    return list(dict.fromkeys(name for record in records for name in record.fields))


def _given_columns(columns, roles, given, labelled) -> tuple[Columns, dict[str, str]]:
    """The columns that the user names, and role -> what is wrong with that."""
    known = sum(roles, ())
    chosen: Columns = {}
    problems = {}
    for role, wanted in given.items():
        found = None if wanted == NONE else _named(columns, wanted)
        if role not in known:
            problems[role] = f"is no role of this task, whose roles are {', '.join(known)}"
        elif found:
            chosen[role] = found
        elif wanted != NONE and (labelled or role not in roles.targets):
            problems[role] = f"the file has no column {wanted!r}"
    return chosen, problems


def _named(columns: list[str], wanted: str | Sequence[str]) -> str | tuple[str, ...] | None:
    """The column, or columns, that the user means, None where there is none."""
    if not isinstance(wanted, str):
        several = [_named(columns, name) for name in wanted]
        return None if None in several else tuple(several)
    if wanted in columns:
        return wanted
    if same := [c for c in columns if normal(c) == normal(wanted)]:
        return same[0] if len(same) == 1 else None
    if re.fullmatch(r"-?\d{1,4}", wanted):
        number = int(wanted)
        return columns[number] if -len(columns) <= number < len(columns) else None
    return _named(columns, [name.strip() for name in wanted.split(",")]) if "," in wanted else None


def _flat(chosen: Columns) -> list[str]:
    return [c for value in chosen.values() for c in ([value] if isinstance(value, str) else value)]


def _fitting(role: str, columns: list[str], chosen: Columns) -> list[str | tuple[str, ...]]:
    """The free columns with a well-known name of the role; the role's own name alone if it is there."""
    free = [c for c in columns if c not in _flat(chosen)]
    fitting = [c for c in free if normal(c) in NAMES[role]]
    own = [c for c in fitting if normal(c) == role]
    if fitting or role != "choices":
        return own or fitting
    stems: dict[str, list[str]] = {}
    for column in free:
        if match := _ONE_CHOICE.fullmatch(normal(column)):
            stems.setdefault(match[1], []).append(column)
    return [tuple(names) for names in stems.values() if len(names) > 1]


def _by_elimination(records, columns: list[str], chosen: Columns, missing: set[str]) -> Columns:
    """Columns without names: words first and their labels last; a text and its label by what is in them."""
    free = [c for c in columns if c not in _flat(chosen)]
    if missing <= {"words", "labels"} and all(re.fullmatch(r"column\d+", c) for c in columns):
        ends = {"words": free[:1], "labels": free[-1:] if len(free) >= len(missing) else []}
        return {role: found[0] for role, found in ends.items() if role in missing and found}
    if "text" in missing and len(free) == 1:
        return {"text": free[0]}
    pair = free if "text" in missing else [*_flat({"text": chosen.get("text", ())}), *free]
    if "label" not in missing or not missing <= {"text", "label"} or len(pair) != 2:
        return {}
    label = _label_of_two(records, pair)
    if label is None or label == chosen.get("text"):
        return {}
    return {"text": pair[1 - pair.index(label)], "label": label}


def _label_of_two(records: Sequence[Record], pair: list[str]) -> str | None:
    """Of two columns the one whose values are fewer and shorter, and come again."""
    values = {c: [str(record.fields.get(c, "")) for record in records] for c in pair}
    kinds = {c: len(set(values[c])) for c in pair}
    lengths = {c: sum(map(len, values[c])) for c in pair}
    label, text = sorted(pair, key=kinds.__getitem__)
    fewer = kinds[label] < kinds[text] and kinds[label] <= max(len(records) / 2, 2)
    return label if fewer and lengths[label] < lengths[text] else None


def _repair_list(records, columns: list[str], problems: dict[str, str]) -> str:
    examples = {c: next((r.fields[c] for r in records if r.fields.get(c)), "") for c in columns}
    listed = [f"    {c!r}: for example {str(value)[:60]!r}" for c, value in examples.items()]
    options = " ".join(f"--config.data.{role}_column=NAME" for role in problems)
    return "\n".join(
        [
            f"which column of {records[0].source} is which is not clear:",
            *(f"  {role}: {problem}" for role, problem in problems.items()),
            "found: the columns",
            *listed,
            f"change: {options} (or the column's number, from 0)",
        ]
    )


def _role_fields(
    fields: Mapping[str, Any],
    columns: Mapping[str, str | tuple[str, ...]],
    needed: set[str],
    label_kind: str,
    separator: str,
) -> dict[str, Any]:
    raw: dict[str, Any] = {}
    for role, column in columns.items():
        if not isinstance(column, str):
            raw[role] = (
                label_of_columns(fields, column) if role == "label" else _cells(fields, column)
            )
        elif column in fields:
            raw[role] = fields[column]
        elif role in needed:
            raise ValueError(f"there is no {column!r}")
    values = {
        role: LABELS[label_kind](raw, separator) if role == "label" else CONVERTERS[role](raw)
        for role in raw
    }
    return {role: value for role, value in values.items() if value is not None}


def _cells(fields: Mapping[str, Any], columns: Sequence[str]) -> list[Any]:
    """The choices of a row, without empty ones at its end: it may have fewer than others."""
    cells = ["" if is_missing(fields.get(c)) else fields[c] for c in columns]
    while cells and cells[-1] == "":
        cells.pop()
    return cells
