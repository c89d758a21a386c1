"""What a file's cell becomes as text, label, words, answers, choices, … A ValueError says why it cannot.

Every function takes all raw values of a row by role and returns its own role's value, None for none.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Raw = Mapping[str, Any]
_TRUE = {"1", "1.0", "true", "yes", "x"}
_FALSE = {"0", "0.0", "false", "no", ""}
_UNMARKED = _FALSE | {"-", "_", "o"}
_LIST = re.compile(r"\[(\s*['\"]|-?\d+(,\s*-?\d+)*\]$)")  # of strings, or of whole numbers


def _text(role: str) -> Callable[[Raw], str]:
    return lambda raw: "" if is_missing(raw[role]) else _string(raw[role], role)


def _string(value: Any, what: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # pandas makes 1.0 of 1 where a column has empty cells
    if isinstance(value, int | float):
        return str(value)
    raise ValueError(f"{what} is {_kind(value)}, expected a string")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"of type {type(value).__name__}")


def is_missing(value: Any) -> bool:
    """Whether a cell is empty; pandas writes NaN for those, into JSON as well."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _list(value: Any, what: str) -> list:
    """A list, or a string with one in JSON."""
    value = _unpacked(value, what)
    if not isinstance(value, list):
        raise ValueError(f"{what} is {_kind(value)}, expected a list")
    return value


