"""However the devices are arranged, a train step has one loss and one gradient, and each device its share of the state.

The step is the program's own; its optimizer keeps the gradient as momentum, where it can be read. To add a model, a line
in MODELS; a mesh, a line in MESHES; the default lane runs the pairs in DEFAULT, the slow lane all of them.
"""

import functools
import hashlib
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import tokenizers
from jaxlm.data.pipeline import TrainBatches
from jaxlm.data.token_store import TokenStore
from jaxlm.models import EncoderDecoder
from jaxlm.objectives import OBJECTIVES
from jaxlm.objectives.auxiliary import with_auxiliary
from jaxlm.parallel import mesh as meshes
from jaxlm.training import optimizers
from jaxlm.training.state import new_state
from jaxlm.training.step import make_train_step
from tests import tiny
from tests.models.tiny import MODERN, init_params, make_bert, make_config, make_gpt

# Half the time to compile, for programs that run once.
COMPILER_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
ROWS, LENGTH, VOCAB, MLP = 40, 32, 264, 24  # sizes that nothing else has
WIDTH = 16
SIZES = dict(vocab_size=VOCAB, max_len=LENGTH, mlp_dim=MLP, num_layers=2, num_kv_heads=4)
GROUPED = dict(num_kv_heads=2, tie_embeddings=False)
TYPES = dict(num_token_types=2)

EXPERTS = dict(num_experts=8, router_aux_weight=0.1, router_z_weight=0.01)
WINDOWS = dict(attention_windows=(4, 0))
T5 = dict(norm="rms_norm", position="relative", activation="geglu_tanh", relative_max_distance=24)

# name -> (model, name of the objective)
MODELS = {
    "gpt": lambda: (make_gpt(**SIZES), "causal"),
    "gpt_untied": lambda: (make_gpt(**SIZES, tie_embeddings=False), "causal"),
    "llama": lambda: (make_gpt(**SIZES | MODERN | GROUPED), "causal"),
    "windows": lambda: (make_gpt(**SIZES | MODERN | WINDOWS), "causal"),
    "dropless": lambda: (make_gpt(**SIZES | MODERN | EXPERTS, experts_per_token=3), "causal"),
    "capacity": lambda: (
        make_gpt(**SIZES | MODERN | EXPERTS, expert_capacity_factor=0.8),
        "causal",
    ),
    "bert": lambda: (make_bert(**SIZES), "mlm"),
    "t5": lambda: (EncoderDecoder(make_config(**SIZES | T5)), "denoising"),
    "bert_pairs": lambda: (make_bert(2, **SIZES | TYPES), "mlm_nsp"),
    "dropout": lambda: (make_gpt(**SIZES, dropout_rate=0.2, attention_dropout_rate=0.2), "causal"),
}
MIXTURES = ("dropless", "capacity")  # an expert has the tokens that chose it, whosever they are
MESHES = {
    "data": dict(data=8),
    "fsdp": dict(data=1, fsdp=8),
    "expert": dict(data=1, expert=8),
    "context": dict(data=1, context=8),
    "tensor": dict(data=1, tensor=2),
    "data_fsdp_tensor": dict(data=2, fsdp=2, tensor=2),
    "data_context_tensor": dict(data=2, context=2, tensor=2),
    "fsdp_expert_context": dict(data=1, fsdp=2, expert=2, context=2),
    "fsdp_context_tensor": dict(data=1, fsdp=2, context=2, tensor=2),
    "stage": dict(data=1, stage=2),
    "data_stage_expert": dict(data=2, stage=2, expert=2),
    "stage_fsdp_tensor": dict(data=1, stage=2, fsdp=2, tensor=2),
    "stage_context_tensor": dict(data=1, stage=2, context=2, tensor=2),
}


DEFAULT = {
    ("llama", "context"),
    ("llama", "fsdp_expert_context"),
    ("llama", "fsdp_context_tensor"),
    ("gpt", "data_context_tensor"),
    ("bert_pairs", "fsdp_context_tensor"),
    ("t5", "fsdp_context_tensor"),
    ("dropless", "fsdp_expert_context"),
    ("capacity", "fsdp_expert_context"),
    ("windows", "stage_fsdp_tensor"),
    ("capacity", "data_stage_expert"),
    ("t5", "stage_context_tensor"),
    ("dropout", "fsdp_context_tensor"),
}
CASES = [
    pytest.param(model, mesh, marks=[] if (model, mesh) in DEFAULT else pytest.mark.slow)
    for model in MODELS
    for mesh in MESHES
    if not (model == "dropout" and "stage" in MESHES[mesh])  # each turn of a stage has its own key
]


