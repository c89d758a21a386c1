"""Texts to vectors whose cosine says how near the texts are (Sentence-BERT, arXiv:1908.10084).

    text [, text_pair [, negative]] ──▶ one segment each ──▶ pooled, length 1 ──▶ v_anchor, v_positive, v_negative

The head has no parameters, so a published sentence encoder gives its published vectors. Two losses:

    contrastive   the anchor's positive among all positives and negatives of the batch (arXiv:1705.00652, section 4.4)
    cosine        (cos(anchor, positive) - score)^2

Slots of a record follow each other: `example_sides` 0 anchor, 1 positive, 2 hard negative. `example_texts` (m, 2) int32
are hashes that say which texts are equal: the slot's own, and that of its partner (the anchor's is the positive, the
positive's is the anchor, a negative is its own).
"""

from __future__ import annotations

import math
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.tasks import scores
from jaxlm.tasks.base import Feature, Layout, Metrics, fit_lengths, real_weights, share
from jaxlm.tasks.segments import check_usable, make_segments

LOSSES = ("contrastive", "cosine")
# What the option is called -> the head's pooling.
POOLINGS = {"mean": "mean", "cls": "first"}
ANCHOR, POSITIVE, NEGATIVE = 0, 1, 2
NEVER = -1e9  # the similarity of what is no candidate: finite, so that an empty slot has no NaN in its gradient
CHUNK = 1024  # queries whose similarities to all candidates are in memory at once
FIELDS = ("text", "text_pair", "negative")


class Pair(dict):
    """A prediction: {'cosine': of text and text_pair}, {} of a lone text; `vectors` (m, D) stay out of its JSON."""

    vectors: np.ndarray

    def __init__(self, vectors: np.ndarray):
        super().__init__({"cosine": float(vectors[0] @ vectors[1])} if len(vectors) > 1 else {})
        self.vectors = vectors


