"""Text from a decoder: its prompts are read at once, then every new token costs one position's work.

    decoder = make_decoder(model, tokenizer.vocab_size)
    for continuation in generate(decoder, params, prompts, max_new_tokens=100, max_len=1024, sampling=make_sampling()):
        print(tokenizer.decode(continuation.tokens))

Of an encoder-decoder a prompt is what its encoder reads, once; what follows is what its decoder writes from `start_id` on.

Lengths are rounded up to powers of two, so that a fixed few programs serve all of them; nothing else compiles.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.inference.batches import LEAST, next_power, round_up
from jaxlm.inference.logits import unembed
from jaxlm.inference.sampling import Sampling, draw
from jaxlm.models.cache import KVCache, grow, make_cache
from jaxlm.models.encoder_decoder import EncoderDecoder
from jaxlm.models.gpt import GPT
from jaxlm.parallel.processes import fetch

Params = Any
Stop = Callable[[int, np.ndarray], bool]


class Continuation(NamedTuple):
    """What was added to a prompt.

    tokens: (n,) int32, without the eos that ended them. logprobs: (n,) float32, each token's log-probability by the model
    itself, before temperature and filters. finish: 'eos', 'length' (enough tokens, or the context is full), 'stop', or
    '' if it goes on. alternatives: the k likeliest at each place, (ids (n, k) int32, log-probabilities (n, k) float32),
    the likeliest first; None if none were asked for.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    finish: str
    alternatives: tuple[np.ndarray, np.ndarray] | None = None


