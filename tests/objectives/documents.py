"""Windows of random documents, and what a row of a pair should give back of them."""

import numpy as np
from hypothesis import strategies as st

from jaxlm.objectives.tables import positions_of

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=12)


def window_of(make_example, rng, lengths, size, skip=0):
    """The tokens [skip, skip + size) of documents of these lengths, as a window of a store gives them."""
    example = make_example(rng, lengths)
    return counted({key: value[skip : skip + size] for key, value in example.items()})


def counted(part):
    """A stretch of an example whose segments count from 1, and places from its own start."""
    segment_ids = part["segment_ids"] - part["segment_ids"][0] + 1
    return {**part, "segment_ids": segment_ids, "positions": positions_of(segment_ids)}


def many_windows(make_example, size, documents=10_000, low=5, high=101):
    """All full windows of so many documents of `low` to `high` - 1 tokens, one after the other."""
    rng = np.random.default_rng(0)
    example = make_example(rng, rng.integers(low, high, documents))
    for start in range(0, len(example["tokens"]) - size, size):
        yield counted({key: value[start : start + size] for key, value in example.items()})


def documents_of(tokens, segment_ids, skip=()):
    """{segment: its tokens}, without padding and without the ids of `skip`."""
    return {
        int(segment): [t for t in tokens[segment_ids == segment].tolist() if t not in skip]
        for segment in np.unique(segment_ids[segment_ids > 0])
    }


def check_decoder_row(row, start_id):
    """The decoder reads its start and then its labels, segment by segment; both sides count places from 0."""
    for segment in np.unique(row["segment_ids"][row["segment_ids"] > 0]):
        here = row["segment_ids"] == segment
        labels, tokens = row["labels"][here], row["tokens"][here]
        assert tokens.tolist() == [start_id, *labels[:-1].tolist()]
        assert row["positions"][here].tolist() == list(range(here.sum()))
    for segment in np.unique(row["encoder_segment_ids"][row["encoder_segment_ids"] > 0]):
        here = row["encoder_segment_ids"] == segment
        assert row["encoder_positions"][here].tolist() == list(range(here.sum()))
    assert row["weights"].tolist() == (row["segment_ids"] > 0).tolist()