class Embedding:
    """Sentence embeddings, from pairs that belong together or from pairs with a score.

    loss: 'contrastive', where every pair belongs together, or 'cosine', where its label is a score.
    pooling: 'mean' of all tokens, specials included, or 'cls', the token where the layout reads: [CLS], a decoder's
      last <eos>.
    temperature: that cosines are divided by (contrastive).
    symmetric: also find the anchor of each positive among all anchors, and take the mean of both losses.
    max_score: the score that means cosine 1; scores are divided by it (cosine).
    """

    kind = "embedding"
    text_fields = FIELDS[:2]  # what text augmentation may change

    def __init__(
        self,
        tokenizer: Any,
        layout: Layout,
        fitted: Mapping[str, Any],
        *,
        loss: str = "contrastive",
        pooling: str = "mean",
        temperature: float = 0.05,
        symmetric: bool = False,
        max_score: float = 1.0,
    ):
        self.tokenizer, self.layout = tokenizer, layout
        self.loss_name, self.pooling, self.max_score = loss, pooling, max_score
        self.temperature, self.symmetric = temperature, symmetric
        self.best_metric = "mrr" if loss == "contrastive" else "spearman"

    @property
    def splits_batch(self) -> bool:
        """Whether a batch may be split into micro-batches: in-batch negatives are those of the whole batch."""
        return self.loss_name != "contrastive"

    @staticmethod
    def infer(
        records: Sequence[Any],
        *,
        loss: str = "contrastive",
        pooling: str = "mean",
        temperature: float = 0.05,
        max_score: float = 1.0,
        **other: Any,
    ) -> dict[str, Any]:
        """Nothing is learned from the training rows.

        Raises:
          ValueError: with everything that is wrong with the options.
        """
        problems = []
        for name, value, known in (("loss", loss, LOSSES), ("pooling", pooling, POOLINGS)):
            if value not in known:
                problems.append(f"task.{name}={value!r}: use one of {', '.join(known)}")
        for name, number in (("temperature", temperature), ("max_score", max_score)):
            if not number > 0:
                problems.append(f"task.{name}={number}: expected a number above 0")
        if problems:
            raise ValueError("embedding:\n  " + "\n  ".join(problems))
        return {"labels": []}

    @property
    def head(self) -> dict[str, Any]:
        """The pooled vectors themselves, whatever else the family's heads do."""
        return {
            "num_classes": 0,
            "pooling": POOLINGS[self.pooling],
            "transform": "",
            "use_norm": False,
        }

    def problem(self, record: Any, training: bool) -> str:
        """Why a record cannot be used, or ''."""
        texts = _texts(record)
        if self._room(len(texts)) < 1:
            return f"{len(texts)} texts have no room in seq_len {self.layout.seq_len}"
        if not training:
            return ""
        if "text_pair" not in record.fields:
            return "there is no text_pair"
        if empty := [name for name, text in zip(FIELDS, texts, strict=False) if not text.strip()]:
            return f"{' and '.join(empty)} empty"
        score = _score(record)
        if self.loss_name == "contrastive":
            if score is not None and score <= 0:
                return f"the score is {score}, but task.loss='contrastive' takes every pair for a match"
        elif score is None:
            return "the score is missing or no number"
        elif abs(score) > self.max_score:
            return f"the score is {score}: set task.max_score={self.max_score} to that of a perfect match"
        return ""

    def _room(self, num_texts: int) -> int:
        """How many tokens that many texts may have together, each laid out on its own."""
        return self.layout.seq_len - num_texts * (self.layout.seq_len - self.layout.room(1))

    def features(self, record: Any) -> tuple[list[Feature], bool]:
        """Together the texts have at most seq_len tokens: where they are too long, the longest is cut first."""
        check_usable(self, record)
        ids = self.tokenizer.encode_batch(_texts(record))
        full = [len(text) for text in ids]
        lengths = fit_lengths(full, self._room(len(ids)))
        laid = [self.layout.lay(text[:n]) for text, n in zip(ids, lengths, strict=True)]
        own = [_text_hash(text) for text in ids]
        partner = [*own[1::-1], *own[2:]]
        score = _score(record) if self.loss_name == "cosine" else None
        counts = len(ids) > 1 and (self.loss_name != "cosine" or score is not None)
        feature = make_segments(
            laid,
            example_sides=np.arange(len(ids), dtype=np.int32),
            example_texts=np.array([own, partner], np.int32).T,
            example_labels=np.full(len(ids), (score or 0.0) / self.max_score, np.float32),
            example_weights=np.full(len(ids), counts, np.float32),
        )
        return [feature], lengths != full

    def loss(
        self, outputs: Any, batch: Mapping[str, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """The summed loss of all pairs and their summed weight; metrics: loss, and contrastive: accuracy in the batch."""
        vectors_BED = normalize(outputs.head_logits)
        if self.loss_name == "cosine":
            cosines_BE = (vectors_BED * jnp.roll(vectors_BED, -1, axis=1)).sum(-1)
            weights_BE = real_weights(batch) * (batch["example_sides"] == ANCHOR)
            squares_BE = jnp.square(cosines_BE - batch["example_labels"])
            loss = (squares_BE * weights_BE).sum(), weights_BE.sum()
            return loss, {"loss": loss}
        slots = flatten_slots(vectors_BED, batch)
        loss, accuracy = ranking_loss(slots, self.temperature, ANCHOR)
        if self.symmetric:
            back, _ = ranking_loss(slots, self.temperature, POSITIVE)
            loss = (loss[0] + back[0]) / 2, loss[1]
        return loss, {"loss": loss, "accuracy": accuracy}

    def predict(self, outputs: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """slot_vectors (B, E, D): of length 1."""
        return {"slot_vectors": normalize(outputs.head_logits)}

    def decode(
        self, record: Any, features: Sequence[Feature], outputs: Sequence[Mapping[str, np.ndarray]]
    ) -> Pair:
        """The vectors of a record's texts, float32 (texts, D)."""
        return Pair(np.asarray(outputs[0]["slot_vectors"], np.float32))

    def is_labelled(self, record: Any) -> bool:
        """Whether it can be scored: a text_pair to search for is enough, unless the loss learns scores."""
        if self.loss_name == "cosine":
            return "text_pair" in record.fields and _score(record) is not None
        return "text_pair" in record.fields

    def scores(self, records: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        """cosine: pearson, spearman and mse of cosine and score; contrastive: recall_at_1/5/10 and mrr of each text's
        text_pair among those of all records; equal ones are one, so that either of them is right."""
        if lacking := [record for record in records if not self.is_labelled(record)]:
            first = f"{lacking[0].source}:{lacking[0].line}"
            what = "text_pair with a score" if self.loss_name == "cosine" else "text_pair"
            raise ValueError(f"{len(lacking)} of {len(records)} records have no {what}: {first}, …")
        if self.loss_name == "cosine":
            said = [prediction["cosine"] for prediction in predictions]
            return scores.regression_scores(self._targets(records), said)
        return scores.retrieval_scores(pair_ranks(records, predictions))

    def _targets(self, records: Sequence[Any]) -> np.ndarray:
        """(records,) the cosines that the scores stand for."""
        return np.array([_score(record) for record in records], np.float64) / self.max_score

    def report(self, records: Sequence[Any], predictions: Sequence[Any]) -> str:
        """The pairs that are farthest from right."""
        if self.loss_name == "cosine":
            title = "cosine - score, the largest"
            off = np.array([said["cosine"] for said in predictions]) - self._targets(records)
            shown, worst = [f"{value:+.2f}" for value in off], np.argsort(-np.abs(off))
        else:
            others = len({record.fields["text_pair"] for record in records})
            title = f"rank among {others}, the last"
            ranks = pair_ranks(records, predictions)
            shown, worst = [str(rank) for rank in ranks], np.argsort(-ranks, kind="stable")
        pairs = [(r.fields["text"], r.fields["text_pair"]) for r in records]
        lines = [f"{shown[i]:>6}  {_short(pairs[i][0])} | {_short(pairs[i][1])}" for i in worst[:5]]
        return "\n".join([f"{title}:", *lines])

    def confusion(self, records: Sequence[Any], predictions: Sequence[Any]) -> None:
        """None: there are no classes."""
        return None


def normalize(vectors_XD: jax.Array) -> jax.Array:
    """Vectors (..., D) of length 1, in float32; zeros stay zeros and have a gradient of 0."""
    x = vectors_XD.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def flatten_slots(vectors_BED: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The slots of all rows as one list: vectors (N, D), ids, sides, weights (N,), texts (N, 2), where N = B E."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    return {
        "vectors": flat(vectors_BED),
        "ids": flat(batch["example_ids"]),
        "sides": flat(batch["example_sides"]),
        "texts": flat(batch["example_texts"]),
        "weights": flat(real_weights(batch)),
    }


def ranking_loss(
    slots: Mapping[str, jax.Array], temperature: float, asker: int
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Multiple negatives ranking: ((total, weight) of the loss, (right, counted) of the first rank).

        -log exp(cos(a, p) / t) / sum over candidates c of exp(cos(a, c) / t)

    asker: ANCHOR asks for its positive among all positives and hard negatives, POSITIVE for its anchor among all
    anchors. Candidates are those of the whole batch, on whatever device and in whatever row; see `is_candidate`.
    """
    sides_N, texts_N2 = slots["sides"], slots["texts"]
    real_N = slots["ids"] >= 0
    wanted_N = real_N & ((sides_N == ANCHOR) if asker == POSITIVE else (sides_N != ANCHOR))
    candidates_NN = is_candidate(texts_N2, wanted_N, step=1 if asker == ANCHOR else -1)
    similarities_NN = jnp.einsum(
        "ND,MD->NM", slots["vectors"], slots["vectors"], precision=jax.lax.Precision.HIGHEST
    )
    logits_NN = jnp.where(candidates_NN, similarities_NN / temperature, NEVER)
    number_N = jnp.arange(len(sides_N))
    target_N = jnp.clip(number_N + (1 if asker == ANCHOR else -1), 0, len(sides_N) - 1)
    right_N = jnp.take_along_axis(logits_NN, target_N[:, None], axis=1)[:, 0]
    weights_N = slots["weights"] * (real_N & (sides_N == asker))
    # Where a slot does not ask, its own target is no candidate, and NEVER would swamp the sum in float32.
    losses_N = jnp.where(weights_N > 0, jax.nn.logsumexp(logits_NN, axis=1) - right_N, 0.0)
    first_N = logits_NN.argmax(1) == target_N
    return ((losses_N * weights_N).sum(), weights_N.sum()), share(first_N, weights_N)


def is_candidate(texts_N2: jax.Array, wanted_N: jax.Array, step: int) -> jax.Array:
    """(N, N) bool: whether slot i has to tell its target, slot i + step, from slot j.

    Not from what is not `wanted`; and not from a text that is as right, or is the question itself: one that is equal to
    slot i, or to its partner, or whose own partner is equal to slot i. The target itself always is a candidate.
    """
    own_N, partner_N = texts_N2[:, 0], texts_N2[:, 1]
    equal_NN = (
        (own_N[None, :] == own_N[:, None])
        | (own_N[None, :] == partner_N[:, None])
        | (partner_N[None, :] == own_N[:, None])
    )
    is_target_NN = jnp.eye(len(own_N), k=step, dtype=bool)
    return wanted_N[None, :] & (is_target_NN | ~equal_NN)


def pair_ranks(records: Sequence[Any], predictions: Sequence[Any]) -> np.ndarray:
    """(records,) the rank, from 1, of each text's own text_pair among the different ones of all records, by cosine."""
    column: dict[str, int] = {}
    corpus = []
    for record, said in zip(records, predictions, strict=True):
        if column.setdefault(record.fields["text_pair"], len(column)) == len(corpus):
            corpus.append(said.vectors[POSITIVE])
    gold = np.array([column[record.fields["text_pair"]] for record in records])
    corpus_CD = np.stack(corpus)
    queries_QD = np.stack([said.vectors[ANCHOR] for said in predictions])
    chunks = range(0, len(records), CHUNK)
    return np.concatenate(
        [
            scores.retrieval_ranks(queries_QD[i : i + CHUNK] @ corpus_CD.T, gold[i : i + CHUNK])
            for i in chunks
        ]
    )


def _texts(record: Any) -> list[str]:
    """The record's texts: text, then text_pair, then negative, where it has them."""
    fields = record.fields
    names = [name for name in FIELDS[:2] if name in fields]
    if len(names) == 2 and fields.get("negative"):
        names.append("negative")
    return [str(fields[name] or "") for name in names]


def _score(record: Any) -> float | None:
    """The label as a number, None where there is none."""
    try:
        score = float(record.fields.get("label"))
    except (TypeError, ValueError):
        return None
    return score if math.isfinite(score) else None


def _text_hash(ids: np.ndarray) -> np.int32:
    """The same for the same tokens; different ones are equal once in 4 billion pairs, which costs one negative."""
    return np.uint32(zlib.crc32(np.ascontiguousarray(ids, np.int32).tobytes())).astype(np.int32)


def _short(text: Any) -> str:
    return textwrap.shorten(str(text), 60, placeholder=" …")
