"""What one does with a trained model, as functions: load, generate (and stream), fill_mask, embed, score.

    lm = load("W")                                     # or W@STEP, or hf:FOLDER_OR_HUB_ID
    generate(lm, ["def "], temperature=0)[0][0].text

Texts may be many and of any lengths: they are laid into batches of a few shapes, so a handful of programs is compiled and
memory does not grow with their number. What cannot be used (an empty prompt, one that is longer than the context, unknown
characters, a model without the head that is asked for) raises one BadInput that lists everything.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from jaxlm.inference import decode, scoring
from jaxlm.inference import embed as embedding
from jaxlm.inference import fill_mask as masks
from jaxlm.inference.batches import in_batches
from jaxlm.inference.beam import Beam, beam_search
from jaxlm.inference.sampling import Sampling, make_sampling
from jaxlm.inference.search import normalized
from jaxlm.inference.text import TextStream
from jaxlm.inputs import (
    FAMILIES,
    bos_of,
    check_counts,
    encode_masked_texts,
    encode_prompts,
    encode_texts,
    need_lm,
)
from jaxlm.language_model import BadInput, LanguageModel, load
from jaxlm.tasks.base import make_layout

__all__ = [
    "BadInput",
    "Candidate",
    "Generation",
    "LanguageModel",
    "Piece",
    "Score",
    "embed",
    "fill_mask",
    "generate",
    "load",
    "score",
    "stream",
]

Result = TypeVar("Result")
WRITERS = ("gpt", "encoder_decoder")  # families that write text


# --- generate ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Generation:
    """A continuation of a prompt.

    text: of the new tokens, cut before a stop string. tokens: (n,) int32. logprobs: (n,) float32, what the model itself
    gives them (temperature 1, no filters); empty where beams were searched. score: their sum; of a beam its score, by
    which beams are ranked. finish: 'eos', 'length' or 'stop'.
    """

    text: str
    tokens: np.ndarray
    logprobs: np.ndarray
    score: float
    finish: str


@dataclass(frozen=True)
class Piece:
    """What `stream` yields: more text, and (id, log-probability) of the tokens since the piece before.

    alternatives: for each of these tokens, the same of the likeliest ones at its place, the likeliest first.
    """

    text: str
    tokens: tuple[tuple[int, float], ...]
    finish: str = ""
    alternatives: tuple[tuple[tuple[int, float], ...], ...] = ()


def generate(
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    num_samples: int = 1,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 8,
) -> list[list[Generation]]:
    """`num_samples` continuations of each prompt by a decoder, or answers to it by an encoder-decoder.

    >>> lm = load(workdir)
    >>> [[greedy], [other]] = generate(lm, ["def ", "import"], temperature=0, max_new_tokens=5)
    >>> len(greedy.tokens), greedy.finish
    (5, 'length')
    >>> [[one, two]] = generate(lm, ["def "], num_samples=2, temperature=1.2, max_new_tokens=5)
    >>> [[best]] = generate(lm, ["def "], num_beams=4, max_new_tokens=5)
    >>> best.score < 0
    True

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off (see `make_sampling`). They are for
    sampling: with num_beams above 1 that many beams are searched for the `num_samples` best, where a length_penalty above
    0 prefers longer ones. stop: strings at which a continuation ends (not with beams).
    What is drawn depends on the seed, the prompt, and how many equal prompts come before it; not on the others.
    batch_size: continuations that are computed at once.

    Raises:
      BadInput: for a model that cannot generate, options out of range, and prompts that are empty (where there is no bos
        to begin with), longer than the context, or unknown to the tokenizer.
    """
    need_lm(lm, *WRITERS)
    check_counts(num_samples=num_samples, num_beams=num_beams, batch_size=batch_size)
    if num_beams > 1:
        if stop or num_samples > num_beams or not math.isfinite(length_penalty):
            raise BadInput(
                f"num_beams={num_beams}, num_samples={num_samples}, length_penalty={length_penalty}, stop={list(stop)}: "
                "expected at most num_beams samples, a finite penalty and no stop strings"
            )
        options = common_options(lm, max_new_tokens) | dict(
            num_beams=num_beams, length_penalty=length_penalty, num_return=num_samples
        )
        search = functools.partial(search_beams, lm, options, prepared(lm, beam_search))
        rows = encode_prompts(lm, prompts)
        run = lambda indices: search([rows[i] for i in indices])
        return in_batches(
            run, [len(row) for row in rows], lm.max_len, max(1, batch_size // num_beams)
        )
    sampling = checked(make_sampling, temperature, top_k, top_p, min_p, repetition_penalty)
    options = sampling_options(lm, max_new_tokens, sampling, stop, seed)
    rows = [ids for ids in encode_prompts(lm, prompts) for _ in range(num_samples)]
    draw = functools.partial(sample, lm, stop, options, prepared(lm, decode.generate))
    numbers = decode.number_samples(rows)
    run = lambda indices: draw([rows[i] for i in indices], [numbers[i] for i in indices])
    found = in_batches(run, [len(row) for row in rows], lm.max_len, batch_size)
    return [found[i : i + num_samples] for i in range(0, len(found), num_samples)]


def stream(
    lm: LanguageModel,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    alternatives: int = 0,
) -> Iterator[Piece]:
    """The continuation that `generate` gives, token by token.

    >>> lm = load(workdir)
    >>> pieces = list(stream(lm, "def ", seed=1, max_new_tokens=5, alternatives=3))
    >>> [[whole]] = generate(lm, ["def "], seed=1, max_new_tokens=5)
    >>> "".join(piece.text for piece in pieces) == whole.text
    True
    >>> pieces[-1].finish
    'length'
    >>> [[(likeliest, logprob), second, third]] = pieces[0].alternatives

    A piece may have no text yet: half a character, or what may become a stop string, waits for the tokens that follow.
    alternatives: how many of the likeliest tokens each piece tells beside its own.

    Raises:
      BadInput: as `generate` does, before the first piece.
    """
    need_lm(lm, *WRITERS)
    sampling = checked(make_sampling, temperature, top_k, top_p, min_p, repetition_penalty)
    if not 0 <= alternatives <= lm.num_tokens:
        raise BadInput(f"alternatives={alternatives}: expected 0 to {lm.num_tokens}, all tokens")
    options = sampling_options(lm, max_new_tokens, sampling, stop, seed)
    options |= dict(alternatives=alternatives)
    (ids,) = encode_prompts(lm, [prompt])
    return stream_pieces(lm, ids, stop, options)


def common_options(lm: LanguageModel, max_new_tokens: int) -> dict[str, Any]:
    """What every way of writing passes to the decoder. Raises BadInput for a count below 1."""
    check_counts(max_new_tokens=max_new_tokens)
    return dict(max_new_tokens=max_new_tokens, max_len=lm.max_len, eos_id=lm.end_id)


def sampling_options(
    lm: LanguageModel, max_new_tokens: int, sampling: Sampling, stop: Sequence[str], seed: int
) -> dict[str, Any]:
    """What sampling passes to the decoder, checked. seed: 0 to 2**32 - 1."""
    if not 0 <= seed < 2**32:
        raise BadInput(f"seed={seed}: expected 0 to 2**32 - 1")
    checked(TextStream, lm.tokenizer, stop)
    return common_options(lm, max_new_tokens) | dict(sampling=sampling, seed=seed)


def prepared(lm: LanguageModel, function: Callable[..., Result]) -> Callable[..., Result]:
    """A function of a decoder, its parameters and prompts, given the first two; once, for many batches."""
    decoder = decode.make_decoder(lm.model, lm.num_tokens, **lm.writing)
    params = lm.in_mesh(decoder.prepare)(lm.params)
    return lm.in_mesh(functools.partial(function, decoder, params))


def sample(
    lm: LanguageModel,
    stop: Sequence[str],
    options: dict[str, Any],
    run: Callable[..., list[decode.Continuation]],
    rows: Sequence[np.ndarray],
    numbers: Sequence[int],
) -> list[Generation]:
    """A continuation of each row of ids, int (n,), drawn by its number among equal ones."""
    texts = [Text(lm, row, stop) for row in rows]
    drawn = run(
        rows,
        **options,
        samples=numbers,
        stop=(lambda row, tokens: texts[row].stops(tokens)) if stop else None,
    )
    return [text.generation(found) for text, found in zip(texts, drawn, strict=True)]


def search_beams(
    lm: LanguageModel,
    options: dict[str, Any],
    run: Callable[..., list[list[Beam]]],
    rows: Sequence[np.ndarray],
) -> list[list[Generation]]:
    """The best continuations of each row of ids, int (n,)."""
    generations = []
    for row, beams in zip(rows, run(rows, **options), strict=True):
        room = options["max_new_tokens"]
        if lm.family == "gpt":
            room = min(room, lm.max_len - len(row))
        generations.append([ranked(lm, row, tokens, score, room) for tokens, score in beams])
    return generations


def ranked(
    lm: LanguageModel, prompt_ids: np.ndarray, tokens: np.ndarray, score: float, room: int
) -> Generation:
    """A beam as a generation. prompt_ids, tokens: int (n,). score: in nats. room: tokens that it could have had."""
    tokens, text = np.asarray(tokens, np.int32), Text(lm, prompt_ids, ())
    text.stops(tokens)
    finish = "length" if len(tokens) >= room else "eos"
    return Generation(text.finish(), tokens, np.empty(0, np.float32), float(score), finish)


def stream_pieces(
    lm: LanguageModel, prompt_ids: np.ndarray, stop: Sequence[str], options: dict[str, Any]
) -> Iterator[Piece]:
    """A prompt's continuation, a piece of text as soon as it is certain. prompt_ids: int (n,)."""
    text, shown = Text(lm, prompt_ids, stop), 0
    decoder = decode.make_decoder(lm.model, lm.num_tokens, **lm.writing)
    steps = decode.stream(
        decoder,
        lm.params,
        [prompt_ids],
        **options,
        stop=lambda row, tokens: text.stops(tokens),
    )
    advance = lm.in_mesh(lambda: next(steps, None))
    while (step := advance()) is not None:
        (new,) = step
        if new.finish:
            text.finish()
        tokens = pairs(new.tokens, new.logprobs)
        others = () if new.alternatives is None else tuple(map(pairs, *new.alternatives))
        yield Piece(text.written[shown:], tokens, new.finish, others)
        shown = len(text.written)


