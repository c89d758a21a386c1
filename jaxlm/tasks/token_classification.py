"""A label for each word: named entities and other spans (BIO, BIOES, BILOU, IOB1, IO), or plain tags (part of speech).

    words        Ada             Lovelace          wrote
    labels       B-PER           I-PER             O
    tokens   [CLS] ada       love  ##lace          wrote [SEP]
    labels     .   B-PER     I-PER   .             O       .
    weights    0   1         1       0             1       0

A word's label is read at its first token (bytes, characters: not at the space before it); a decoder has not read the word
there, so at its last. Words are encoded one by one, with the space before them that the tokenizer has between words. A sentence that is longer than a row is cut between
words into several features of one record:

    [CLS] w0 w1 w2 w3 w4 w5 w6 w7 [SEP]
                         [CLS] w6 w7 w8 w9 w10 [SEP]        w6 and w7 are context here: their labels are those above

so every word has exactly one label, in training and in evaluation. Labels of spans are read as conlleval reads them
(`tags.tags_to_spans`), IOB1 is turned into BIO, and the labels predicted are the most probable ones that make whole spans.
Roles of a predicate (`predicate`, the number of its word): its tokens have the token type 1, or stand between two [SEP]
where the model has no token types. Layers: arXiv:1810.04805, section 5.3; the predicate: arXiv:1904.05255, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.tasks import scores, tags
from jaxlm.tasks.base import (
    Feature,
    Laid,
    Layout,
    Metrics,
    make_feature,
    share,
    softmax_cross_entropy,
)

NEVER = -1e9  # the score of a step between labels that make no whole span
CONTEXT_SHARE = 4  # a window begins with words of the one before, up to a fourth of its room


class Window(NamedTuple):
    """A part of a sentence as a sequence. positions: where the labels of the words first … first + len - 1 are read."""

    laid: Laid
    first: int
    positions: np.ndarray


class TokenClassification:
    """Words to labels. See the module's docstring.

    label_smoothing: see `softmax_cross_entropy`.
    """

    kind = "token_classification"

    def __init__(
        self,
        tokenizer: Any,
        layout: Layout,
        fitted: Mapping[str, Any],
        *,
        label_smoothing: float = 0.0,
    ):
        if layout.room(1) < CONTEXT_SHARE:
            raise ValueError(f"seq_len {layout.seq_len} has no room for words: set 16 or more")
        self.tokenizer, self.layout, self.label_smoothing = tokenizer, layout, label_smoothing
        self.labels, self.scheme = tuple(fitted["labels"]), fitted["scheme"]
        self.ids = {label: index for index, label in enumerate(self.labels)}
        self.best_metric = "token_accuracy" if self.scheme == tags.PLAIN else "entity_f1"
        self.prefix = word_prefix(tokenizer)
        self.legal = np.array(
            [[is_legal(a, b, self.scheme) for b in self._ends] for a in self._ends]
        )

    @property
    def _ends(self) -> tuple[str, ...]:
        """The labels, and what stands before the first word and after the last."""
        return *self.labels, "O"

    @staticmethod
    def infer(records: Sequence[Any], **other: Any) -> dict[str, Any]:
        """The labels of the training rows, sorted, and their scheme: a key of `tags.SCHEMES` or 'plain'.

        Raises:
          ValueError: fewer than two labels, or labels of spans beside others.
        """
        # A row with an empty label is a problem of its own, and says nothing about the others.
        rows = [row for record in records if (row := record.fields.get("labels")) and "" not in row]
        scheme = tags.detect_scheme(rows)
        scheme = "BIO" if scheme == "IOB1" else scheme
        labels = sorted({label for row in rows for label in read_labels(row, scheme)})
        if len(labels) < 2:
            raise ValueError(
                f"token classification: found the labels {labels}: expected two or more"
            )
        return {"labels": labels, "scheme": scheme}

    @property
    def head(self) -> dict[str, Any]:
        """A number for each class of each token."""
        return {"num_classes": len(self.labels)}

    def problem(self, record: Any, training: bool) -> str:
        """Why a record cannot be used, or ''."""
        words, labels = record.fields.get("words") or [], record.fields.get("labels")
        predicate = record.fields.get("predicate")
        if labels is not None and len(labels) != len(words):
            return f"there are {len(words)} words and {len(labels)} labels"
        if predicate is not None and not 0 <= int(predicate) < len(words):
            return f"the predicate is word {predicate} of {len(words)} (counted from 0)"
        if not training:
            return ""
        if not words:
            return "there are no words"
        if not labels:
            return "the labels are missing"
        if "" in labels:
            return f"word {labels.index('') + 1} has no label"
        unknown = sorted(set(read_labels(labels, self.scheme)) - set(self.ids))
        return f"unknown label {', '.join(map(repr, unknown))}" if unknown else ""

    def features(self, record: Any) -> tuple[list[Feature], bool]:
        """A feature for each window; truncated: whether a word alone is longer than a row."""
        windows, truncated = self._windows(record)
        labels = read_labels(record.fields.get("labels") or [], self.scheme)
        features = []
        for window in windows:
            ids = np.zeros(len(window.laid.tokens), np.int32)
            weights = np.zeros(len(window.laid.tokens), np.float32)
            read_here = labels[window.first : window.first + len(window.positions)]
            for position, label in zip(window.positions, read_here, strict=bool(labels)):
                ids[position], weights[position] = self.ids.get(label, 0), label in self.ids
            features.append(make_feature(window.laid, labels=ids, weights=weights))
        return features, truncated

    def _windows(self, record: Any) -> tuple[list[Window], bool]:
        pieces, places, truncated = self._encode(record)
        room = self.layout.room(1)
        lengths = [len(piece) for piece in pieces]
        windows = []
        for start, first, end in cut_windows(lengths, room, room // CONTEXT_SHARE):
            laid = self.layout.lay(np.concatenate([np.empty(0, np.int32), *pieces[start:end]]))
            begins = laid.starts[0] + np.cumsum([0, *lengths[start:end]])[:-1]
            laid = self._mark_predicate(laid, record, start, begins, lengths[start:end])
            positions = begins[first - start :] + places[first:end]
            windows.append(Window(laid, first, positions))
        return windows, truncated

    def _encode(self, record: Any) -> tuple[list[np.ndarray], np.ndarray, bool]:
        """The tokens of each word, at which of them its label is read, and whether a word was cut to fit into a row."""
        words = [str(word or "") for word in record.fields.get("words") or []]
        texts = [self.prefix + word if number else word for number, word in enumerate(words)]
        unknown = np.array([self.tokenizer.unk_id], np.int32)
        pieces = [piece if len(piece) else unknown for piece in self.tokenizer.encode_batch(texts)]
        spaces = np.array([has_own_space(piece, self.tokenizer) for piece in pieces], int)
        predicate, marked = record.fields.get("predicate"), np.zeros(len(pieces), int)
        if predicate is not None and not self.layout.pair_types:
            number, marker = int(predicate), np.array(self.layout.between[:1], np.int32)
            pieces[number] = np.concatenate([marker, pieces[number], marker])
            marked[number] = 1
        lengths = np.array([len(piece) for piece in pieces], int)
        places = lengths - 1 - marked if self.layout.reads_last else marked + spaces
        room = self.layout.room(1)
        cut = [piece[:room] for piece in pieces]
        return cut, np.minimum(places, room - 1), bool((lengths > room).any())

    def _mark_predicate(
        self, laid: Laid, record: Any, start: int, begins: np.ndarray, lengths: Sequence[int]
    ) -> Laid:
        """With the token type 1 at the predicate, if this window has it and the model has token types."""
        predicate = record.fields.get("predicate")
        if predicate is None or not self.layout.pair_types:
            return laid
        number = int(predicate) - start
        if not 0 <= number < len(begins):
            return laid
        types = laid.token_types.copy()
        types[begins[number] : begins[number] + lengths[number]] = 1
        return laid._replace(token_types=types)

    def loss(
        self, outputs: Any, batch: Mapping[str, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """The summed loss of all words and their number; metrics: loss, accuracy."""
        logits_BTC, labels_BT, weights_BT = outputs.head_logits, batch["labels"], batch["weights"]
        loss = softmax_cross_entropy(logits_BTC, labels_BT, weights_BT, self.label_smoothing)
        return loss, {
            "loss": loss,
            "accuracy": share(logits_BTC.argmax(-1) == labels_BT, weights_BT),
        }

    def predict(self, outputs: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """token_log_probs (B, T, C)."""
        return {"token_log_probs": jax.nn.log_softmax(outputs.head_logits)}

    def decode(
        self, record: Any, features: Sequence[Feature], outputs: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, Any]:
        """labels and probabilities, one for each word; of spans also entities: start and end (words), type and text."""
        windows, _ = self._windows(record)
        parts = [
            output["token_log_probs"][window.positions]
            for window, output in zip(windows, outputs, strict=True)
        ]
        log_probs_NC = np.concatenate(parts).astype(np.float64)
        path = best_path(log_probs_NC, np.where(self.legal, 0.0, NEVER))
        labels = [self.labels[i] for i in path]
        probabilities = np.exp(log_probs_NC[np.arange(len(path)), path]).tolist()
        prediction = {"labels": labels, "probabilities": probabilities}
        if self.scheme != tags.PLAIN:
            prediction["entities"] = entities(record.fields.get("words") or [], labels)
        return prediction

    def scores(self, records: Sequence[Any], predictions: Sequence[Mapping]) -> dict[str, float]:
        """Of entities, whole ones; of plain tags, the accuracy of words."""
        gold, said = self._gold(records), [p["labels"] for p in predictions]
        if self.scheme == tags.PLAIN:
            return {"token_accuracy": scores.token_accuracy(gold, said)}
        return scores.entity_scores(gold, said)

    def report(self, records: Sequence[Any], predictions: Sequence[Mapping]) -> str:
        """Precision, recall and F1 of each type of entity, or tag."""
        if self.scheme != tags.PLAIN:
            return scores.entity_report(self._gold(records), [p["labels"] for p in predictions])
        return scores.classification_report(*self._ids(records, predictions), self.labels)

    def confusion(self, records: Sequence[Any], predictions: Sequence[Mapping]) -> np.ndarray:
        """Counts of words (C, C), gold in rows; those with labels that training does not know are left out."""
        counts = np.zeros((len(self.labels), len(self.labels)), np.int64)
        gold, said = self._ids(records, predictions)
        np.add.at(counts, (gold[gold >= 0], said[gold >= 0]), 1)
        return counts

    def _gold(self, records: Sequence[Any]) -> list[list[str]]:
        return [read_labels(record.fields["labels"], self.scheme) for record in records]

    def _ids(
        self, records: Sequence[Any], predictions: Sequence[Mapping]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gold and predicted labels of all words, -1 where training does not know the label."""
        gold = [self.ids.get(label, -1) for row in self._gold(records) for label in row]
        said = [self.ids[label] for prediction in predictions for label in prediction["labels"]]
        return np.array(gold, np.int64), np.array(said, np.int64)


