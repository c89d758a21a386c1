"""What tests of tasks with several slots share: records, batches, and a head that needs no model."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.data.examples import Examples, Shapes, lay_out
from jaxlm.tasks.base import make_layout
from jaxlm.tokenizers import make_tokenizer

TOKENIZER = make_tokenizer("bytes", num_sentinels=0)


class Row(NamedTuple):
    """A record as tasks see it."""

    fields: dict[str, Any]
    source: str = "rows.csv"
    line: int = 7


def layout(seq_len: int = 64, **changes):
    return make_layout(TOKENIZER, seq_len, **dict(causal=False, num_token_types=2) | changes)


def make_task(task, seq_len: int = 64, **options):
    return task(TOKENIZER, layout(seq_len), task.infer([], **options), **options)


def make_batch(features, *, packed: bool, slots: int = 0, length: int = 64, extra_rows: int = 0):
    """All features in one batch. slots, extra_rows: of a row and of the batch, more than needed leaves some empty."""
    examples = Examples(features)
    if packed:
        row_slots = slots or int(examples.slots.sum())
        rows = tuple(range(1 + extra_rows, len(features) + 1 + extra_rows))
    else:
        row_slots, rows = slots or int(examples.slots.max()), (len(features) + extra_rows,)
    shapes = Shapes(packed, (length,), rows, row_slots)
    batch, places = lay_out(examples, list(range(len(features))), shapes)
    return batch, places


def read(batch, width: int):
    """Outputs whose head_logits (B, E, width) are a fixed random function of each slot's own tokens, 0 if it has none."""
    table = np.random.default_rng(0).normal(size=(TOKENIZER.vocab_size, width))
    segment_ids, tokens = np.asarray(batch["segment_ids"]), np.asarray(batch["tokens"])
    logits = np.zeros((*batch["example_ids"].shape, width), np.float32)
    for row, slot in np.ndindex(*logits.shape[:2]):
        own = tokens[row][segment_ids[row] == slot + 1]
        logits[row, slot] = table[own].sum(0)
    return SimpleNamespace(head_logits=logits)


def loss_of(task, outputs, batch):
    """The task's loss, compiled whole: its operations one by one would take a compilation each."""
    wrap = lambda logits, batch: task.loss(SimpleNamespace(head_logits=logits), batch)
    return jax.jit(wrap)(outputs.head_logits, batch)
