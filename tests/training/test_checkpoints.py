"""What is saved comes back bit by bit, where it belongs, or not at all."""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm import sealed
from jaxlm.exits import Corrupted, Damaged, RunError
from jaxlm.parallel import mesh as meshes
from jaxlm.training import saving
from jaxlm.training.checkpoints import (
    Checkpoints,
    find_step,
    load_item,
    load_tree,
    restore_state,
    split_step,
)
from jaxlm.training.state import new_state
from jaxlm.training.stored import in_short, read_manifest
from tests.fixtures import make

OPTIMIZER = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))


def make_state(step=0, *, ema=False, width=4):
    keys = jax.random.split(jax.random.key(step), 2)
    params = {
        "w": jax.random.normal(keys[0], (8, width)),
        "b": jax.random.normal(keys[1], (width,)),
    }
    return new_state(params, OPTIMIZER, ema=ema).replace(step=jnp.int32(step))


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save(tmp_path, steps, metrics=lambda step: None, **options):
    checkpoints = Checkpoints(tmp_path, **options)
    for step in steps:
        checkpoints.save(step, make_state(step, ema=True), {"step": step}, metrics(step))
    checkpoints.wait()
    checkpoints.close()


def kept_steps(tmp_path):
    return sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())


def assert_equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_state_comes_back_bit_by_bit(tmp_path):
    save(tmp_path, [5])
    state = make_state(5, ema=True)
    assert_equal_trees(restore_state(find_step(tmp_path), abstract(state)), state)
    assert read_manifest(find_step(tmp_path)).items() >= {"step": 5, "schema_version": 2}.items()


def test_parameters_restore_alone_and_onto_a_mesh(tmp_path):
    save(tmp_path, [5])
    mesh = meshes.make_mesh(fsdp=4, tensor=2, data=1)
    sharding = jax.sharding.NamedSharding(mesh, P("fsdp"))
    wanted = {
        "w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding),
        "b": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding),
    }
    params = load_item(find_step(tmp_path, 5), wanted)
    assert params["w"].sharding == sharding
    assert_equal_trees(params, make_state(5).params)


@pytest.mark.parametrize(
    "options, kept",
    [
        (dict(keep_last=2), [30, 40]),
        (dict(keep_last=1, keep_every=20), [20, 40]),
        (dict(keep_last=1, best_metric="loss"), [20, 40]),
        (dict(keep_last=1, best_metric="loss", best_mode="max"), [10, 40]),
        (dict(keep_last=1, best_metric="accuracy"), [20, 40]),
    ],
)
def test_the_right_checkpoints_are_kept(tmp_path, options, kept):
    losses = {10: 4.0, 20: 1.0, 30: math.nan}  # which Orbax takes for the best
    save(
        tmp_path,
        [10, 20, 30, 40],
        lambda s: {"loss": losses[s], "accuracy": -losses[s]} if s in losses else None,
        **options,
    )
    assert kept_steps(tmp_path) == kept


def test_old_steps_are_emptied_before_they_are_removed(tmp_path, monkeypatch):
    """What Google Drive's folder moves to its trash is nothing then."""
    sizes, rmtree = [], saving.shutil.rmtree

    def seen(folder, **options):
        sizes.extend(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        rmtree(folder, **options)

    monkeypatch.setattr(saving.shutil, "rmtree", seen)
    save(tmp_path, [10, 20], keep_last=1)
    assert sizes and not any(sizes) and kept_steps(tmp_path) == [20]


def test_the_best_stays_after_reopening(tmp_path):
    losses = {10: 1.0, 20: 2.0}
    for step in (10, 20):
        save(tmp_path, [step], lambda s: {"loss": losses[s]}, keep_last=1, best_metric="loss")
    save(tmp_path, [30], lambda s: {"loss": 3.0}, keep_last=1, best_metric="loss")
    assert kept_steps(tmp_path) == [10, 30]


def test_an_unknown_best_metric_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="'f1' is not among.*'loss'"):
        save(tmp_path, [1], lambda s: {"loss": 0.0}, best_metric="f1")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s.replace(params=s.params | {"extra": s.params["b"]}),
            "params/extra: stored nothing",
        ),
        (
            lambda s: s.replace(params={"w": s.params["w"]}),
            r"params/b: stored float32\[4\], expected nothing",
        ),
        (
            lambda s: s.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), s.params)),
            r"params/b: stored float32\[4\], expected bfloat16\[4\]",
        ),
        (
            lambda s: make_state(5, ema=True, width=6),
            r"stored float32\[8, 4\], expected float32\[8, 6\]",
        ),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused_with_a_list(tmp_path, change, message):
    save(tmp_path, [5])
    with pytest.raises(ValueError, match=message):
        restore_state(find_step(tmp_path), abstract(change(make_state(5, ema=True))))


