"""Preferences: of two answers to the same dialogue the chosen one is to become likelier than the rejected one.

    tokens       <bos> q q A a a   <bos> q q A r r r         two segments of one example, in one row
    labels         q   q A a a .     q   q A r r r .
    weights        0   0 0 1 1 1     0   0 0 1 1 1 1         1: the next token is of the last answer
    segment_ids    1   1 1 1 1 1     2   2 2 2 2 2 2

Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7), with log p(answer) summed over its tokens:

    loss = -log sigmoid(beta ((log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))))

The reference is the model that training starts from. It never changes, so what it says of each answer is asked once, before
the first step, and is a number of the example: no second model is held or run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.tasks.base import Feature, Metrics
from jaxlm.tasks.chat import Message
from jaxlm.tasks.dialogue import Dialogue, fit, split_answer
from jaxlm.tasks.writing import next_tokens

CHOSEN, REJECTED = 1, 2
LOGITS = 2**25  # float32 logits that are held at a time


class Preference(Dialogue):
    """Pairs of answers; beta: how strongly the model is held to the reference, 0.1 as published."""

    kind = "preference"
    best_metric = "loss"
    needs_reference = True

    def __init__(self, *args: Any, beta: float = 0.1, **options: Any):
        super().__init__(*args, **options)
        self.beta = beta
        if not beta > 0:
            raise ValueError(f"task.beta={beta}: expected above 0")

    def pair(self, record: Any) -> tuple[list[Message], list[Message]]:
        """The dialogue with the chosen answer, and with the rejected one.

        Raises:
          ValueError: if one is missing, or they answer different dialogues.
        """
        both = []
        for side in ("chosen", "rejected"):
            said = record.fields.get(side)
            if not said:
                raise ValueError(f"there is no {side} answer")
            if isinstance(said, str):
                asked = {k: v for k, v in record.fields.items() if k != "output"}
                messages = super().messages(record._replace(fields=asked))
                messages.append({"role": "assistant", "content": said})
            else:
                messages = super().messages(record._replace(fields={"messages": said}))
            both.append(messages)
        if split_answer(both[0])[0] != split_answer(both[1])[0]:
            raise ValueError("the chosen and the rejected answer are to different dialogues")
        if not all(split_answer(messages)[1] for messages in both):
            raise ValueError("a dialogue does not end with the assistant's answer")
        return both[0], both[1]

    def messages(self, record: Any) -> list[Message]:
        """The messages of the answer that was chosen, or of a dialogue."""
        return self.pair(record)[0] if "chosen" in record.fields else super().messages(record)

    def problem(self, record: Any, training: bool) -> str:
        """Why a record cannot be used, or ''."""
        try:
            for messages in self.pair(record):
                self.template.parts(messages)
        except ValueError as error:
            return str(error)
        return ""

    def features(self, record: Any) -> tuple[list[Feature], bool]:
        """See the drawing. Each side has half a row; example_reference (2,) is filled in before training."""
        sides, was_cut = [], False
        for messages in self.pair(record):
            ids, is_answer = self.template.encode(messages)
            answer = np.flatnonzero(~is_answer[: np.flatnonzero(is_answer)[-1]])[-1] + 1
            is_last = is_answer & (np.arange(len(ids)) >= answer)
            kept = fit(is_last, self.writer.seq_len // 2 + 1, self.target_len)
            was_cut |= kept.start > 0 or bool(is_last[kept.stop :].any())
            sides.append(next_tokens(ids[kept], is_last[kept]))
        lengths = [len(side["tokens"]) for side in sides]
        joined = {key: np.concatenate([side[key] for side in sides]) for key in sides[0]}
        feature = {
            **joined,
            "segments": np.repeat(np.array([1, 2], np.int32), lengths),
            "example_side": np.array([CHOSEN, REJECTED], np.int32),
            "example_reference": np.zeros(2, np.float32),
        }
        return [feature], was_cut

    def loss(
        self, outputs: Any, batch: Mapping[str, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """The summed loss of the pairs, and their number; metrics: loss, accuracy (how often the chosen answer has gained
        more), and margin, by how many nats."""
        gained_BE = answer_logprobs(outputs, batch) - batch["example_reference"]
        margin_BE = gained_BE[:, :-1] - gained_BE[:, 1:]  # a pair's slots are neighbours
        weights_BE = (batch["example_side"][:, :-1] == CHOSEN).astype(jnp.float32)
        count = weights_BE.sum()
        loss = (-jax.nn.log_sigmoid(self.beta * margin_BE) * weights_BE).sum(), count
        accuracy = ((margin_BE > 0) * weights_BE).sum(), count
        return loss, {
            "loss": loss,
            "accuracy": accuracy,
            "margin": ((margin_BE * weights_BE).sum(), count),
        }

    def predict(self, outputs: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """slot_logprobs (B, E): log p of each answer."""
        return {"slot_logprobs": answer_logprobs(outputs, batch)}

    def take_reference(
        self, features: Sequence[Feature], outputs: Mapping[int, Mapping[str, np.ndarray]]
    ) -> None:
        """Notes in each feature what the reference model predicts of it; outputs: by the features' numbers."""
        for number, feature in enumerate(features):
            feature["example_reference"] = np.asarray(outputs[number]["slot_logprobs"], np.float32)


def answer_logprobs(outputs: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """(B, E) float32: of each slot the sum of its labels' log-probabilities, as far as they have a weight."""
    logprobs_BT = token_logprobs(outputs, batch["labels"]) * batch["weights"]
    slots = jnp.arange(1, batch["example_ids"].shape[1] + 1)
    of_slot_BTE = batch["segment_ids"][:, :, None] == slots[None, None]
    return jnp.einsum("BT,BTE->BE", logprobs_BT, of_slot_BTE.astype(jnp.float32))


def token_logprobs(outputs: Any, labels_BT: jax.Array) -> jax.Array:
    """(B, T) float32 log p(label), some positions at a time: their logits are made again in the backward pass."""
    (rows, length), vocab_size = labels_BT.shape, outputs.unembed.shape[0]
    chunk = min(length, max(1, LOGITS // (rows * vocab_size)))
    count = -(-length // chunk)
    more = count * chunk - length

    def in_chunks(x):
        x = jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(rows, count, chunk, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def of_chunk(hidden_BtD, labels_Bt):
        table = outputs.unembed.astype(hidden_BtD.dtype)
        logits = jnp.einsum("BtD,VD->BtV", hidden_BtD, table, preferred_element_type=jnp.float32)
        if outputs.unembed_bias is not None:
            logits += outputs.unembed_bias.astype(jnp.float32)[None, None]
        if outputs.softcap:
            logits = outputs.softcap * jnp.tanh(logits / outputs.softcap)
        own = jnp.take_along_axis(logits, labels_Bt[..., None], axis=-1)[..., 0]
        return own - jax.nn.logsumexp(logits, axis=-1)

    parts = jax.lax.map(lambda x: of_chunk(*x), (in_chunks(outputs.hidden), in_chunks(labels_BT)))
    return parts.swapaxes(0, 1).reshape(rows, count * chunk)[:, :length]