def _unpacked(value: Any, what: str) -> Any:
    """What a string has in JSON; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is broken JSON: {value[:40]!r}") from error


def _strings(value: Any, what: str) -> list[str]:
    """A list of strings; a string is cut at its spaces, unless it is a list in JSON."""
    if isinstance(value, str) and not _LIST.match(value):
        return value.split()
    return [_string(part, f"one of {what}") for part in _list(value, what)]


# --- labels ---


def _class(raw: Raw, separator: str) -> str | None:
    value = raw["label"]
    return None if is_missing(value) else _string(value, "label").strip() or None


def _multilabel(raw: Raw, separator: str) -> list[str] | None:
    value = raw["label"]
    if is_missing(value) and value != "":
        return None
    if not isinstance(value, str) or _LIST.match(value) or value.strip() == "[]":
        names = [_string(part, "one of label") for part in _list(value, "label")]
    else:
        names = value.split(separator) if separator else [value]
    return list(dict.fromkeys(name.strip() for name in names if name.strip()))


def _number(raw: Raw, separator: str) -> float | None:
    value = raw["label"]
    if is_missing(value):
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"label {str(value)[:40]!r} is not a finite number (with a decimal point)")
    return number


def _choice(raw: Raw, separator: str) -> int | None:
    value = raw["label"]
    if is_missing(value):
        return None
    choices = _choices(raw)
    text, names = _string(value, "label").strip(), _choice_names(raw)
    if text in names:
        return names.index(text)
    if isinstance(value, str) and text in choices:  # a number is one, whatever the choices say
        return choices.index(text)
    if re.fullmatch(r"\d{1,3}", text) and int(text) < len(choices):
        return int(text)
    if re.fullmatch(r"[A-Za-z]", text) and ord(text.upper()) - ord("A") < len(choices):
        return ord(text.upper()) - ord("A")
    raise ValueError(
        f"label {text[:40]!r} is none of the {len(choices)} choices, by number from 0, letter or text"
    )


LABELS: dict[str, Callable[[Raw, str], Any]] = {
    "class": _class,
    "multilabel": _multilabel,
    "number": _number,
    "choice": _choice,
}


def label_of_columns(fields: Mapping[str, Any], columns: Sequence[str]) -> list[str] | None:
    """The names of the columns with a 1, None where all cells are missing."""
    cells = {c: "" if is_missing(fields.get(c)) else str(fields[c]).lower() for c in columns}
    if bad := [
        f"{c!r}: {cell!r}" for c, cell in cells.items() if cell.strip() not in _TRUE | _FALSE
    ]:
        raise ValueError(f"found {', '.join(bad)}, expected 0 or 1 in each label's column")
    return [c for c in columns if cells[c].strip() in _TRUE] if any(cells.values()) else None


# --- words ---


def _words(raw: Raw) -> list[str]:
    return _strings([] if is_missing(raw.get("words")) else raw["words"], "words")


def _word_labels(raw: Raw) -> list[str] | None:
    if is_missing(raw["labels"]):
        return None
    labels = _strings(raw["labels"], "labels")
    if "words" in raw and len(labels) != (count := len(_words(raw))):
        raise ValueError(f"{count} words have {len(labels)} labels")
    return labels


def _predicate(raw: Raw) -> int | None:
    value = raw["predicate"]
    if isinstance(value, list):
        marks = [i for i, mark in enumerate(value) if str(mark).strip().lower() not in _UNMARKED]
        if len(marks) > 1:
            raise ValueError(
                f"{len(marks)} words are marked as the predicate; expected one a record"
            )
        return marks[0] if marks else None
    if is_missing(value):
        return None
    text = _string(value, "predicate").strip()
    if not re.fullmatch(r"\d{1,6}", text) or int(text) >= len(_words(raw)):
        raise ValueError(f"predicate {text[:40]!r} is not the number of a word, from 0")
    return int(text)


# --- questions ---


def _answers(raw: Raw) -> list[dict[str, Any]] | None:
    value = raw["answers"]
    if value is None:
        return None
    if isinstance(value, str):
        value = value.strip()
        if not value.startswith(("[{", "{")):
            return _one_answer(raw, value) if value else []
        value = _unpacked(value, "answers")
    if isinstance(value, dict):  # as `datasets` writes it: an object of lists
        texts, starts = value.get("text"), value.get("answer_start", value.get("start"))
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise ValueError("answers have not as many starts as texts")
        value = [{"text": t, "start": s} for t, s in zip(texts, starts, strict=True)]
    return [_answer(answer) for answer in _list(value, "answers")]


def _one_answer(raw: Raw, text: str) -> list[dict[str, Any]]:
    start = raw.get("answer_start")
    if is_missing(start):
        return [{"text": text, "start": str(raw.get("context") or "").find(text)}]
    if re.fullmatch(r"\d{1,9}", place := _string(start, "answer_start").strip()):
        return [{"text": text, "start": int(place)}]
    raise ValueError(f"answer_start {place[:40]!r} is not a number")


def _answer(answer: Any) -> dict[str, Any]:
    fields = answer if isinstance(answer, dict) else {}
    text, start = fields.get("text"), fields.get("answer_start", fields.get("start"))
    if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
        raise ValueError("an answer needs a text and its answer_start, a number")
    return {"text": text, "start": start}


# --- texts to write ---

_SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def _messages(raw: Raw) -> list[dict[str, str]]:
    """[{"role", "content"}], also of [{"from", "value"}] (ShareGPT), and of contents in parts if all of them are text."""
    return [_message(one) for one in _list(raw["messages"], "messages")]


def _message(one: Any) -> dict[str, str]:
    fields = one if isinstance(one, dict) else {}
    role, content = (
        fields.get("role", fields.get("from")),
        fields.get("content", fields.get("value")),
    )
    if isinstance(content, list):
        content = "".join(map(_text_part, content))
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError("a message needs a role and its content, a text")
    return {"role": _SPEAKERS.get(role, role), "content": content}


def _text_part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
    if not isinstance(text, str):
        raise ValueError("a message has a part that is no text (an image, a tool's call)")
    return text


def _answered(role: str) -> Callable[[Raw], Any]:
    """An answer, or the whole dialogue with it."""
    return lambda raw: (
        [_message(one) for one in raw[role]] if isinstance(raw[role], list) else _text(role)(raw)
    )


def _source(raw: Raw) -> str:
    value = raw["source"]
    if isinstance(value, list):
        return " ".join(_string(part, "one of source").strip() for part in value)
    return "" if is_missing(value) else _string(value, "source")


def _target(raw: Raw) -> list[str] | None:
    value = raw["target"]
    if isinstance(value, list):
        return [_string(part, "one of target") for part in value]
    return None if is_missing(value) else [_string(value, "target")]


# --- choices and spans ---


def _choices(raw: Raw) -> list[str]:
    value = raw.get("choices")
    if isinstance(value, dict):  # as `datasets` writes it: {"text": […], "label": […]}
        value = value.get("text")
    parts = [] if value is None else _list(value, "choices")
    return [_string(p.get("text") if isinstance(p, dict) else p, "a choice") for p in parts]


def _choice_names(raw: Raw) -> list[str]:
    """The names that the file itself gives to its choices, such as A, B, C."""
    value = raw.get("choices")
    if isinstance(value, dict):
        names = value.get("label")
        return list(map(str, names)) if isinstance(names, list) else []
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return [str(part.get("label")) for part in value]
    return []


def _spans(raw: Raw) -> list[list[int]] | None:
    if is_missing(raw["spans"]):
        return None
    spans = _list(raw["spans"], "spans")
    pairs = [span for span in spans if isinstance(span, list) and len(span) == 2]
    if (
        len(spans) != 2
        or len(pairs) != 2
        or not all(type(n) is int for pair in pairs for n in pair)
    ):
        raise ValueError("spans are not two pairs [start, end] of numbers")
    return spans


CONVERTERS: dict[str, Callable[[Raw], Any]] = {
    **{
        role: _text(role) for role in ("text", "text_pair", "negative", "question", "context", "id")
    },
    **{role: _text(role) for role in ("instruction", "input", "output", "system", "control")},
    **{role: _answered(role) for role in ("chosen", "rejected")},
    "messages": _messages,
    "source": _source,
    "target": _target,
    "words": _words,
    "labels": _word_labels,
    "predicate": _predicate,
    "answers": _answers,
    "answer_start": lambda raw: None,  # is part of the answers
    "choices": _choices,
    "spans": _spans,
}
