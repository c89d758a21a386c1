"""How two marked entities of a text are related: "The <e1>child</e1> was put into the <e2>cradle</e2>." -> Entity-Destination(e1,e2).

    text      The <e1>child</e1> was put into the <e2>cradle</e2>.        or a text without marks, and `spans`
    tokens    [CLS] the $ child $ was put into the # cradle # . [SEP]
    example_entity_positions  ^ 2                  ^ 9                      e1 first, wherever it stands

An encoder reads both entities at their first marker, as the markers' vectors side by side (arXiv:1906.03158, "entity
markers - entity start"); a decoder, which has not read the entities there, at its last token. The markers are signs that
the vocabulary has and pretraining has seen (arXiv:1905.08284), so no new rows have to be learned. A text that is too long
is cut around its entities, and between them where they are too far apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.tasks import scores
from jaxlm.tasks.base import Feature, Layout, make_feature
from jaxlm.tasks.sequence_classification import SequenceClassification

TAG = re.compile(r"</?e[12]>")
DIRECTED = re.compile(r".+\((e1,e2|e2,e1)\)")

Span = tuple[int, int]


class RelationClassification(SequenceClassification):
    """Texts with two entities to one of several relations. See the module's docstring.

    markers: what stands before and after the first entity, a space, and what does at the second.
    label_smoothing, class_weights: as in `SequenceClassification`.
    """

    kind = "relation_classification"
    text_fields = ()  # what text augmentation may change: nothing, or entities would move

    def __init__(
        self,
        tokenizer: Any,
        layout: Layout,
        fitted: Mapping[str, Any],
        *,
        markers: str = "$ #",
        label_smoothing: float = 0.0,
        class_weights: str = "",
    ):
        super().__init__(
            tokenizer,
            layout,
            fitted,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
        )
        self.markers = check_markers(tokenizer, markers)
        if layout.room(1) < 12:
            raise ValueError(
                f"seq_len {layout.seq_len} has no room for two entities: set 32 or more"
            )
        self.is_directed = any(DIRECTED.fullmatch(label) for label in self.labels)
        self.best_metric = "semeval_f1" if self.is_directed else "f1_macro"

    def problem(self, record: Any, training: bool) -> str:
        """Why a record cannot be used, or '': also if its entities are not marked as they should be."""
        why = super().problem(record, training)
        if why:
            return why
        try:
            read_entities(record.fields)
        except ValueError as error:
            return str(error)
        return ""

    def features(self, record: Any) -> tuple[list[Feature], bool]:
        """Raises ValueError if the record has not two entities."""
        text, entities = read_entities(record.fields)
        marked, places = mark(text, entities, self.markers)
        ids, spans = self.tokenizer.encode_with_offsets(marked)
        ends_N2 = [token_span(spans, place) for place in places]
        kept = keep_entities(len(ids), ends_N2, self.layout.room(1))
        laid = self.layout.lay(ids[kept])
        positions = laid.starts[0] + np.searchsorted(kept, [first for first, _ in ends_N2])
        target, weight = self._target(record.fields.get("label"))
        feature = make_feature(
            laid,
            example_entity_positions=positions[None].astype(np.int32),
            example_labels=[target],
            example_weights=[weight],
        )
        return [feature], len(kept) < len(ids)

    def scores(self, records: Sequence[Any], predictions: Sequence[Mapping]) -> dict[str, float]:
        """Those of classes; where labels have a direction first those of SemEval-2010 task 8, without 'Other'."""
        found = super().scores(records, predictions)
        if not self.is_directed:
            return found
        gold = [record.fields["label"] for record in records]
        return scores.semeval_scores(gold, [p["label"] for p in predictions]) | found


def check_markers(tokenizer: Any, markers: str) -> tuple[str, str]:
    """Both markers, which must be different and known to the tokenizer.

    Raises:
      ValueError: if they are not.
    """
    parts = markers.split()
    encoded = [tokenizer.encode(part).tolist() for part in parts]
    known = all(ids and tokenizer.unk_id not in ids for ids in encoded)
    if len(parts) != 2 or not known or encoded[0] == encoded[1]:
        raise ValueError(
            f"task.markers={markers!r}: expected two different signs that the tokenizer knows, with a space between them"
        )
    return parts[0], parts[1]


def read_entities(fields: Mapping[str, Any]) -> tuple[str, tuple[Span, Span]]:
    """The text without marks, and the characters [start, end) of e1 and e2.

    Raises:
      ValueError: if there are not two entities apart from each other.
    """
    text, spans = str(fields.get("text") or ""), fields.get("spans")
    if spans is None:
        text, spans = read_tags(text)
    for number, (start, end) in enumerate(spans, 1):
        if not 0 <= start < end <= len(text) or not text[start:end].strip():
            raise ValueError(
                f"e{number} is [{start}, {end}) of {len(text)} characters: it has no text"
            )
    (_, first_end), (second, _) = sorted(map(tuple, spans))
    if second < first_end:
        raise ValueError("e1 and e2 overlap")
    return text, (tuple(spans[0]), tuple(spans[1]))


def read_tags(text: str) -> tuple[str, list[Span]]:
    """'a <e1>b</e1> <e2>c</e2>' -> ('a b c', [(2, 3), (4, 5)])."""
    tags = [match.group() for match in TAG.finditer(text)]
    expected = ["<e1>", "</e1>", "<e2>", "</e2>"]
    if sorted(tags) != sorted(expected):
        raise ValueError(
            f"found the marks {' '.join(tags) or 'none'}; expected each of {' '.join(expected)} once"
        )
    plain, places = "", {}
    for part, tag in zip(TAG.split(text), [*tags, ""], strict=True):
        plain += part
        places[tag] = len(plain)
    return plain, [(places["<e1>"], places["</e1>"]), (places["<e2>"], places["</e2>"])]


def mark(
    text: str, entities: tuple[Span, Span], markers: tuple[str, str]
) -> tuple[str, list[Span]]:
    """The text with markers, single spaces around them, and the characters from each first to each last marker.

    'a b, c' with b and c -> 'a $ b $ , # c #' with [(2, 7), (10, 15)].
    """
    marked, places, last = "", [(0, 0), (0, 0)], 0
    for number in sorted((0, 1), key=lambda i: entities[i]):
        start, end = entities[number]
        marked = join(marked, text[last:start])
        begin = len(marked) + bool(marked)
        marker = markers[number]
        marked = join(marked, f"{marker} {text[start:end].strip()} {marker}")
        places[number] = (begin, len(marked))
        last = end
    return join(marked, text[last:]), places


def join(before: str, after: str) -> str:
    """Two texts with one space between them; an empty one is left out."""
    return " ".join(filter(None, (before.rstrip(), after.strip())))


def token_span(spans_N2: np.ndarray, place: Span) -> Span:
    """The tokens [first, end) that touch these characters. spans: (n, 2), of each token."""
    touching = np.flatnonzero((spans_N2[:, 1] > place[0]) & (spans_N2[:, 0] < place[1]))
    return int(touching[0]), int(touching[-1]) + 1


def keep_entities(length: int, entities: Sequence[Span], room: int) -> np.ndarray:
    """The numbers, ascending, of at most `room` of `length` tokens, among them the first of both entities [first, end).

    . . . . a a . . b b . . .        a window with both entities in its middle
    . . . . a a x x x x x b b . .    too far apart: from the first on, and up to the end of the second
    . . . . a a a a a b b b b b .    too long: from each first on
    """
    if length <= room:
        return np.arange(length)
    (a, _), (b, end) = sorted(entities)
    if end - a <= room:
        start = min(max(0, a - (room - (end - a)) // 2), length - room)
        return np.arange(start, start + room)
    half = room // 2
    if b < a + half:
        return np.arange(a, a + room)
    rest = min(b, end - (room - half))
    return np.concatenate([np.arange(a, a + half), np.arange(rest, rest + room - half)])
