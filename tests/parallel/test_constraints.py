"""The models' sharding constraints arrive in the program: none is dropped on the way, which Flax does in silence."""

import contextlib

import flax.linen as nn
import jax
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.models import attention
from jaxlm.parallel import mesh as meshes
from tests.models.tiny import MODERN, equations, make_batch, make_bert, make_gpt

ROWS = ("data", "fsdp", "expert", "stage")
RESIDUAL = P(ROWS, "context", None)
HEADS = P(ROWS, "context", "tensor", None)
GATHERED = P(ROWS, None, "tensor", None)  # keys and values, over context
MLP = P(ROWS, "context", "tensor")
TABLE = P("tensor", None)
LOOKED_UP = P("data", "context", "fsdp")  # a part of the width, for the rows of all that share it


def constraints(model, enter, sizes, rows=4):
    """(shape, spec) of every sharding constraint in the jaxpr of a forward pass."""
    batch = make_batch(rows=rows)
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), batch)["params"])
    with enter(meshes.make_mesh(**sizes)), nn.logical_axis_rules(meshes.RULES):
        jaxpr = jax.make_jaxpr(lambda p: model.apply({"params": p}, batch).hidden)(params)
    return [
        (e.outvars[0].aval.shape, e.params["sharding"].spec)
        for e in equations(jaxpr.jaxpr)
        if e.primitive.name == "sharding_constraint"
    ]


def check_constraints(model, enter=jax.set_mesh):
    found = constraints(model, enter, dict(data=2, fsdp=2, tensor=2))
    c = model.config
    width, length = c.emb_dim, 12
    expected = {
        ((4, length, width), RESIDUAL),
        ((4, length, c.num_heads, c.head_dim), HEADS),
        ((4, length, c.num_kv_heads, c.head_dim), HEADS),
        ((4, length, c.num_kv_heads, c.head_dim), GATHERED),
        ((4, length, c.mlp_dim), MLP),
        ((4, length, length), P(ROWS, "context", None)),
        ((c.vocab_size, width), TABLE),
    }
    assert expected <= set(found), f"missing: {expected - set(found)}"
    replicated = {shape for shape, spec in found if not any(spec)}
    tables = {(c.max_len, width), (c.num_token_types, width)}  # small, and looked up whole
    assert replicated <= tables, f"replicated: {replicated - tables}"


@pytest.mark.parametrize("model", [make_gpt(**MODERN), make_bert()], ids=["gpt", "bert"])
def test_every_kind_of_activation_is_constrained(model):
    check_constraints(model)


def test_embeddings_are_looked_up_in_parts_where_devices_share_their_width_alone():
    model = make_gpt()
    width, rows = model.config.emb_dim, 8  # a row to each device
    looked_up, table = ((rows, 12, width), LOOKED_UP), (model.config.vocab_size, width)
    found = constraints(model, jax.set_mesh, dict(data=2, fsdp=4), rows)
    assert looked_up in found and table not in [shape for shape, _ in found]
    fewer = constraints(model, jax.set_mesh, dict(data=2, fsdp=4), rows // 2)  # as of prompts
    assert (table, TABLE) in fewer


@pytest.mark.filterwarnings("ignore:.with mesh:DeprecationWarning")
@pytest.mark.parametrize("enter", [lambda mesh: mesh, lambda mesh: contextlib.nullcontext()])
def test_the_check_fails_where_flax_drops_constraints(enter):
    """`with mesh:` instead of `jax.set_mesh`, and no mesh at all."""
    with pytest.raises(AssertionError, match="missing"):
        check_constraints(make_gpt(**MODERN), enter)


def test_the_check_fails_if_attention_constrains_nothing(monkeypatch):
    monkeypatch.setattr(attention, "constrain", lambda x, axes: x)
    with pytest.raises(AssertionError, match="missing"):
        check_constraints(make_gpt(**MODERN))