def read_labels(labels: Sequence[str], scheme: str) -> list[str]:
    """The labels of a sentence in the scheme that the model learns; without illegal steps, unless they are plain."""
    if scheme == tags.PLAIN or "" in labels:
        return list(labels)
    return tags.convert_tags(labels, scheme)


def entities(words: Sequence[str], labels: Sequence[str]) -> list[dict[str, Any]]:
    """The entities that labels mark: first word, word after the last, type, text."""
    return [
        {"start": s.start, "end": s.end, "type": s.name, "text": " ".join(words[s.start : s.end])}
        for s in tags.tags_to_spans(labels)
    ]


def word_prefix(tokenizer: Any) -> str:
    """What a word that follows another is encoded with: ' ', or '' where the tokenizer itself thinks of the space.

    Byte-level BPE has 'a a' as a, Ġa, so its second word is ' a'. WordPiece drops spaces, and most SentencePiece models
    write one before every text they encode: 'a a' is twice what 'a' is.
    """
    one, two = tokenizer.encode_batch(["a", "a a"])
    return "" if np.array_equal(two, np.concatenate([one, one])) else " "


def has_own_space(piece: np.ndarray, tokenizer: Any) -> bool:
    """Whether a word's first token is nothing but the space before it. piece: the word's ids (n,)."""
    first = int(piece[0])
    return len(piece) > 1 and first != tokenizer.unk_id and not tokenizer.decode([first]).strip()


