"""Text from a model: continuations of prompts, and the likeliest tokens at masked places.

Both work on a fixed buffer of (rows, max_len) tokens, so that neither the prompts' lengths nor the number of new tokens
compiles anything again. Every new token costs a whole forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = Any
Batch = Mapping[str, jax.Array]
# (params, batch, positions (B, M)) -> float32 logits (B, M, V) at those positions
ApplyLogits = Callable[[Params, Batch, jax.Array], jax.Array]


@functools.lru_cache(maxsize=16)
def make_apply_logits(model: Any, num_ids: int | None = None) -> ApplyLogits:
    """The logits of a Linen model at chosen positions. One model gives one function, so that jit knows it again.

    num_ids: the tokenizer's; a padded vocabulary has rows past it, which stand for nothing. None = all.
    """

    def apply_logits(params: Params, batch: Batch, positions_BM: jax.Array) -> jax.Array:
        # An encoder gathers the positions before its head; a decoder ignores the key.
        outputs = model.apply({"params": params}, {**batch, "masked_positions": positions_BM})
        hidden = outputs.hidden
        if hidden.shape[:2] != positions_BM.shape:
            hidden = jnp.take_along_axis(hidden, positions_BM[:, :, None], axis=1)
        unembed = outputs.unembed[:num_ids].astype(hidden.dtype)
        logits = jnp.einsum("BMD,VD->BMV", hidden, unembed, preferred_element_type=jnp.float32)
        if outputs.unembed_bias is not None:
            logits = logits + outputs.unembed_bias[:num_ids].astype(jnp.float32)[None, None]
        return outputs.softcap * jnp.tanh(logits / outputs.softcap) if outputs.softcap else logits

    return apply_logits


def pad_rows(rows: Sequence[np.ndarray], max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens (B, max_len), lengths (B,)), padded with 0.

    Raises ValueError if a row is empty or longer than max_len, listing all such rows.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    wrong = [f"row {i} has {n} tokens" for i, n in enumerate(lengths) if not 0 < n <= max_len]
    if wrong or not len(rows):
        raise ValueError(
            f"expected 1 to max_len={max_len} tokens a row: "
            + ("; ".join(wrong) or "no rows given")
        )
    tokens = np.zeros((len(rows), max_len), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens, lengths


def make_batch(tokens_BT: jax.Array, length_B: jax.Array) -> dict[str, jax.Array]:
    """A model's batch of rows of which the first `length` tokens are real and the rest is padding."""
    positions_BT = jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1)
    segment_ids = (positions_BT < length_B[:, None]).astype(jnp.int32)
    return {"tokens": tokens_BT, "segment_ids": segment_ids, "positions": positions_BT}


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, temperature: jax.Array, top_k: int
) -> jax.Array:
    """A token for each row (B,) from softmax(logits / temperature), of the `top_k` likeliest (0 = of all).

    Temperature 0 is greedy: the likeliest token.
    """
    greedy = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if top_k:
        least = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    drawn = jax.vmap(jax.random.categorical)(keys_B, logits_BV / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn.astype(jnp.int32), greedy)


@functools.partial(jax.jit, static_argnames=("apply_logits", "top_k"))
def decode(
    params: Params,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    max_new_tokens: jax.Array,
    temperature: jax.Array,
    seed: jax.Array,
    eos_id: jax.Array,
    *,
    apply_logits: ApplyLogits,
    top_k: int,
) -> tuple[jax.Array, jax.Array]:
    """Appends tokens to each row until eos, `max_new_tokens`, or a full buffer: (tokens (B, T), lengths (B,))."""
    rows, max_len = tokens_BT.shape
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))

    def not_finished(state):
        step, _, _, done_B = state
        return (step < max_new_tokens) & ~jnp.all(done_B)

    def append(state):
        step, tokens_BT, length_B, done_B = state
        batch = make_batch(tokens_BT, length_B)
        logits_BV = apply_logits(params, batch, length_B[:, None] - 1)[:, 0]
        # A row's draws depend on its own number and step only, not on the rows beside it.
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
        next_B = sample(logits_BV, keys_B, temperature, top_k)
        done_B = done_B | (next_B == eos_id)
        here = (batch["positions"] == length_B[:, None]) & ~done_B[:, None]
        tokens_BT = jnp.where(here, next_B[:, None], tokens_BT)
        length_B = length_B + (~done_B).astype(jnp.int32)
        return step + 1, tokens_BT, length_B, done_B | (length_B >= max_len)

    state = (jnp.int32(0), tokens_BT, length_B, length_B >= max_len)
    _, tokens_BT, length_B, _ = jax.lax.while_loop(not_finished, append, state)
    return tokens_BT, length_B


def generate(
    apply_logits: ApplyLogits,
    params: Params,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    max_len: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    eos_id: int = -1,
) -> list[np.ndarray]:
    """The continuation of each prompt: its new tokens only, int32, without the eos that ended it.

    apply_logits: see `make_apply_logits`; the same function object each time, or it is compiled again.
    prompts: token ids, each 1 to max_len of them (with bos in front if the model was trained so).
    max_len: the buffer: prompt and continuation together; at most the model's context.
    temperature: 0 is greedy. top_k: 0 samples from all tokens. eos_id: -1 never stops early.
    """
    tokens, lengths = pad_rows(prompts, max_len)
    tokens_BT, length_B = decode(
        params,
        tokens,
        lengths,
        np.int32(max_new_tokens),
        np.float32(temperature),
        np.uint32(seed),
        np.int32(eos_id),
        apply_logits=apply_logits,
        top_k=top_k,
    )
    written, ends = np.asarray(tokens_BT), np.asarray(length_B)
    return [row[start:end] for row, start, end in zip(written, lengths, ends, strict=True)]


@functools.partial(jax.jit, static_argnames=("apply_logits", "top_k"))
def rank_tokens(
    params: Params,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    positions_BM: jax.Array,
    *,
    apply_logits: ApplyLogits,
    top_k: int,
) -> tuple[jax.Array, jax.Array]:
    """(probabilities, ids), each (B, M, top_k), of the likeliest tokens at the given positions."""
    logits = apply_logits(params, make_batch(tokens_BT, length_B), positions_BM)
    return jax.lax.top_k(jax.nn.softmax(logits, axis=-1), top_k)


def fill_mask(
    apply_logits: ApplyLogits,
    params: Params,
    rows: Sequence[np.ndarray],
    *,
    mask_id: int,
    max_len: int,
    top_k: int = 5,
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """For each row, for each mask token in it from left to right: (ids (top_k,), their probabilities (top_k,))."""
    tokens, lengths = pad_rows(rows, max_len)
    places = [np.flatnonzero(np.asarray(row) == mask_id) for row in rows]
    most = max(len(p) for p in places)
    slots = 1 << max(most - 1, 0).bit_length()  # a power of two: few different shapes
    positions = np.zeros((len(rows), slots), np.int32)
    for slot, place in zip(positions, places, strict=True):
        slot[: len(place)] = place
    probs, ids = jax.device_get(
        rank_tokens(params, tokens, lengths, positions, apply_logits=apply_logits, top_k=top_k)
    )
    return [
        [(ids[row, slot], probs[row, slot]) for slot in range(len(place))]
        for row, place in enumerate(places)
    ]