def test_a_missing_step_lists_those_there_are(tmp_path):
    save(tmp_path, [5])
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7 .*found steps \[5\]"):
        find_step(tmp_path, 7)


def test_a_step_is_named_after_the_last_at():
    assert split_step("W@7") == ("W", 7)
    assert split_step("/home/me@lab/run") == ("/home/me@lab/run", None)
    assert split_step("/home/me@lab/run@12") == ("/home/me@lab/run", 12)


def test_saving_a_step_again_is_an_error_and_not_silence(tmp_path):
    save(tmp_path, [5])
    with pytest.raises((RuntimeError, ValueError)):
        save(tmp_path, [5])


@pytest.mark.parametrize("schema", [1, 2])
def test_a_checkpoint_of_every_schema_is_restored(tmp_path, schema, caplog):
    shutil.copytree(Path(make.__file__).parent / f"checkpoint_{schema}", tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", best_metric="loss")
    state, about = checkpoints.restore(abstract(make.checkpoint_state()))
    assert_equal_trees(state, make.checkpoint_state())
    assert about.items() >= make.CHECKPOINT_SAYS.items()
    assert about.get("schema_version", 1) == schema
    assert caplog.text.count("kept no checksums") == (schema == 1)
    assert checkpoints.best_step() == 3  # and the metrics are read, too
    checkpoints.close()


def test_a_newer_schema_is_no_damage(tmp_path):
    save(tmp_path, [5])
    path = find_step(tmp_path) / "manifest" / "metadata"
    newer = sealed.seal(read_manifest(path.parents[1]) | {"schema_version": 3})
    path.write_text(json.dumps(newer))
    with pytest.raises(RunError, match="schema_version 3, expected 2 or less") as error:
        Checkpoints(tmp_path).restore(abstract(make_state(5, ema=True)))
    assert not isinstance(error.value, Damaged)


@pytest.mark.parametrize(
    "read",
    [
        lambda step_dir, params: load_item(step_dir, params),
        lambda step_dir, params: load_tree(step_dir, "params", params),
    ],
    ids=["load_item", "load_tree"],
)
def test_parameters_of_another_step_are_damage_wherever_they_are_read(tmp_path, read):
    """As fine-tuning, evaluation and generation read them."""
    save(tmp_path, [5, 6])
    mesh = meshes.make_mesh(fsdp=8, tensor=1, data=1)
    everywhere = jax.sharding.NamedSharding(mesh, P())
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), make_state().params
    )
    assert_equal_trees(read(find_step(tmp_path, 6), wanted), make_state(6).params)
    shutil.rmtree(find_step(tmp_path, 6) / "params")
    shutil.copytree(find_step(tmp_path, 5) / "params", tmp_path / "checkpoints/6/params")
    with pytest.raises(Damaged, match=r"params/w: found float32\[8, 4\] \w{16}, saved"):
        read(find_step(tmp_path, 6), wanted)


def test_copies_that_differ_end_the_run_and_their_step_is_none(tmp_path):
    """One of eight copies of `b` has another bit; the manifest, which is made in the background, finds it."""
    mesh = meshes.make_mesh(data=8)
    everywhere = jax.sharding.NamedSharding(mesh, P())
    state = jax.device_put(make_state(5), everywhere)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, state, {"step": 4}, None)
    copies = [np.array(shard.data) for shard in state.params["b"].addressable_shards]
    copies[3].view(np.uint32)[2] ^= 1 << 5
    shards = [jax.device_put(x, d) for x, d in zip(copies, mesh.devices.flat, strict=True)]
    wrong = jax.make_array_from_single_device_arrays((4,), everywhere, shards)
    checkpoints.save(5, state.replace(params=state.params | {"b": wrong}), {"step": 5}, None)
    with pytest.raises(Corrupted, match=f"params/b: .*{mesh.devices.flat[3]} has"):
        checkpoints.wait()
    checkpoints.close()
    assert kept_steps(tmp_path) == [4]


def test_of_a_long_error_the_cause_is_shown_which_is_last():
    error = ValueError("Error writing " + "x" * 900 + ": No space left [tensorstore_spec='…']")
    said = in_short(error)
    assert said.startswith("ValueError: Error writing xx") and said.endswith(": No space left")
    assert len(said) < 530