def make_example(rng, window):
    """Documents [bos] text [eos] that fill a window; of a pair objective one, and one to take another sentence from."""
    length = window.length - int(rng.integers(0, 5))  # so that some rows end in padding
    lengths = [length] if window.within_document else [length // 3, length - length // 3]
    documents = [rng.integers(97, 123, size).astype(np.int32) for size in lengths]
    positions = [np.arange(size, dtype=np.int32) for size in lengths]
    example = {
        "tokens": np.concatenate(documents),
        "segment_ids": np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths),
        "positions": np.concatenate(positions),
        "sentence_starts": np.concatenate(positions) % 5 == 1,
    }
    return example | (
        {"other": make_example(rng, window._replace(pair=False))} if window.pair else {}
    )


def make_batch(objective):
    rng = np.random.default_rng(0)
    window = objective.window(LENGTH)
    rows = [objective.corrupt(rng, make_example(rng, window), LENGTH) for _ in range(ROWS)]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def on_mesh(model_name, sizes):
    """(model, objective, batch, mesh, optimizer, state, its shardings) of a case."""
    model, name = MODELS[model_name]()
    objective = OBJECTIVES[name](tokenizer=tokenizers.make_tokenizer("bytes", num_sentinels=0))
    batch = make_batch(objective)
    mesh = meshes.make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    boxed = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    axes = meshes.logical_axes(boxed)
    optimizer = optimizers.make_optimizer("sgd", axes=axes, momentum=0.9)
    state = new_state(init_params(model, batch), optimizer)
    shardings = meshes.param_shardings(mesh, boxed)
    shardings = meshes.mirror_shardings(mesh, state, nn.meta.unbox(boxed), shardings)
    return model, objective, batch, mesh, optimizer, state, shardings


def train_step(
    model_name, sizes, *, accumulation_steps=1, wrong=lambda loss: loss, rules=meshes.RULES
):
    """(loss, optimizer state) after one step on a mesh of these sizes, and the program of each device."""
    model, objective, batch, mesh, optimizer, state, shardings = on_mesh(model_name, sizes)
    step = make_train_step(
        model,
        wrong(with_auxiliary(objective.loss)),
        optimizer,
        lambda step: jnp.float32(0.1),
        seed=0,
        accumulation_steps=accumulation_steps,
    )
    options = dict(donate_argnums=0, out_shardings=(shardings, None))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        arguments = jax.device_put(state, shardings), meshes.put_batch(mesh, batch)
        lowered = jax.jit(step, **options).lower(*arguments)
        compiled = lowered.compile(compiler_options=COMPILER_OPTIONS)
        state, metrics = compiled(*arguments)
    total, weight = metrics["loss"]
    return float(total / weight), jax.device_get(state.opt_state), compiled.as_text()


@functools.cache
def alone(model_name):
    return train_step(model_name, dict(data=1))


def check_same(model_name, sizes, **options):
    """Within 1e-5 of one device: the loss, and every gradient relative to the largest value of its array."""
    loss, state, program = train_step(model_name, sizes, **options)
    expected_loss, expected, _ = alone(model_name)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    flat = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True)
    errors = {
        jax.tree_util.keystr(path): np.abs(grad - other).max() / max(np.abs(other).max(), 1e-3)
        for (path, grad), other in flat
    }
    wrong = {name: float(error) for name, error in errors.items() if not error <= 1e-5}
    assert not wrong, wrong
    return program


