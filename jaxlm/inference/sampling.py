"""The next token from logits: greedy, or drawn after a temperature and filters.

    sampling = make_sampling(temperature=0.8, top_k=50)
    tokens_B = draw(logits_BV, keys_B, None, sampling)

Order and rules are those of transformers' `generate`: repetition penalty, temperature, top-k, top-p, min-p. Tokens as
likely as the last one that a filter keeps are kept, too (of such ties transformers' top-p drops some, by no rule).

On XLA:CPU a sort of (8, 50257) takes 150 ms and a random number for every logit 20 to 25 ms, beside a decoding step of
about 40 ms. So nothing here sorts: the value from which on tokens are kept is found by bisection (5 ms each for top-k
and top-p), and a token is drawn in two steps, its block and then itself, from 2 sqrt(V) random numbers (1.5 ms).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Sampling:
    """How tokens are drawn; made by `make_sampling`. None is 'off'.

    The values are arrays, so other values compile nothing. Which of them are off is the tree's structure: a program
    holds only the filters that are on.
    """

    temperature: np.float32
    top_k: np.int32 | None = None
    top_p: np.float32 | None = None
    min_p: np.float32 | None = None
    repetition_penalty: np.float32 | None = None

    @property
    def needs_seen(self) -> bool:
        """Whether `draw` needs to know which tokens were there before."""
        return self.repetition_penalty is not None


RANGES = {
    "temperature": "0 (greedy) or at least 1e-5",
    "top_k": "a whole number: 1 or more, or 0 (all tokens)",
    "top_p": "above 0 and at most 1 (all tokens)",
    "min_p": "0 (all tokens) to 1",
    "repetition_penalty": "above 0: 1 is none, more is less repetition",
}


def make_sampling(
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Sampling:
    """A `Sampling` of checked values.

    temperature: 0 is greedy, the likeliest token; the filters then change nothing. top_k: of the k likeliest tokens
    only; 0 is off. top_p: of the fewest tokens that have this probability together (arXiv:1904.09751, section 3.1); 1 is
    off. min_p: of tokens with at least min_p times the likeliest's probability (arXiv:2407.01082); 0 is off.
    repetition_penalty: logits of tokens that are there already, in the prompt or since, are divided by it if positive,
    else multiplied (arXiv:1909.05858, section 4.1); 1 is off.

    Raises ValueError, naming every value out of its range.
    """
    is_whole = isinstance(top_k, numbers.Integral)
    expected = [  # below a temperature of 1e-5 the division may overflow
        ("temperature", temperature, temperature == 0 or 1e-5 <= temperature < math.inf),
        ("top_k", top_k, is_whole and 0 <= top_k < 2**24),
        ("top_p", top_p, 0 < top_p <= 1),
        ("min_p", min_p, 0 <= min_p <= 1),
        ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < math.inf),
    ]
    wrong = [
        f"{name}={value!r}, expected {RANGES[name]}" for name, value, fits in expected if not fits
    ]
    if wrong:
        raise ValueError("sampling options out of range: " + "; ".join(wrong))
    return Sampling(
        temperature=np.float32(temperature),
        top_k=np.int32(top_k) if top_k else None,
        top_p=np.float32(top_p) if top_p < 1 else None,
        min_p=np.float32(min_p) if min_p else None,
        repetition_penalty=np.float32(repetition_penalty) if repetition_penalty != 1 else None,
    )


def draw(
    logits_BV: jax.Array, keys_B: jax.Array, seen_BV: jax.Array | None, sampling: Sampling
) -> jax.Array:
    """The next token of each row, int32 (B,). A row's draw depends on its own logits and key only.

    keys_B: a key for each row, used once. seen_BV: bool, which tokens are in the row's prompt or came since; it may be None
    unless `sampling.needs_seen`.
    """
    logits_BV = penalise(logits_BV.astype(jnp.float32), seen_BV, sampling)
    return jax.lax.cond(
        sampling.temperature > 0,
        lambda: choose(warp(logits_BV, sampling), keys_B),
        lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32),
    )


def penalise(logits_BV: jax.Array, seen_BV: jax.Array | None, sampling: Sampling) -> jax.Array:
    """The logits (B, V) with the repetition penalty, if it is on."""
    if sampling.repetition_penalty is None:
        return logits_BV
    if seen_BV is None:
        raise ValueError("repetition_penalty is on: expected seen_BV (B, V), found None")
    penalty = sampling.repetition_penalty
    penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, penalised_BV, logits_BV)


def warp(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """The float32 logits (B, V) at the temperature (above 0), -inf where a filter removes the token."""
    logits_BV = logits_BV / sampling.temperature
    for keep, bound in (
        (_in_top_k, sampling.top_k),
        (_in_top_p, sampling.top_p),
        (_has_min_p, sampling.min_p),
    ):
        if bound is not None:
            logits_BV = jnp.where(keep(logits_BV, bound), logits_BV, -jnp.inf)
    return logits_BV


def choose(logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """A token of each row drawn from softmax(logits), int32 (B,): first its block of about sqrt(V) tokens, then itself.

    P(token) = P(block) P(token | block) is exact, and takes 2 sqrt(V) random numbers instead of V.
    """
    rows, vocab = logits_BV.shape
    size = math.isqrt(vocab - 1) + 1
    spare = -vocab % size
    padded = jnp.pad(logits_BV, ((0, 0), (0, spare)), constant_values=-jnp.inf)
    blocks_BNS = padded.reshape(rows, -1, size)
    num_blocks = blocks_BNS.shape[1]
    # one call for both steps: its program compiles three times as fast as two draws with two keys
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (num_blocks + size,)))(keys_B)
    block_B = jnp.argmax(jax.nn.logsumexp(blocks_BNS, axis=-1) + noise[:, :num_blocks], axis=-1)
    block_BS = jnp.take_along_axis(blocks_BNS, block_B[:, None, None], axis=1)[:, 0]
    place_B = jnp.argmax(block_BS + noise[:, num_blocks:], axis=-1)
    return (block_B * size + place_B).astype(jnp.int32)


def _in_top_k(logits_BV: jax.Array, top_k: jax.Array) -> jax.Array:
    """As likely as the k-th likeliest: ties with it are kept, too."""
    # counted in float32, exact to 2**24 and three times as fast as in int32 (XLA:CPU)
    count = lambda kept_BV: kept_BV.sum(-1, dtype=jnp.float32)
    enough = lambda least_B: count(logits_BV >= least_B[:, None]) >= top_k
    return logits_BV >= _largest_value(logits_BV, enough)[:, None]


def _in_top_p(logits_BV: jax.Array, top_p: jax.Array) -> jax.Array:
    """In the smallest set with at least `top_p` of the probability; ties with its least likely are kept, too."""
    weights_BV = jnp.exp(logits_BV - logits_BV.max(-1, keepdims=True))
    wanted_B = top_p * weights_BV.sum(-1)
    weigh = lambda kept_BV: jnp.where(kept_BV, weights_BV, 0).sum(-1)
    enough = lambda least_B: weigh(logits_BV >= least_B[:, None]) >= wanted_B
    return logits_BV >= _largest_value(logits_BV, enough)[:, None]


def _has_min_p(logits_BV: jax.Array, min_p: jax.Array) -> jax.Array:
    return logits_BV - logits_BV.max(-1, keepdims=True) >= jnp.log(min_p)


def _largest_value(logits_BV: jax.Array, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest float32 (B,) for which `holds`, which is true up to one of the row's values and false above it.

    By bisection of the floats in their order, as uint32; -inf if it holds for none.
    """

    def halve(_, bounds):
        low_B, high_B = bounds
        middle_B = high_B - (high_B - low_B) // 2
        held_B = holds(_from_ordered(middle_B)) | (low_B == high_B)
        return jnp.where(held_B, middle_B, low_B), jnp.where(held_B, high_B, middle_B - 1)

    high_B = _to_ordered(logits_BV.max(-1))
    low_B = jnp.full_like(high_B, _to_ordered(jnp.float32(-jnp.inf)))
    return _from_ordered(jax.lax.fori_loop(0, 32, halve, (low_B, high_B))[0])


_SIGN = np.uint32(1 << 31)


def _to_ordered(x: jax.Array) -> jax.Array:
    """float32 -> uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)


def _from_ordered(n: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.where(n >= _SIGN, n ^ _SIGN, ~n), jnp.float32)
