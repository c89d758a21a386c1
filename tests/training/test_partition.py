"""What trains and what does not: only the one part is in the optimizer, and the other stays what it was, bit by bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from jaxlm.models import BERT, Head
from jaxlm.parallel.mesh import path_names
from jaxlm.training.checkpoints import (
    Checkpoints,
    evaluated_item,
    find_step,
    load_item,
    restore_state,
)
from jaxlm.training.partition import TRAINED, join, split, trainable
from jaxlm.training.state import new_state
from jaxlm.training.step import make_eval_step, make_train_step
from tests.models.tiny import init_params, make_batch, make_config

CONFIG = make_config(num_layers=2, lora_rank=2, lora_targets=("query", "down"))
MODEL = BERT(CONFIG, head=Head(CONFIG, num_classes=3, pooling="first"))
BATCH = make_batch(rows=2) | {"example_labels": jnp.array([2, 0])}
OPTIMIZER = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))
HEAD_PATHS = {"head/out/kernel", "head/out/bias"}
ADAPTERS = {
    f"layers/{name}_lora_{part}" for name in ("attention/query", "mlp/down") for part in "ab"
}


def flat(tree):
    return flatten_dict(tree, sep="/")


def loss(outputs, batch):
    logs = jax.nn.log_softmax(outputs.head_logits[:, 0])
    total = -jnp.take_along_axis(logs, batch["example_labels"][:, None], axis=1).sum()
    weight = jnp.float32(len(logs))
    return (total, weight), {"loss": (total, weight)}


@functools.cache
def params():
    return init_params(MODEL, BATCH)


def start(train, **options):
    trained, frozen = split(params(), trainable(train))
    return new_state(trained, OPTIMIZER, frozen=frozen, **options)


@functools.cache
def trained_state(train):
    """After three steps."""
    options = dict(seed=0, grad_clip_norm=1.0, ema_decay=0.9)
    step = jax.jit(
        make_train_step(MODEL, loss, OPTIMIZER, lambda step: jnp.float32(0.1), **options)
    )
    state, losses = start(train, ema=True), []
    for _ in range(3):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"][0]))
    assert losses[-1] < losses[0], "it does not learn"
    return state


# --- the tree ---------------------------------------------------------------------------------------------------------

TREE = {"embed": {"table": 1}, "layers": {"up": 2, "down": 3}, "head": {"out": {"kernel": 4}}}


def check_split(split, join):
    for wanted in ((), ("head/out/kernel",), ("layers/up", "embed/table"), tuple(flat(TREE))):
        trained, frozen = split(TREE, lambda path, wanted=wanted: path in wanted)
        assert set(flat(trained)) == set(wanted)
        assert not any(branch == {} for branch in (*trained.values(), *frozen.values()))
        assert join(trained, frozen) == TREE


def test_a_tree_is_split_by_path_and_joined_to_what_it_was():
    check_split(split, join)


def test_the_split_check_fails_for_one_that_loses_a_part():
    with pytest.raises(AssertionError):
        check_split(lambda tree, is_trained: (split(tree, is_trained)[0], {}), join)


def test_trees_of_axes_split_like_the_parameters_that_they_are_of():
    axes = {"layers": {"up": ("layers", "embed"), "up_lora_a": ("layers", None)}, "head": {}}
    trained, frozen = split(axes, trainable("lora"))
    assert trained == {"layers": {"up_lora_a": ("layers", None)}}
    assert frozen == {"layers": {"up": ("layers", "embed")}}


def test_what_is_trained_and_frozen_at_once_is_an_error():
    with pytest.raises(ValueError, match=r"frozen at once: head/out/kernel, layers/up"):
        join(TREE, {"layers": {"up": 5}, "head": {"out": {"kernel": 6}}})


def test_without_a_frozen_part_nothing_is_done():
    assert join(TREE, None) is TREE and join(TREE, {}) is TREE
    assert start("all").frozen is None


def test_what_trains_is_chosen_by_name():
    paths = flat(params())
    chosen = {train: set(filter(trainable(train), paths)) for train in TRAINED}
    assert chosen == {"all": set(paths), "head": HEAD_PATHS, "lora": HEAD_PATHS | ADAPTERS}
    some = set(filter(trainable("all", frozen_layers=1, num_layers=2), paths))
    assert some == {path for path in paths if not path.startswith("embed/")}
    body = set(filter(trainable("all", frozen_layers=2, num_layers=2), paths))
    assert body == {path for path in paths if not path.startswith(("embed/", "layers/"))}
    with pytest.raises(ValueError, match="train='adapters': use one of all, head, lora"):
        trainable("adapters")


# --- training ---------------------------------------------------------------------------------------------------------


def check_only_these_are_in_the_optimizer(state, paths):
    """Two moments and a copy in the average of each, one count, and not a byte more."""
    found = jax.tree_util.tree_leaves_with_path(state.opt_state)
    names = ["/".join(path_names(path)) for path, _ in found]
    moments = {f"0/{moment}/{path}" for moment in ("mu", "nu") for path in paths}
    assert sorted(names) == sorted({"0/count"} | moments)
    whole = flat(params())
    size = sum(whole[path].nbytes for path in paths)
    assert sum(leaf.nbytes for _, leaf in found) == 2 * size + 4
    assert set(flat(state.ema)) == set(flat(state.params)) == set(paths)


def check_the_rest_is_untouched(state, paths):
    whole, after = flat(params()), flat(join(state.params, state.frozen))
    assert whole.keys() == after.keys()
    changed = {path for path in whole if not np.array_equal(whole[path], after[path])}
    assert changed == set(paths)


@pytest.mark.core
@pytest.mark.parametrize(
    ("train", "paths"), [("lora", HEAD_PATHS | ADAPTERS), ("head", HEAD_PATHS)]
)
def test_only_what_trains_is_in_the_optimizer_and_all_else_stays_bit_by_bit(train, paths):
    check_only_these_are_in_the_optimizer(trained_state(train), paths)
    check_the_rest_is_untouched(trained_state(train), paths)


def test_both_checks_fail_where_everything_trains():
    state = trained_state("all")
    with pytest.raises(AssertionError):
        check_only_these_are_in_the_optimizer(state, HEAD_PATHS | ADAPTERS)
    with pytest.raises(AssertionError):
        check_the_rest_is_untouched(state, HEAD_PATHS | ADAPTERS)


def test_evaluation_takes_both_parts_together():
    evaluate = jax.jit(make_eval_step(MODEL, loss))
    state = trained_state("lora")
    before, after = (
        float(evaluate(tree, BATCH)["loss"][0])
        for tree in (params(), join(state.params, state.frozen))
    )
    assert after < before


# --- checkpoints ------------------------------------------------------------------------------------------------------


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def save(folder, state):
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, state, {"step": 3}, None)
    checkpoints.wait()
    checkpoints.close()
    return find_step(folder)


@pytest.fixture(scope="module")
def step_dir(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run"), trained_state("lora"))


def test_a_partly_frozen_state_comes_back_bit_by_bit(step_dir):
    state = trained_state("lora")
    assert_equal(restore_state(step_dir, abstract(state)), state)


def test_the_frozen_part_is_an_item_of_its_own_and_the_model_is_loaded_whole(step_dir):
    assert {"params", "ema", "frozen", "opt_state"} <= {path.name for path in step_dir.iterdir()}
    state, wanted = trained_state("lora"), abstract(params())
    assert evaluated_item(step_dir) == "ema"
    for item, part in (("params", state.params), ("ema", state.ema)):
        assert_equal(load_item(step_dir, wanted, item), join(part, state.frozen))
        assert_equal(load_item(step_dir, abstract(part), item), part)
    assert_equal(load_item(step_dir, abstract(state.frozen), "frozen"), state.frozen)


def test_what_neither_part_has_and_what_the_model_has_no_place_for_is_listed(step_dir):
    wanted = abstract(params())
    wanted["extra"] = wanted["head"].pop("out")
    with pytest.raises(ValueError) as error:
        load_item(step_dir, wanted)
    for line in ("params/head/out/bias: stored float32[3], expected nothing", "frozen/extra/"):
        assert line in str(error.value)
    with pytest.raises(ValueError, match="params/head/out/bias: stored"):
        load_item(step_dir, abstract(trained_state("lora").frozen))


def test_a_checkpoint_without_a_frozen_part_is_loaded_and_is_none_of_a_run_that_has_one(tmp_path):
    state = trained_state("all")
    folder = save(tmp_path, state)
    assert not (folder / "frozen").exists()
    assert_equal(restore_state(folder, abstract(state)), state)
    assert_equal(load_item(folder, abstract(params())), state.params)
    with pytest.raises(ValueError, match="frozen: not in the checkpoint"):
        restore_state(folder, abstract(trained_state("head")))
