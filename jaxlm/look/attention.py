"""Attention maps: for one text, how much each head of each layer looks from each token at each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxlm.inference.batches import Batch, pad_batch
from jaxlm.inference.fill_mask import encode_masked, split_at_masks
from jaxlm.inference.internals import make_attention_reader
from jaxlm.inputs import encode_each, encode_prompts, encode_texts
from jaxlm.language_model import BadInput, LanguageModel
from jaxlm.models.encoder_decoder import ENCODER
from jaxlm.parallel.processes import fetch

# Where an attention stands in a model -> what its map is called.
NAMES = {
    "layers/attention": "self",
    "encoder/layers/attention": "encoder",
    "decoder/layers/attention": "decoder",
    "decoder/layers/cross_attention": "cross",
}
SIGNS = {"\n": "↵", "\t": "→", " ": "␣", "▁": "␣"}
MAX_LABELS = 40  # tokens that fit beside a map
COLUMNS = 4


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Who looks at whom in one stack of layers.

    name: 'self' of a decoder or an encoder; 'encoder', 'decoder' and 'cross' of an encoder-decoder.
    probs_LNTS: float32 in [0, 1]; layer, head, looking token, token looked at; sums to 1 over the last axis.
    queries, keys: the T and S tokens as text.
    """

    name: str
    probs_LNTS: np.ndarray
    queries: tuple[str, ...]
    keys: tuple[str, ...]


def attention_maps(lm: LanguageModel, text: str, target: str = "") -> list[AttentionMap]:
    """The maps of one text: one of a decoder or an encoder, three of an encoder-decoder.

    >>> lm = load(workdir)
    >>> (found,) = attention_maps(lm, "def f(x):")
    >>> found.name, found.probs_LNTS.shape, found.keys[:3]
    ('self', (2, 2, 9, 9), ('d', 'e', 'f'))

    Specials that stand around a text are among the tokens. [MASK] is an encoder's mask token. target: what the decoder of an
    encoder-decoder has written so far, after its start token. The probabilities are those of `attend_xla` without dropout;
    of layers with a window, or with relative positions, they are after both.

    Raises:
      BadInput: for text that is too long or unknown to the tokenizer.
    """
    if lm.family not in ROWS:
        raise BadInput(
            f"{lm.checkpoint} is of the family {lm.family}: attention maps are there for {', '.join(ROWS)}"
        )
    if target and lm.family != "encoder_decoder":
        raise BadInput(f"target={target!r}: only an encoder-decoder has one; leave it out")
    row, written = ROWS[lm.family](lm, text, target)
    batch: dict[str, Any] = one_row(row)
    if lm.writing.get("is_prefix_lm"):
        batch["is_prefix"] = batch["segment_ids"] > 0
    if written is not None:
        batch = {ENCODER + key: x for key, x in batch.items()} | one_row(written)
    found = fetch(lm.in_mesh(make_attention_reader(lm.model))(lm.params, batch))
    read, wrote = spell(lm, row), spell(lm, row if written is None else written)
    sides = {"encoder": (read, read), "cross": (wrote, read)}
    maps = []
    for path, name in NAMES.items():
        if path in found:
            queries, keys = sides.get(name, (wrote, wrote))
            maps.append(
                AttentionMap(name, found[path][:, 0, :, : len(queries), : len(keys)], queries, keys)
            )
    return maps


def read_text(lm: LanguageModel, text: str, target: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(the ids that a decoder reads, None)."""
    return encode_prompts(lm, [text])[0], None


def read_masked(lm: LanguageModel, text: str, target: str) -> tuple[np.ndarray, np.ndarray | None]:
    """([CLS] text [SEP] of an encoder, int32 (n,), None)."""
    (row,) = encode_each(
        lm,
        [text],
        lambda text: encode_masked(lm.tokenizer, text),
        most=lm.max_len,
        parts=lambda text: split_at_masks(lm.tokenizer, text),
    )
    return row, None


def read_both(lm: LanguageModel, text: str, target: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(what an encoder reads, the start token and the target)."""
    (ids,) = encode_texts(lm, [target], most=lm.max_len - 1, allow_any=True)
    written = np.concatenate([[lm.writing["start_id"]], ids]).astype(np.int32)
    return encode_prompts(lm, [text])[0], written


def read_all(lm: LanguageModel, text: str, target: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(the ids of a text, all of which XLNet's content stream sees, None)."""
    return encode_texts(lm, [text], most=lm.max_len)[0], None


ROWS = {
    "gpt": read_text,
    "bert": read_masked,
    "encoder_decoder": read_both,
    "xlnet": read_all,
}


def one_row(row: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of one row of ids (n,), as long as a power of two: a few programs serve texts of all lengths."""
    length = 1 << max(4, (len(row) - 1).bit_length())
    return pad_batch([row], Batch(np.array([0]), 1, length))


def spell(lm: LanguageModel, ids: Iterable[int]) -> tuple[str, ...]:
    """Each id as its text, with a sign for each blank; as its vocabulary spells it where that is no text of its own."""
    return tuple(_spell_one(lm.tokenizer, int(id)) for id in ids)


def _spell_one(tokenizer: Any, id: int) -> str:
    spelled, text = tokenizer.token(id), tokenizer.decode([id])
    # SentencePiece's mark of a space is not in the text of a token that stands alone.
    shown = spelled if not text or "\ufffd" in text or spelled.startswith("▁") else text
    return "".join(SIGNS.get(c, c if c.isprintable() else "·") for c in shown)


def draw_attention(found: AttentionMap, layer: int | None = None) -> Figure:
    """One layer's heads side by side, with their tokens; without `layer` all layers, a row of small maps each.

    Rows of a map look, columns are looked at. The colour scale is the square root's, from 0 to 1 in every map.

    Raises:
      IndexError: a layer that is not there.
    """
    layers, heads = found.probs_LNTS.shape[:2]
    if layer is None:
        return draw_maps(
            [(f"{i}.{n}", found.probs_LNTS[i, n]) for i in range(layers) for n in range(heads)],
            columns=heads,
            side=1.1,
            title=f"{found.name} attention, layer.head",
        )
    if not 0 <= layer < layers:
        raise IndexError(f"layer={layer}: expected 0 to {layers - 1}")
    labels = (found.queries, found.keys) if max(found.probs_LNTS.shape[2:]) <= MAX_LABELS else None
    return draw_maps(
        [(f"head {n}", found.probs_LNTS[layer, n]) for n in range(heads)],
        columns=min(heads, COLUMNS),
        side=max(2.0, 0.19 * len(found.queries) + 0.6),
        title=f"{found.name} attention, layer {layer}",
        labels=labels,
    )


def draw_maps(
    maps: Sequence[tuple[str, np.ndarray]],
    *,
    columns: int,
    side: float,
    title: str,
    labels: tuple[Sequence[str], Sequence[str]] | None = None,
) -> Figure:
    """Named maps (T, S) in a grid. side: of one of them, in inches. labels: of rows and columns, or none."""
    rows = math.ceil(len(maps) / columns)
    figure = Figure(figsize=(columns * side + 0.4, rows * side + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    style = {"fontsize": 7, "parse_math": False}
    for axes in grid.flat[len(maps) :]:
        axes.set_axis_off()
    for axes, (name, probs_TS) in zip(grid.flat, maps, strict=False):
        axes.imshow(np.sqrt(probs_TS), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(name, fontsize=8)
        queries, keys = labels or ((), ())
        axes.set_yticks(range(len(queries)), queries, **style)
        axes.set_xticks(range(len(keys)), keys, rotation=90, **style)
    figure.suptitle(title, fontsize="medium")
    return figure
