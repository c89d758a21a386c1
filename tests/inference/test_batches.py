"""How rows of many lengths become batches of few shapes."""

import numpy as np
import pytest

from jaxlm.inference.batches import Batch, in_batches, pad_batch, plan_batches, round_up


def check_plan(plan):
    """Every row is in one batch that holds it, and a thousand rows of all lengths have few shapes."""
    lengths = np.random.default_rng(0).integers(1, 257, 1003)
    batches = plan(lengths, 256, 8)
    assert sorted(np.concatenate([b.indices for b in batches])) == list(range(1003))
    assert all(lengths[b.indices].max() <= b.length <= 256 for b in batches)
    assert all(len(b.indices) <= b.rows <= 8 for b in batches)
    assert len({(b.rows, b.length) for b in batches}) <= 6  # 16, 32, 64, 128, 256 and the last one
    assert (
        lengths[batches[0].indices[0]] == lengths.max()
    )  # what does not fit the memory fails at once


def test_rows_of_all_lengths_need_few_shapes():
    check_plan(plan_batches)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b._replace(indices=b.indices[1:]),
        lambda b: b._replace(length=b.length // 2),
        lambda b: b._replace(length=min(256, b.length + int(b.indices[0]) % 7)),
    ],
    ids=["a row is lost", "too short", "many shapes"],
)
def test_the_check_of_plans_fails(change):
    with pytest.raises(AssertionError):
        check_plan(lambda *options: [change(b) for b in plan_batches(*options)])


def test_lengths_are_rounded_up_to_powers_of_two():
    assert [round_up(n, 100) for n in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]


def test_padding_is_of_segment_0_whole_rows_too():
    rows = [np.array([5, 6, 7], np.int32), np.array([8], np.int32)]
    batch = pad_batch(rows, Batch(np.array([1, 0]), 4, 4))
    assert batch["tokens"].tolist() == [[8, 0, 0, 0], [5, 6, 7, 0], [0] * 4, [0] * 4]
    assert batch["segment_ids"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [0] * 4, [0] * 4]
    assert batch["positions"].tolist() == [[0, 1, 2, 3]] * 4


def test_results_come_in_the_order_of_the_rows_and_a_batch_is_filled_with_its_last_row():
    lengths, asked = [3, 99, 40, 1, 20, 7, 8], []
    assert (
        in_batches(lambda rows: asked.append(rows) or [lengths[i] for i in rows], lengths, 128, 4)
        == lengths
    )
    assert asked == [[1, 2, 4, 6], [5, 0, 3, 3]]
    with pytest.raises(ValueError, match="shorter"):  # a result is missing
        in_batches(lambda rows: rows[1:], lengths, 128, 4)
