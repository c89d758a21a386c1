"""A trace has the steps that were asked for, and no others."""

import jax
import jax.numpy as jnp
import pytest
from flax import struct

from jaxlm.training.loop import Intervals, Loop, Work
from jaxlm.training.profile import Profile, parse_steps


@struct.dataclass
class State:
    step: jax.Array


@jax.jit
def train_step(state, batch):
    return State(state.step + 1), {"loss": (jnp.sum(batch), 1.0)}


def traced_steps(folder):
    """The step numbers in the one xplane file below a folder."""
    (path,) = folder.rglob("*.xplane.pb")
    events = (
        event
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
    )
    stats = (dict(event.stats) for event in events if event.name.startswith("train"))
    return {int(found["step_num"]) for found in stats if "step_num" in found}


@pytest.mark.parametrize(
    ("first_step", "asked", "traced"),
    [(0, "3:5", {3, 4, 5}), (3, "3:5", {4, 5}), (0, "7:20", {7, 8}), (0, "8:8", {8})],
)
def test_a_trace_has_the_steps_that_were_asked_for(tmp_path, first_step, asked, traced):
    loop = Loop(
        train_step=train_step,
        num_train_steps=8,
        intervals=Intervals(log=2, evaluate=0, checkpoint=0),
        work=Work(1.0, 1.0, 1.0),
        progress=False,
        profile=Profile(*parse_steps(asked), tmp_path / "profile"),
    )
    loop.fit(State(jnp.int32(first_step)), iter([jnp.ones(4)] * 8))
    assert traced_steps(tmp_path / "profile") == traced


def test_a_run_that_ends_before_the_steps_leaves_no_trace(tmp_path):
    profile = Profile(9, 12, tmp_path / "profile")
    assert not any(profile.is_due(step) for step in range(1, 9))
    assert parse_steps("") is None


@pytest.mark.parametrize("wrong", ["10", "15:10", "0:4", "a:b", "1:2:3", ":3", "-1:3"])
def test_what_names_no_steps_is_refused(wrong):
    with pytest.raises(ValueError, match="FIRST:LAST"):
        parse_steps(wrong)