def pairs(ids: np.ndarray, logprobs: np.ndarray) -> tuple[tuple[int, float], ...]:
    """(id, log-probability in nats) of each candidate; ids, logprobs: (n,)."""
    return tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))


def checked(make: Callable[..., Result], *options: Any) -> Result:
    """What is made of the options; they are what a ValueError complains about."""
    try:
        return make(*options)
    except ValueError as error:
        raise BadInput(str(error)) from error


class Text:
    """The text of one continuation while its tokens come."""

    def __init__(self, lm: LanguageModel, prompt_ids: np.ndarray, stop: Sequence[str]):
        self.written, self.seen = "", 0
        before = (
            prompt_ids if lm.family == "gpt" else ()
        )  # an answer does not go on from the prompt
        self._stream = TextStream(lm.tokenizer, stop, before=before)

    def stops(self, tokens: np.ndarray) -> bool:
        """Takes what is new of all tokens so far; whether a stop string is complete."""
        self.written += self._stream.push(tokens[self.seen :])
        self.seen = len(tokens)
        return self._stream.stopped

    def finish(self) -> str:
        """The whole text: there are no more tokens."""
        self.written += self._stream.finish()
        return self.written

    def generation(self, found: decode.Continuation) -> Generation:
        """What the decoder found, as text that ends where a stop string begins."""
        self.stops(found.tokens)
        score = float(found.logprobs.sum(dtype=np.float64))
        return Generation(self.finish(), found.tokens, found.logprobs, score, found.finish)


