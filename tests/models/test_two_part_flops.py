"""The analytic counts of ELECTRA's and XLNet's train steps against XLA's own of the unrolled program; nothing is compiled."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxlm.models import ELECTRA, XLNet
from jaxlm.models.electra import generator_config
from jaxlm.models.flops import electra_step_flops, train_step_flops, xlnet_step_flops
from tests.models.test_flops import CLASSIC, make_config

B, T, M = 2, 256, 40


def xla_flops(model, *, with_labels):
    """FLOPs of a loss of all outputs and its gradient as XLA counts them in the lowered program."""
    ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = {"tokens": ids(B, T), "masked_positions": ids(B, M), "order": ids(B, T)}
    labels = {"labels": ids(B, M), "weights": jax.ShapeDtypeStruct((B, M), jnp.float32)}
    batch |= labels if with_labels else {}
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), batch)["params"])

    def loss(params, batch, labels):
        out = model.apply({"params": params}, batch)
        logits = jnp.einsum("BMD,VD->BMV", out.hidden, out.unembed)
        picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        judged = 0.0 if out.head_logits is None else jnp.square(out.head_logits).mean()
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked) + judged

    lowered = jax.jit(jax.value_and_grad(loss)).lower(params, batch, ids(B, M))
    return lowered.cost_analysis()["flops"]


ENCODER = CLASSIC | dict(norm_position="post")


def test_electra_is_counted_with_its_generator():
    model = ELECTRA(make_config(**ENCODER), width=0.25)
    generator = generator_config(model.config, 0.25, 1.0)
    expected = xla_flops(model, with_labels=True)
    found = electra_step_flops(model.config, generator, B, T, M)
    assert found == pytest.approx(expected, rel=0.03)
    assert train_step_flops(model.config, B, T, M, False) != pytest.approx(expected, rel=0.03)


def test_xlnet_is_counted_with_both_streams_and_all_distances():
    fields = dict(norm_bias=True, mlp_bias=True, activation="gelu", position="none")
    model = XLNet(make_config(norm_position="post", **fields))
    expected = xla_flops(model, with_labels=False)
    assert xlnet_step_flops(model.config, B, T, M) == pytest.approx(expected, rel=0.03)
    assert train_step_flops(model.config, B, T, M, False) != pytest.approx(expected, rel=0.03)