def cut_windows(lengths: Sequence[int], room: int, context: int) -> list[tuple[int, int, int]]:
    """Words of these lengths as windows (start, first, end) of at most `room` tokens, all of them if they fit.

    The labels of the words from `first` on are read; those from `start` to `first` are at most `context` tokens.
    """
    windows, first = [], 0
    while True:
        start, used = first, 0
        next_length = lengths[first] if first < len(lengths) else 0
        while start > 0 and used + lengths[start - 1] <= min(context, room - next_length):
            start -= 1
            used += lengths[start]
        end = first
        while end < len(lengths) and used + lengths[end] <= room:
            used += lengths[end]
            end += 1
        windows.append((start, first, end))
        if end == len(lengths):
            return windows
        first = end


def is_legal(before: str, after: str, scheme: str) -> bool:
    """Whether label `after` may follow `before`: I goes on with a span of its kind; in BIOES one that began also ends."""
    if scheme in (tags.PLAIN, "IO"):
        return True
    (prefix, name), (next_prefix, next_name) = tags.split_tag(before), tags.split_tag(after)
    goes_on = prefix in "BI" and next_prefix in "IE" and name == next_name
    if next_prefix in "IE":
        return goes_on
    return scheme == "BIO" or prefix not in "BI"


def best_path(scores_NC: np.ndarray, steps_EE: np.ndarray) -> list[int]:
    """The classes with the largest sum of scores and of steps between neighbours (Viterbi 1967).

    steps (C + 1, C + 1), from row to column; the last class is what stands before the first word and after the last.
    """
    if not len(scores_NC):
        return []
    steps_CC = steps_EE[:-1, :-1]
    totals_C = scores_NC[0] + steps_EE[-1, :-1]
    pointers = []
    for scores_C in scores_NC[1:]:
        through_CC = totals_C[:, None] + steps_CC
        pointers.append(through_CC.argmax(0))
        totals_C = through_CC.max(0) + scores_C
    path = [int((totals_C + steps_EE[:-1, -1]).argmax())]
    for pointer in reversed(pointers):
        path.append(int(pointer[path[-1]]))
    return path[::-1]