class Decoder:
    """The compiled parts of a model that continues text; made by `make_decoder`, so that they are compiled once.

    prefill(params, tokens_BP, segment_ids_BP, size=S) -> (logits_BV, cache): reads prompts, padded on the left with segment
    0, and makes room for S tokens in all. step(params, cache, tokens_B) -> (logits_BV, cache): reads one more token of each
    row; the cache that it was given is used up. Logits are float32, of the token that comes next, for `num_ids` ids.

    params are the model's. What `prepare` makes of them gives the same, faster where it pays.
    is_prefix_lm: see `make_decoder`.
    """

    def __init__(self, model: Any, num_ids: int, is_prefix_lm: bool = False):
        self.num_ids, self.is_unrolled = num_ids, jax.default_backend() == "cpu"
        self.is_prefix_lm = is_prefix_lm
        self.must_end = False
        self.model = unrolled(model) if self.is_unrolled else model
        self.prefill = jax.jit(self._prefill, static_argnames="size")
        self.step = jax.jit(self._step, donate_argnames="cache")
        self.extend = jax.jit(self._extend, donate_argnames="state")

    def prepare(self, params: Params) -> Params:
        """The same parameters, those of each layer in arrays of their own; on accelerators, as they are.

        XLA:CPU has no views: of stacked ones it copies each layer's out before every use.
        """
        if not self.is_unrolled or isinstance(self._stack(params)["layers"], tuple):
            return params
        return self._with_stack(params, unstack_layers(self._stack(params)))

    def _stack(self, params):
        """The part of the parameters that holds the layers which every step runs."""
        return params

    def _with_stack(self, params, stack):
        return stack

    def lay(
        self, prompts: Sequence[np.ndarray], max_new_tokens: int, max_len: int
    ) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
        """(tokens, segment_ids) of `prefill`, the size of its cache, and how many tokens may follow each prompt (B,)."""
        lengths = np.array([len(prompt) for prompt in prompts])
        limit_B = np.minimum(max_new_tokens, max_len - lengths).astype(np.int32)
        tokens_BP, segment_ids_BP = pad_left(prompts, round_up(int(lengths.max()), max_len))
        size = round_up(tokens_BP.shape[1] + int(limit_B.max()), 2 * max_len)
        return tokens_BP, segment_ids_BP, size, limit_B

    def find_seen(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        """Which ids a repetition penalty takes for repeated before anything is written, bool (B, V)."""
        seen_BV = np.zeros((len(prompts), self.num_ids), bool)
        for seen, prompt in zip(seen_BV, prompts, strict=True):
            seen[prompt] = True
        return seen_BV

    def _prefill(self, params, tokens_BP, segment_ids_BP, size):
        cache = make_cache(self.model.config, *tokens_BP.shape)
        batch = {"tokens": tokens_BP, "segment_ids": segment_ids_BP}
        if self.is_prefix_lm:
            batch["is_prefix"] = segment_ids_BP > 0
        logits_BV, cache = self._read(params, cache, batch)
        return logits_BV, grow(cache, size)

    def _step(self, params, cache, tokens_B):
        batch = {"tokens": tokens_B[:, None], "segment_ids": jnp.ones_like(tokens_B)[:, None]}
        return self._read(params, cache, batch)

    def _read(self, params, cache, batch):
        variables = {"params": self._with_stack(params, stack_layers(self._stack(params)))}
        outputs = self.model.apply(variables, batch, cache=cache)
        return unembed(outputs, outputs.hidden[:, -1:], self.num_ids)[:, 0], outputs.cache

    def _extend(self, params, state, sampling, eos_id, steps):
        """Up to `steps` more tokens in each row, as long as one wants some."""

        def wants_more(loop):
            made, state = loop
            return (made < steps) & ~jnp.all(state.done_B)

        def add(loop):
            made, state = loop
            logits_BV, cache = self._step(params, state.cache, state.last_B)
            return made + 1, add_tokens(state.replace(cache=cache), logits_BV, sampling, eos_id)

        return jax.lax.while_loop(wants_more, add, (jnp.int32(0), state))[1]


class SourceDecoder(Decoder):
    """Of an encoder-decoder: `prefill` reads prompts, padded on the right, with the encoder, and start_id with the decoder.

    first_id, must_end: see `make_decoder`.
    """

    def __init__(self, model: Any, num_ids: int, start_id: int, first_id: int, must_end: bool):
        super().__init__(model, num_ids)
        self.start_id, self.first_id, self.must_end = start_id, first_id, must_end

    def _stack(self, params):
        return params["decoder"]

    def _with_stack(self, params, stack):
        return {**params, "decoder": stack}

    def lay(self, prompts, max_new_tokens, max_len):
        """As Decoder's. A prompt takes no room from what follows; learned positions are as many as the model has."""
        config, length = self.model.config, round_up(max(map(len, prompts)), max_len)
        most = config.max_len if config.position == "learned" else max_new_tokens
        limit = min(max_new_tokens, most)
        size = max(LEAST, next_power(limit))
        return *pad_right(prompts, length), size, np.full(len(prompts), limit, np.int32)

    def find_seen(self, prompts):
        """The decoder reads nothing of the prompt itself."""
        return super().find_seen([np.array([self.start_id])] * len(prompts))

    def _prefill(self, params, tokens_BP, segment_ids_BP, size):
        rows, source_len = tokens_BP.shape
        cache = make_cache(self.model.config, rows, size, source_len)
        batch = {
            "encoder_tokens": tokens_BP,
            "encoder_segment_ids": segment_ids_BP,
            "tokens": jnp.full((rows, 1), self.start_id, jnp.int32),
            "segment_ids": jnp.ones((rows, 1), jnp.int32),
        }
        logits_BV, cache = self._read(params, cache, batch)
        if self.first_id >= 0:
            logits_BV = jnp.where(jnp.arange(self.num_ids)[None] == self.first_id, 0.0, -jnp.inf)
            logits_BV = jnp.broadcast_to(logits_BV, (rows, self.num_ids))
        return logits_BV, cache


def unrolled(model: Any) -> Any:
    """The model with a loop over its layers that is written out, which is faster a token."""
    return model.clone(config=dataclasses.replace(model.config, unroll=0))


@jax.jit
def unstack_layers(params: Params) -> Params:
    """`layers`, whose arrays are (L, …), as a tuple of L trees."""
    length = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = tuple(jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(length))
    return {**params, "layers": layers}


def stack_layers(params: Params) -> Params:
    """The reverse; within a program with unrolled layers it costs nothing, since XLA sees where each slice comes from."""
    if not isinstance(params["layers"], tuple):
        return params
    return {**params, "layers": jax.tree.map(lambda *x: jnp.stack(x), *params["layers"])}


@functools.lru_cache(maxsize=16)
def make_decoder(
    model: Any,
    num_ids: int | None = None,
    *,
    is_prefix_lm: bool = False,
    start_id: int = 0,
    first_id: int = -1,
    must_end: bool = False,
) -> Decoder:
    """The decoder of a Linen model; the same one each time.

    num_ids: the tokenizer's; ids past it, of a padded vocabulary, are never drawn. None = all.
    is_prefix_lm: the tokens of a prompt see one another, as those of a prefix did in training (`objectives.prefix_lm`).
    Of an encoder-decoder: start_id is what its decoder reads first; first_id, what it then writes whatever it thinks, -1:
    what it likes; must_end: the last of the tokens that it may write is eos, if none was before.

    Raises:
      ValueError: if the model writes no text, or predicts classes instead of tokens.
    """
    if not isinstance(model, GPT | EncoderDecoder):
        raise ValueError(
            f"{type(model).__name__} writes no text: take a decoder (GPT) or an encoder-decoder"
        )
    if model.head is not None:
        raise ValueError(f"this model has a head for {model.head}: text takes one without a head")
    num_ids = num_ids or model.config.vocab_size
    if isinstance(model, EncoderDecoder):
        return SourceDecoder(model, num_ids, start_id, first_id, must_end)
    return Decoder(model, num_ids, is_prefix_lm)


@flax.struct.dataclass
class State:
    """A batch of continuations under way: N is room for new tokens, of which the first `made` columns are there.

    count_B: of those, how many are the row's own: it may have ended. limit_B: how many it may have. ended_B: by eos.
    likeliest: the ids (B, N, k) and log-probabilities of the k likeliest tokens at each column; None: not wanted.
    """

    cache: KVCache
    tokens_BN: jax.Array
    logprobs_BN: jax.Array
    made: jax.Array
    count_B: jax.Array
    limit_B: jax.Array
    ended_B: jax.Array
    keys_B: jax.Array
    seen_BV: jax.Array | None
    likeliest: tuple[jax.Array, jax.Array] | None

    @property
    def done_B(self) -> jax.Array:
        """bool (B,): rows that have ended, or are as long as they may be."""
        return self.ended_B | (self.count_B >= self.limit_B)

    @property
    def last_B(self) -> jax.Array:
        """int32 (B,): the tokens made last."""
        return self.tokens_BN[:, self.made - 1]


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="alternatives")
def begin(
    cache: KVCache,
    logits_BV: jax.Array,
    limit_B: jax.Array,
    samples_B: jax.Array,
    seed: jax.Array,
    seen_BV: jax.Array | None,
    sampling: Sampling,
    eos_id: jax.Array,
    alternatives: int = 0,
) -> State:
    """The state after the first new token, which is drawn from what the prompts give. seed, eos_id: int ()."""
    rows, size = cache.segment_ids.shape
    shape = rows, size, alternatives
    likeliest = (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
    state = State(
        cache=cache,
        tokens_BN=jnp.zeros((rows, size), jnp.int32),
        logprobs_BN=jnp.zeros((rows, size), jnp.float32),
        made=jnp.int32(0),
        count_B=jnp.zeros(rows, jnp.int32),
        limit_B=limit_B,
        ended_B=jnp.zeros(rows, bool),
        keys_B=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), samples_B),
        seen_BV=seen_BV,
        likeliest=likeliest if alternatives else None,
    )
    return add_tokens(state, logits_BV, sampling, eos_id)


