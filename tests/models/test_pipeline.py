"""Layers on stages: nobody has another's, every stage works, and nothing but dropout's masks is another than in one place.

That losses and gradients are those of one device, over several models and meshes, is in tests/laws/test_meshes.py.
"""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import pipeline
from jaxlm.parallel import mesh as meshes
from tests.models.test_kernels import check_model
from tests.models.tiny import get_loss, init_params, make_batch, make_gpt

LAYERS, ROWS = 4, 8


def on_stages(function, **sizes):
    """`function`, compiled, under a mesh of these sizes."""
    mesh = meshes.make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])

    def run(*args):
        with jax.set_mesh(mesh), nn.logical_axis_rules(meshes.RULES):
            return function(*args)

    return run


def compiled(sizes=None, **fields):
    """(program, parameters on the mesh, batch) of a loss and its gradient."""
    sizes = sizes or dict(data=1, stage=4)
    model, batch = make_gpt(num_layers=LAYERS, **fields), make_batch(rows=ROWS)
    params = init_params(model, batch)
    mesh = meshes.make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    boxed = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    arguments = (
        jax.device_put(params, meshes.param_shardings(mesh, boxed)),
        meshes.put_batch(mesh, batch),
    )
    step = jax.jit(jax.value_and_grad(lambda p, b: get_loss(model, p, b)))
    return on_stages(lambda *a: step.lower(*a).compile(), **sizes)(*arguments), arguments


def test_a_stage_has_its_own_layers_and_hands_on_what_it_made():
    program, _ = compiled()
    text = program.as_text()
    arrays = re.findall(r"\bf32\[([\d,]+)\]", text)
    kernels = {a for a in arrays if a.endswith(",16,24")}  # `up`, of some layers
    assert kernels and all(a.split(",")[0] == "1" for a in kernels if a.count(",") == 2), kernels
    assert "collective-permute(" in text or "collective-permute-start(" in text


@pytest.mark.parametrize("parts", [2, 8])
def test_turns_are_the_micro_batches_and_one_less_than_the_stages(parts):
    program, _ = compiled(pipeline_micro_batches=parts)
    counts = {int(n) for n in re.findall(r'known_trip_count":\{"n":"(\d+)"', program.as_text())}
    assert parts + 4 - 1 in counts, counts


def test_the_law_fails_where_nothing_is_handed_on(monkeypatch):
    model, batch = make_gpt(num_layers=LAYERS), make_batch(rows=ROWS)
    params = init_params(model, batch)
    loss = lambda: on_stages(jax.jit(lambda p, b: get_loss(model, p, b)), data=1, stage=2)(
        params, batch
    )
    alone = jax.jit(lambda p, b: get_loss(model, p, b))(params, batch)
    np.testing.assert_allclose(loss(), alone, rtol=1e-5)
    monkeypatch.setattr(pipeline.jnp, "roll", lambda x, *_, **__: x)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(loss(), alone, rtol=1e-5)


@pytest.mark.parametrize("options", [dict(remat="full"), dict(remat="dots", unroll=0)])
def test_what_is_recomputed_changes_no_gradient(options):
    program, arguments = compiled(**options)
    expected, known = compiled()
    for found, wanted in zip(
        jax.tree.leaves(program(*arguments)), jax.tree.leaves(expected(*known)), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)


def test_splash_runs_on_the_stages():
    fields = dict(attention_kernel="splash_interpret", pipeline_micro_batches=2)
    check_model(fields, {}, data=1, stage=2, context=2, tensor=2)


def test_every_micro_batch_and_layer_drops_something_else():
    model = make_gpt(num_layers=LAYERS, dropout_rate=0.5, zero_init_out=False)
    one_row = {k: v[1:2] for k, v in make_batch(rows=2).items()}
    batch = {k: jnp.repeat(v, ROWS, axis=0) for k, v in one_row.items()}
    params = init_params(model, batch)
    params["embed"] = jax.tree.map(
        jnp.ones_like, params["embed"]
    )  # so that its own dropout is all that differs there

    def hidden(key, **options):
        run = jax.jit(
            lambda p, b: model.apply({"params": p}, b, rngs={"dropout": key}, **options).hidden
        )
        return np.asarray(on_stages(run, data=1, stage=2)(params, batch))

    dropped = hidden(jax.random.key(0), deterministic=False)
    assert np.isfinite(dropped).all()
    for one, other in zip(dropped, dropped[1:], strict=False):
        assert np.abs(one - other).max() > 0.1
    np.testing.assert_array_equal(dropped, hidden(jax.random.key(0), deterministic=False))
    assert np.abs(dropped - hidden(jax.random.key(1), deterministic=False)).max() > 0.1
    kept = hidden(jax.random.key(0), deterministic=True)
    np.testing.assert_allclose(kept, np.broadcast_to(kept[:1], kept.shape), atol=1e-5)


COUNTS = [  # rows, mesh, micro-batches
    (64, dict(data=1, stage=4, fsdp=2), 16),
    (16, dict(data=1, stage=4, fsdp=2), 8),
    (8, dict(data=1, stage=4, fsdp=2), 4),
    (24, dict(data=1, stage=2), 8),
    (10, dict(data=1, stage=2), 5),
]


@pytest.mark.parametrize("rows, sizes, expected", COUNTS)
def test_as_many_micro_batches_as_leave_each_device_whole_rows(rows, sizes, expected):
    assert on_stages(pipeline.count_micro_batches, **sizes)(rows, 0) == expected


def test_micro_batches_that_do_not_divide_the_rows_are_refused():
    with pytest.raises(ValueError, match="pipeline_micro_batches=3 does not divide the 8 rows"):
        on_stages(pipeline.count_micro_batches, data=1, stage=2)(8, 3)
