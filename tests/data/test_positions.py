"""The batch of a step, where rewinds have left batches out."""

import random

import pytest

from jaxlm.data.positions import (
    Rewind,
    StepBatches,
    plan_rewind,
    position,
    read_rewinds,
    write_rewinds,
)


def steps(rewinds, start, stop):
    return [position(step, rewinds) for step in range(start, stop)]


def test_a_rewind_moves_batches_as_the_drawing_shows():
    assert steps([], 0, 6) == [0, 1, 2, 3, 4, 5]
    rewind = plan_rewind((5, 6), 3, [], oldest=0)
    assert rewind.step == 3
    assert steps([rewind], 0, 7) == [0, 1, 2, 6, 7, 8, 9]


def check_what_is_left_out(plan, seed):
    """Whatever rewinds follow one another: no batch is trained on after it was left out, those of the bad steps never come
    again, and the steps before where a rewind begins keep their batches. `skip` batches are left out, or more."""
    rng = random.Random(seed)
    rewinds, skip = [], rng.randint(3, 8)
    reached = 0
    for _ in range(rng.randint(1, 6)):
        reached += rng.randint(1, 12)
        bad = reached, reached + rng.randint(0, 2)
        oldest = rng.randint(0, bad[1] - 1)
        before = steps(rewinds, 0, bad[1])
        rewind = plan(bad, skip, rewinds, oldest)
        rewinds.append(rewind)
        after = steps(rewinds, 0, bad[1] + 50)
        says = f"seed {seed}: {rewinds}"
        assert oldest <= rewind.step <= max(bad[0] - 1, oldest), says
        assert after[: rewind.step] == before[: rewind.step], says
        assert min(after[rewind.step :]) > max(before), says
        assert after[rewind.step :] == list(
            range(rewind.batch, rewind.batch + len(after) - rewind.step)
        ), says
        assert rewind.batch - position(rewind.step, rewinds[:-1]) >= skip, says
        reached = rewind.step


@pytest.mark.parametrize("seed", range(50))
def test_batches_that_were_left_out_never_come_again(seed):
    check_what_is_left_out(plan_rewind, seed)


def test_the_law_fails_for_a_plan_that_forgets_earlier_rewinds():
    def forgets(bad, skip, rewinds, oldest):
        return plan_rewind(bad, skip, [], oldest)

    def leaves_one_less_out(bad, skip, rewinds, oldest):
        rewind = plan_rewind(bad, skip, rewinds, oldest)
        return rewind._replace(batch=rewind.batch - 1)

    for wrong in (forgets, leaves_one_less_out):
        with pytest.raises(AssertionError):
            for seed in range(50):
                check_what_is_left_out(wrong, seed)


def test_exactly_the_batches_before_the_last_bad_step_are_left_out():
    assert plan_rewind((100, 119), 200, [], oldest=0) == Rewind(0, 200, (100, 119))
    assert plan_rewind((1000, 1019), 200, [], oldest=0) == Rewind(819, 1019, (1000, 1019))
    assert plan_rewind((1000, 1019), 200, [], oldest=1005) == Rewind(1005, 1205, (1000, 1019))
    assert plan_rewind((1000, 1019), 200, [], oldest=900) == Rewind(900, 1100, (1000, 1019))


def test_rewinds_are_read_as_they_were_written(tmp_path):
    assert read_rewinds(tmp_path) == []
    rewinds = [Rewind(3, 6, (5, 6)), Rewind(9, 20, (14, 14))]
    write_rewinds(tmp_path, rewinds)
    assert read_rewinds(tmp_path) == rewinds


def test_batches_are_given_by_the_step_that_trains_on_them():
    batches = StepBatches(range(100), [Rewind(3, 6, (5, 6))], num_steps=8)
    assert [batches[step] for step in range(len(batches))] == [0, 1, 2, 6, 7, 8, 9, 10]
    with pytest.raises(IndexError):
        batches[8]