def add_tokens(state: State, logits_BV: jax.Array, sampling: Sampling, eos_id: jax.Array) -> State:
    """Draws the next column, (B,); what a finished row draws is not counted.

    A row's draws depend on its own sample number and the step only, not on the rows beside it.
    """
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.made)
    tokens_B = draw(logits_BV, keys_B, state.seen_BV, sampling)
    own_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=1)[:, 0]
    total_B = jax.nn.logsumexp(logits_BV, axis=-1)
    put = lambda x_BN, x_B: jax.lax.dynamic_update_slice_in_dim(x_BN, x_B[:, None], state.made, 1)
    ended_B = state.ended_B | (~state.done_B & (tokens_B == eos_id))
    goes_on_B = ~state.done_B & ~ended_B
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(tokens_B)), tokens_B].set(True)
    likeliest = state.likeliest
    if likeliest is not None:
        ids_BNk, logprobs_BNk = likeliest
        top_Bk, ids_Bk = jax.lax.top_k(logits_BV, ids_BNk.shape[-1])
        likeliest = put(ids_BNk, ids_Bk), put(logprobs_BNk, top_Bk - total_B[:, None])
    return state.replace(
        tokens_BN=put(state.tokens_BN, tokens_B),
        logprobs_BN=put(state.logprobs_BN, own_B - total_B),
        made=state.made + 1,
        count_B=state.count_B + goes_on_B,
        ended_B=ended_B,
        seen_BV=seen_BV,
        likeliest=likeliest,
    )


