"""Adapters: they begin as nothing, do what the matrices that they merge into do, and are named and stacked like those."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxlm.models import lora
from jaxlm.models.config import PROJECTIONS
from jaxlm.models.flops import train_step_flops
from jaxlm.models.transformer import MLP
from jaxlm.training.optimizers import is_decayed, muon_dimensions
from tests.models.tiny import (
    CLASSIC,
    MODERN,
    get_logits,
    init_params,
    is_close,
    make_batch,
    make_bert,
    make_config,
    make_gpt,
)

UNGATED = tuple(name for name in PROJECTIONS if name != "gate")
EVERY = dict(lora_rank=3, lora_alpha=5.0)
MODELS = {
    "decoder, all projections": lambda **f: make_gpt(**MODERN, lora_targets=PROJECTIONS, **f),
    "encoder with biases and shared layers": lambda **f: make_bert(
        **CLASSIC, share_layers=True, lora_targets=UNGATED, **f
    ),
}


@functools.cache
def compiled(model):
    return jax.jit(lambda params: get_logits(model, params, make_batch()))


def logits(model, params):
    return compiled(model)(params)


def plain(model):
    return dataclasses.replace(model, config=lora.without_adapters(model.config))


def check_merge(merge, model):
    """With adapters that matter, the merged model has the names of a plain one, and the logits of the adapted one."""
    params = init_params(model, make_batch())
    merged = jax.jit(merge, static_argnums=1)(params, model.config)
    expected = init_params(plain(model), make_batch())
    assert jax.tree.structure(merged) == jax.tree.structure(expected)
    adapted = logits(model, params)
    without = unflatten_dict(
        {k: x for k, x in flatten_dict(params).items() if not lora.is_adapter(k[-1])}
    )
    assert not is_close(logits(plain(model), without), adapted, 0.05), "the adapters do nothing"
    assert is_close(logits(plain(model), merged), adapted), "merged and unmerged differ"


@pytest.mark.core
@pytest.mark.parametrize("name", MODELS)
def test_a_merged_model_has_the_logits_of_the_adapted_one(name):
    check_merge(lora.merge, MODELS[name](**EVERY))


def forgets_the_scale(params, config):
    return lora.merge(params, dataclasses.replace(config, lora_alpha=float(config.lora_rank)))


def mixes_up_the_layers(params, config):
    flat = flatten_dict(params, sep="/")
    flat = {k: x[::-1] if lora.is_adapter(k) else x for k, x in flat.items()}
    return lora.merge(unflatten_dict(flat, sep="/"), config)


@pytest.mark.parametrize("wrong", [forgets_the_scale, mixes_up_the_layers])
def test_the_merge_check_fails_for_one_that(wrong):
    with pytest.raises(AssertionError, match="merged and unmerged differ"):
        check_merge(wrong, MODELS["decoder, all projections"](**EVERY))


def test_a_new_adapter_changes_nothing_and_is_ready_to_learn():
    config = make_config(emb_dim=128, lora_targets=("up",), lora_rank=16)
    x = jnp.ones((1, 2, 128))
    params = nn.meta.unbox(jax.jit(MLP(config).init)(jax.random.key(0), x))["params"]
    assert not params["up_lora_b"].any()
    assert np.std(params["up_lora_a"]) == pytest.approx(128**-0.5, rel=0.1)
    base = {name: params[name] for name in ("up", "down")}
    without = MLP(lora.without_adapters(config)).apply({"params": base}, x)
    np.testing.assert_array_equal(MLP(config).apply({"params": params}, x), without)


def test_without_a_rank_the_program_is_that_of_a_model_that_knows_no_adapters():
    batch = make_batch()
    params = init_params(make_gpt(**MODERN), batch)

    def program(**fields):
        model = make_gpt(**MODERN, **fields)
        return str(jax.make_jaxpr(lambda p: model.apply({"params": p}, batch).hidden)(params))

    assert program() == program(lora_targets=PROJECTIONS, lora_alpha=1.0)


def test_the_count_of_flops_is_that_of_the_model_without_adapters():
    config = make_config(lora_rank=4)
    sizes = dict(batch_size=2, seq_len=8, num_predictions=8, causal=True)
    assert train_step_flops(config, **sizes) == train_step_flops(make_config(), **sizes)


def test_adapters_are_stacked_named_and_decayed_like_the_matrices_they_are():
    model = make_gpt(**MODERN, lora_targets=PROJECTIONS, lora_rank=3)
    boxed = jax.eval_shape(model.init, jax.random.key(0), make_batch())["params"]
    flat = {k: x for k, x in flatten_dict(boxed, sep="/").items() if lora.is_adapter(k)}
    assert len(flat) == 2 * len(PROJECTIONS)
    shapes = {k: (tuple(x.names), x.unbox().shape) for k, x in flat.items()}
    assert shapes["layers/attention/key_lora_a"] == (("layers", "embed", "rank"), (3, 16, 3))
    assert shapes["layers/attention/key_lora_b"] == (
        ("layers", "rank", "kv", "head_dim"),
        (3, 3, 2, 4),
    )
    assert shapes["layers/attention/out_lora_a"] == (
        ("layers", "heads", "head_dim", "rank"),
        (3, 4, 4, 3),
    )
    assert all(is_decayed(names) for names, _ in shapes.values())
    assert not any(muon_dimensions(names) for names, _ in shapes.values())


def test_merging_sums_in_float32_and_keeps_the_matrices_dtype():
    config = make_config(lora_rank=2, lora_alpha=2.0, lora_targets=("query",))
    rng = np.random.default_rng(0)
    shapes = dict(query=(3, 16, 4, 4), query_lora_a=(3, 16, 2), query_lora_b=(3, 2, 4, 4))
    layer = {k: jnp.asarray(rng.normal(size=s), jnp.bfloat16) for k, s in shapes.items()}
    (merged,) = jax.tree.leaves(lora.merge({"layers": {"attention": layer}}, config))
    w, a, b = (np.asarray(x, np.float32) for x in layer.values())
    expected = w + np.einsum("ldr,lrnh->ldnh", a, b)
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, jnp.asarray(expected, jnp.bfloat16))


def test_everything_wrong_about_adapters_is_listed_by_name():
    with pytest.raises(ValueError) as error:
        make_config(lora_rank=4, lora_alpha=0.0, lora_targets=("qury", "gate"))
    for part in ("lora_alpha=0.0", "['qury']", "query, key", "'gate': activation='gelu_tanh'"):
        assert part in str(error.value)
    for fields in (dict(lora_rank=-1), dict(lora_rank=1, lora_targets=())):
        with pytest.raises(ValueError, match="lora_"):
            make_config(**fields)
    assert make_config(lora_targets=("qury",)).lora_rank == 0  # nothing reads them then