def check_parts(program, sizes, spread=("data", "fsdp", "expert")):
    """No device has an array of all rows, of the whole vocabulary, or of whole MLP activations, not even for a moment.

    So neither the batch nor logits are gathered, and nothing is "rematerialised in full". Token ids may be, and what is looked
    up for them, of which a device then has its part of the width: the embedding's gradient is summed where that is kept.
    spread: the axes whose devices never have each other's rows.
    """
    ways = lambda *axes: math.prod(sizes.get(axis, 1) for axis in axes)
    whole = [{ROWS}] * (ways(*spread) > 1) + [{VOCAB}] * (ways("tensor") > 1)
    whole += [{LENGTH, MLP // ways("tensor")}] * (ways("context") > 1)
    shapes = {
        tuple(map(int, shape.split(",")))
        for line in program.splitlines()
        for shape in re.findall(r"\bb?f\d+\[([\d,]+)\]", line.partition(" = ")[2])
    }
    part_of_width = {ROWS, LENGTH // ways("context"), WIDTH // ways("fsdp")}
    looked_up = part_of_width if ways("fsdp") > 1 else None
    found = {
        shape
        for shape in shapes
        if any(sizes <= set(shape) for sizes in whole) and set(shape) - {1} != looked_up
    }
    assert shapes and not found, found


@pytest.mark.parametrize(("model", "mesh"), CASES)
def test_a_mesh_changes_neither_loss_nor_gradient(model, mesh):
    spread = ("data", "fsdp") if model in MIXTURES else ("data", "fsdp", "expert")
    check_parts(check_same(model, MESHES[mesh]), MESHES[mesh], spread)


@pytest.mark.parametrize("name", ["batch", "length", "act_vocab"])
def test_the_check_of_parts_fails_under_a_wrong_rule(name):
    rules = [(axis, None if axis == name else over) for axis, over in meshes.RULES]
    sizes = MESHES["data_context_tensor"]
    with pytest.raises(AssertionError):
        check_parts(train_step("gpt", sizes, rules=rules)[-1], sizes)


def test_nor_do_micro_batches_on_a_mesh():
    check_same("llama", dict(data=1, fsdp=2, context=2), accumulation_steps=2)


def mean_of_row_means(loss):
    """Wrong on purpose: a row with few real tokens counts as much as a full one."""

    def wrong(outputs, batch):
        weights = batch["weights"]
        share = weights / jnp.maximum(weights.sum(1, keepdims=True), 1e-9)
        return loss(outputs, {**batch, "weights": share})

    return wrong


def doubled_gradient(loss):
    """Wrong on purpose: as if the devices of a mesh axis each added the same gradient; the loss is right."""

    def wrong(outputs, batch):
        (total, weight), metrics = loss(outputs, batch)
        return (2 * total - jax.lax.stop_gradient(total), weight), metrics

    return wrong


@pytest.mark.parametrize("wrong", [mean_of_row_means, doubled_gradient])
def test_the_law_fails_for_a_wrong_loss(wrong):
    with pytest.raises(AssertionError):
        check_same("gpt", dict(data=1), wrong=wrong)


def check_shares():
    """Of the optimizer's state, as of the parameters, each device has its part of D (fsdp) and of V, N and F (tensor)."""
    *_, state, shardings = on_mesh("llama", MESHES["fsdp_context_tensor"])
    on_devices = jax.device_put(state.opt_state, shardings.opt_state)
    found = {
        "/".join(meshes.path_names(path)[-2:]): x.addressable_shards[0].data.shape
        for path, x in jax.tree_util.tree_leaves_with_path(on_devices)
    }
    expected = {
        "embed/embedding": (132, 8),
        "attention/query": (2, 8, 2, 4),
        "attention/key": (2, 8, 1, 4),
        "attention/out": (2, 2, 4, 8),
        "mlp/down": (2, 12, 8),
    }
    assert {name: found[name] for name in expected} == expected


def test_each_device_has_its_share_of_the_optimizer_state():
    check_shares()


@pytest.mark.parametrize("name", ["embed", "heads"])
def test_the_shares_are_wrong_under_a_wrong_rule(name, monkeypatch):
    monkeypatch.setitem(meshes.RULE, name, None)
    with pytest.raises(AssertionError):
        check_shares()


# --- the stream of batches --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return TokenStore(tiny.make_store(tmp_path_factory.mktemp("meshes") / "store"), "train")


def read_back(array):
    """A global array from the parts that the devices hold, each where its index says."""
    whole = np.zeros(array.shape, array.dtype)
    for shard in array.addressable_shards:
        whole[shard.index] = shard.data
    return whole


def stream_hash(store, stages, local_rows=meshes.local_rows):
    """sha256 of four batches on the devices; stages: mesh sizes and the step up to which that mesh is used."""
    tokenizer = tokenizers.make_tokenizer("bytes", num_sentinels=0)
    digest, begin = hashlib.sha256(), 0
    for sizes, end in stages:
        mesh = meshes.make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
        batches = TrainBatches(
            {"text": store},
            {"text": 1.0},
            OBJECTIVES["mlm"](tokenizer=tokenizer),
            LENGTH,
            ROWS,
            0,
            rows=local_rows(mesh, ROWS),
        )
        for step in range(begin, end):
            on_devices = meshes.put_batch(mesh, batches[step])
            for key in sorted(on_devices):
                digest.update(key.encode() + read_back(on_devices[key]).tobytes())
        begin = end
    return digest.hexdigest()


STREAMS = {
    "two devices": [(dict(data=2), 4)],
    "four devices": [(dict(data=2, context=2), 4)],
    "eight devices": [(dict(data=2, fsdp=2, context=2), 4)],
    "stages": [(dict(data=1, stage=2, fsdp=2, tensor=2), 4)],
    "resumed on fewer": [(dict(data=8), 1), (dict(fsdp=2, data=1), 4)],
    "resumed on another shape": [(dict(data=1, tensor=8), 2), (dict(data=1, expert=4), 4)],
}


@pytest.mark.parametrize("stages", STREAMS.values(), ids=STREAMS)
def test_the_stream_of_batches_is_that_of_one_device(stages, store):
    assert stream_hash(store, stages) == stream_hash(store, [(dict(data=1), 4)])


def test_the_stream_is_another_where_rows_change_places(store):
    def swapped(mesh, size):
        rows = meshes.local_rows(mesh, size)
        return rows if mesh.size == 1 else rows[::-1]

    alone = stream_hash(store, [(dict(data=1), 4)], swapped)
    assert stream_hash(store, STREAMS["two devices"], swapped) != alone