def generate(
    decoder: Decoder, params: Params, prompts: Sequence[np.ndarray], **options: Any
) -> list[Continuation]:
    """The continuation of each prompt, int (n,). The options are those of `stream`, whose pieces it joins."""
    options = {"chunk": 16 if options.get("stop") else None} | options
    pieces = list(stream(decoder, params, prompts, **options))
    return [join_pieces(row) for row in zip(*pieces, strict=True)]


def join_pieces(pieces: Sequence[Continuation]) -> Continuation:
    """The pieces of a streamed continuation as one."""
    tokens, logprobs, finish, alternatives = zip(*pieces, strict=True)
    join = lambda arrays: np.concatenate(list(arrays))
    likeliest = None if None in alternatives else tuple(map(join, zip(*alternatives, strict=True)))
    return Continuation(join(tokens), join(logprobs), finish[-1], likeliest)


def stream(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    max_len: int,
    sampling: Sampling,
    seed: int = 0,
    samples: Sequence[int] | None = None,
    eos_id: int = -1,
    stop: Stop | None = None,
    chunk: int | None = 1,
    alternatives: int = 0,
) -> Iterator[list[Continuation]]:
    """Yields, after the first token and after every `chunk` more (None: all), what is new in each row.

    prompts: token ids, each 1 to max_len of them (with bos in front if the model was trained so).
    max_len: the context; a prompt and its continuation together have at most that many tokens.
    samples: a row draws by the seed and its number here; by default equal prompts are numbered from 0.
    eos_id: -1 never ends early. stop(row, tokens (n,)): whether a row ends with its n-th new token; asked on the host for
    every n, between chunks.
    alternatives: how many of the likeliest tokens at each place are told, too; another number compiles again.

    Raises:
      ValueError: if a prompt is empty, longer than max_len or has unknown ids, listing all such rows.
    """
    params = decoder.prepare(params)
    logits_BV, cache, limit_B = read_prompts(decoder, params, prompts, max_new_tokens, max_len)
    if decoder.must_end:  # the last one is eos, which is not among the tokens of a continuation
        limit_B = limit_B - 1
    samples_B = np.asarray(number_samples(prompts) if samples is None else samples, np.int32)
    seen_BV = decoder.find_seen(prompts) if sampling.needs_seen else None
    eos = np.int32(eos_id)

    draws = samples_B, np.uint32(seed), seen_BV, sampling
    state = begin(cache, logits_BV, limit_B, *draws, eos, alternatives)
    shown = np.zeros(len(prompts), int)
    stopped = np.zeros(len(prompts), bool)
    while True:
        pieces = new_pieces(state, shown, stopped, stop)
        yield pieces
        if all(piece.finish for piece in pieces):
            return
        if stopped.any():  # their rows need no more tokens
            state = state.replace(limit_B=np.where(stopped, 0, limit_B).astype(np.int32))
        steps = np.int32(chunk or max_new_tokens)
        state = decoder.extend(params, state, sampling, eos, steps)