# --- fill_mask --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A token for a masked place: its text, its id, and its probability."""

    token: str
    id: int
    probability: float


def fill_mask(
    lm: LanguageModel, texts: Sequence[str], top_k: int = 5
) -> list[list[list[Candidate]]]:
    """For each text, for each [MASK] in it, the `top_k` likeliest tokens by an encoder, the likeliest first.

    >>> lm = load(encoder)
    >>> [[one], [two, three]] = fill_mask(lm, ["import [MASK]", "def [MASK](self, [MASK]):"], top_k=3)
    >>> len(one), one[0].probability >= one[1].probability
    (3, True)

    The mask may also be written as the tokenizer spells it (<mask>).

    Raises:
      BadInput: for a model without a masked-token head, and texts without a mask, too long, or unknown to the tokenizer.
    """
    need_lm(lm, "bert")
    check_counts(top_k=top_k)
    rows = encode_masked_texts(lm, texts)
    filled = lm.in_mesh(masks.fill_mask)(
        lm.model,
        lm.params,
        rows,
        mask_id=lm.tokenizer.mask_id,
        num_ids=lm.num_tokens,
        max_len=lm.max_len,
        top_k=min(top_k, lm.num_tokens),
    )
    candidate = lambda i, p: Candidate(token_text(lm, int(i)), int(i), float(p))
    return [[list(map(candidate, *place)) for place in places] for places in filled]


def token_text(lm: LanguageModel, id: int) -> str:
    """A token as text; as the vocabulary spells it where it is a special one, a space, or a part of a character."""
    text = lm.tokenizer.decode([id]).strip()
    return text if text and "\ufffd" not in text else lm.tokenizer.token(id)


# --- embed ------------------------------------------------------------------------------------------------------------