def new_pieces(
    state: State, shown: np.ndarray, stopped: np.ndarray, stop: Stop | None
) -> list[Continuation]:
    """What each row has made since `shown` tokens; `shown` (B,) and `stopped` (B,) are brought up to date.

    Pieces are copies: on a CPU the arrays are views of the state's own memory, which `extend` uses again.
    """
    tokens_BN, logprobs_BN, likeliest, count_B, limit_B, ended_B = fetch(
        (state.tokens_BN, state.logprobs_BN, state.likeliest)
        + (state.count_B, state.limit_B, state.ended_B)
    )
    pieces = []
    for row, (start, end) in enumerate(zip(shown, count_B, strict=True)):
        if stopped[row]:
            end = start
        elif stop is not None:
            for n in range(start + 1, end + 1):
                if stop(row, tokens_BN[row, :n]):
                    stopped[row], end = True, n
                    break
        finish = "stop" if stopped[row] else "eos" if ended_B[row] else "length"
        is_done = stopped[row] or ended_B[row] or end >= limit_B[row]
        new = row, slice(start, end)
        copy = lambda array, new=new: array[new].copy()
        alternatives = None if likeliest is None else tuple(map(copy, likeliest))
        finish = finish if is_done else ""
        pieces.append(Continuation(copy(tokens_BN), copy(logprobs_BN), finish, alternatives))
        shown[row] = end
    return pieces


def read_prompts(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    max_len: int,
) -> tuple[jax.Array, KVCache, np.ndarray]:
    """(logits (B, V) of what follows, a cache with room for that, how many tokens may follow each prompt (B,)).

    Raises:
      ValueError: as `stream` does.
    """
    check_prompts(decoder, prompts, max_new_tokens, max_len)
    tokens_BP, segment_ids_BP, size, limit_B = decoder.lay(prompts, max_new_tokens, max_len)
    return *decoder.prefill(params, tokens_BP, segment_ids_BP, size=size), limit_B


def pad_left(prompts: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segment_ids), each (B, length): the last n of a row of n tokens are real."""
    return pad(prompts, length, lambda count: slice(length - count, length))


def pad_right(prompts: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segment_ids), each (B, length): the first n of a row of n tokens are real."""
    return pad(prompts, length, slice)


def pad(
    prompts: Sequence[np.ndarray], length: int, place: Callable[[int], slice]
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segment_ids), int32 (B, length), 0 around each prompt. place: where one of n tokens lies."""
    tokens_BP = np.zeros((len(prompts), length), np.int32)
    segment_ids_BP = np.zeros_like(tokens_BP)
    for tokens, segment_ids, prompt in zip(tokens_BP, segment_ids_BP, prompts, strict=True):
        tokens[place(len(prompt))] = prompt
        segment_ids[place(len(prompt))] = 1
    return tokens_BP, segment_ids_BP


def number_samples(prompts: Sequence[np.ndarray]) -> list[int]:
    """For each prompt, int (n,), how many equal ones come before it."""
    counts: Counter[tuple[int, ...]] = Counter()
    numbers = []
    for prompt in prompts:
        key = tuple(np.asarray(prompt).tolist())
        numbers.append(counts[key])
        counts[key] += 1
    return numbers


def check_prompts(
    decoder: Decoder, prompts: Sequence[np.ndarray], max_new_tokens: int, max_len: int
) -> None:
    """Raises ValueError with all that is wrong. prompts: int (n,) each, 1 <= n <= max_len."""
    config, problems = decoder.model.config, []
    if config.position == "learned" and max_len > config.max_len:
        problems.append(f"max_len={max_len}: the model has {config.max_len} positions")
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens={max_new_tokens}: at least 1")
    if not len(prompts):
        problems.append("no prompts given")
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= max_len:
            problems.append(f"row {row} has {len(prompt)} tokens: 1 to max_len={max_len}")
        elif unknown := sorted({int(i) for i in prompt if not 0 <= i < decoder.num_ids}):
            problems.append(f"row {row} has ids {unknown}: 0 to {decoder.num_ids - 1}")
    if problems:
        raise ValueError("cannot generate:\n" + "\n".join(f"  - {p}" for p in problems))