# What the option is called -> where an encoder and a decoder are read (`embedding.POOLINGS`).
POOLINGS = {"mean": {"bert": "mean", "gpt": "mean"}, "cls": {"bert": "first", "gpt": "last"}}


def embed(
    lm: LanguageModel, texts: Sequence[str], pooling: str = "", normalize: bool = True
) -> np.ndarray:
    """A vector for each text: float32 (n, D), of length 1 if `normalize`.

    >>> lm = load(encoder)
    >>> vectors = embed(lm, ["one text", "another", "one text"])
    >>> vectors.shape, bool(vectors[0] @ vectors[2] > 0.999)
    ((3, 16), True)

    pooling: 'mean' of the last layer's states, specials included, or 'cls': of [CLS]; of a decoder its <eos> at the end. ''
      is what the model was fine-tuned with, else 'mean'.

    Raises:
      BadInput: for texts that are longer than the context, or an unknown pooling.
    """
    rows, where = rows_to_embed(lm, texts, pooling)
    vectors = lm.in_mesh(embedding.embed)(
        lm.model, lm.params, rows, pooling=where, max_len=lm.max_len
    )
    return normalized(vectors) if normalize else vectors


def rows_to_embed(
    lm: LanguageModel, texts: Sequence[str], pooling: str, *, cut: bool = False
) -> tuple[list[np.ndarray], str]:
    """(the ids of each text with what stands around it, (n,) int32; where they are read, of `embedding.POOLINGS`).

    cut: texts that are too long lose their ends; else they are refused.
    """
    if lm.family not in ("gpt", "bert"):
        raise BadInput(f"{lm.checkpoint} is {FAMILIES.get(lm.family, lm.family)}")
    pooling = pooling or lm.pooling or "mean"
    if pooling not in POOLINGS:
        raise BadInput(f"pooling={pooling!r}: use one of {', '.join(POOLINGS)}")
    layout = make_layout(
        lm.tokenizer,
        lm.max_len,
        causal=lm.family == "gpt",
        num_token_types=lm.model.config.num_token_types,
    )
    encoded = encode_texts(lm, texts, most=0 if cut else layout.room(1), allow_any=True)
    return [layout.lay(ids).tokens for ids in encoded], POOLINGS[pooling][lm.family]


# --- score ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How likely a text is: the sum of its tokens' log-probabilities (nats), their number, and its UTF-8 bytes.

    Of an encoder it is the pseudo-log-likelihood: each token's probability when it alone is masked (arXiv:1910.14659).
    """

    logprob: float
    num_tokens: int
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits for each UTF-8 byte of the text."""
        return -self.logprob / math.log(2) / self.num_bytes


def score(lm: LanguageModel, texts: Sequence[str]) -> list[Score]:
    """How likely each text is, from its first token on (after bos), without an end.

    >>> lm = load(workdir)
    >>> [short, long] = score(lm, ["def f(x):", "def f(x):" * 9])
    >>> short.num_bytes, short.num_tokens, long.num_tokens, short.bits_per_byte > 0
    (9, 9, 81, True)

    A decoder reads a text longer than its context in windows that overlap by half, and counts every token once.

    Raises:
      BadInput: for a model that predicts no tokens; texts that are empty, unknown to the tokenizer, or too long (encoder).
    """
    need_lm(lm, "gpt", "bert")
    scorer = scoring.make_scorer(lm.model, lm.num_ids)
    t = lm.tokenizer
    if lm.family == "bert":
        encoded = encode_texts(lm, texts, most=lm.max_len - 2)
        rows = [np.concatenate([[t.cls_id], ids, [t.sep_id]]).astype(np.int32) for ids in encoded]
        scored = lm.in_mesh(scoring.pseudo_logprobs)(
            scorer,
            lm.params,
            rows,
            mask_id=t.mask_id,
            special_ids=t.special_ids,
            max_len=lm.max_len,
        )
    else:
        encoded = encode_texts(lm, texts)
        if not (start := lm.prefix or bos_of(lm)):
            raise BadInput(f"{lm.checkpoint} has no token to begin a text with")
        score_pairs = functools.partial(
            scoring.token_logprobs, scorer, lm.params, max_len=lm.max_len
        )
        scored = lm.in_mesh(scoring.rolling)(
            score_pairs,
            [np.concatenate([start, ids]).astype(np.int32) for ids in encoded],
            window=lm.max_len,
            stride=max(1, lm.max_len // 2),
        )
    return [
        Score(found.total, len(found.logprobs), len(text.encode()))
        for text, found in zip(texts, scored, strict=True)
    ]
