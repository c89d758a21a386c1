"""The analytic count against XLA's own count of the unrolled program; nothing is compiled or run."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from jaxlm.models import BERT, GPT, EncoderDecoder, TransformerConfig
from jaxlm.models.flops import cross_flops, forward_flops, train_step_flops

CLASSIC = dict(norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True, activation="gelu")
MODERN = dict(norm="rms_norm", position="rotary", activation="swiglu", num_kv_heads=2)


def make_config(**fields):
    sizes = dict(vocab_size=4000, emb_dim=512, num_layers=2, num_heads=8, num_kv_heads=8)
    sizes |= dict(head_dim=64, mlp_dim=2048, max_len=512, unroll=0)
    return TransformerConfig(**sizes | fields)


def xla_flops(model, batch_size, seq_len, num_predictions=None, source_len=0):
    """FLOPs of the loss and its gradient as XLA counts them in the lowered program."""
    shape = (batch_size, seq_len)
    batch = {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32)}
    if source_len:
        batch["encoder_tokens"] = jax.ShapeDtypeStruct((batch_size, source_len), jnp.int32)
    if num_predictions:
        shape = (batch_size, num_predictions)
        batch["masked_positions"] = jax.ShapeDtypeStruct(shape, jnp.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    params = nn.meta.unbox(boxed)

    def loss(params, batch, labels):
        out = model.apply({"params": params}, batch, deterministic=False)
        logits = jnp.einsum("BMD,VD->BMV", out.hidden, out.unembed)
        picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)

    labels = jax.ShapeDtypeStruct(shape, jnp.int32)
    lowered = jax.jit(jax.value_and_grad(loss)).lower(params, batch, labels)
    return lowered.cost_analysis()["flops"]


def check_count(count, model, batch_size, seq_len, num_predictions, causal):
    found = count(model.config, batch_size, seq_len, num_predictions, causal)
    gathered = 0 if causal else num_predictions
    expected = xla_flops(model, batch_size, seq_len, gathered)
    assert found == pytest.approx(expected, rel=0.02)


GPTS = {
    "gelu": CLASSIC,
    "swiglu and grouped queries": MODERN,
    "narrow heads": dict(**CLASSIC, num_heads=4, num_kv_heads=1),
    # With a capacity of exactly what is chosen, and of that XLA counts the places.
    "experts": MODERN | dict(num_experts=8, experts_per_token=2, expert_capacity_factor=1.0),
    "untied": dict(**CLASSIC, tie_embeddings=False),
}


@pytest.mark.parametrize("name", GPTS)
def test_the_count_of_a_decoder_is_xlas(name):
    check_count(train_step_flops, GPT(make_config(**GPTS[name])), 2, 128, 128, causal=True)


def test_the_count_of_an_encoder_with_gathered_positions_is_xlas():
    model = BERT(make_config(**CLASSIC, norm_position="post"))
    check_count(train_step_flops, model, 2, 128, 19, causal=False)


def test_the_count_with_factorised_embeddings_and_shared_layers_is_xlas():
    factorised = dict(embed_factor_dim=128, share_layers=True, norm_position="post")
    model = BERT(make_config(**CLASSIC, **factorised))
    check_count(train_step_flops, model, 2, 128, 128, causal=False)
    with pytest.raises(AssertionError):
        plain = dict(embed_factor_dim=0)
        wrong = lambda config, *args: train_step_flops(dataclasses.replace(config, **plain), *args)
        check_count(wrong, model, 2, 128, 128, causal=False)


def test_windows_are_counted_in_full_as_the_reference_attention_computes_them():
    model = GPT(make_config(**MODERN, attention_windows=(16, 0)))
    check_count(train_step_flops, model, 2, 128, 128, causal=True)


def test_the_check_fails_for_a_count_without_grouped_queries_and_for_a_forward_count():
    def ungrouped(config, *args):
        sizes = {**config.__dict__, "num_kv_heads": config.num_heads}
        return train_step_flops(TransformerConfig(**sizes), *args)

    def all_experts(config, *args):
        return train_step_flops(dataclasses.replace(config, experts_per_token=8), *args)

    with pytest.raises(AssertionError):
        check_count(all_experts, GPT(make_config(**GPTS["experts"])), 2, 128, 128, causal=True)
    for wrong in (ungrouped, forward_flops):
        with pytest.raises(AssertionError):
            check_count(wrong, GPT(make_config(**MODERN)), 2, 128, 128, causal=True)


def test_predicting_at_the_masked_positions_only_saves_15_percent_of_bert_base():
    sizes = dict(vocab_size=30522, emb_dim=768, num_layers=12, num_heads=12, num_kv_heads=12)
    sizes |= dict(head_dim=64, mlp_dim=3072, max_len=512, unroll=0, norm_position="post")
    model = BERT(TransformerConfig(**sizes, **CLASSIC))
    everywhere, gathered = xla_flops(model, 8, 128), xla_flops(model, 8, 128, 19)
    assert 1 - gathered / everywhere >= 0.15
    assert train_step_flops(model.config, 8, 128, 19, False) == pytest.approx(gathered, rel=0.02)
    assert train_step_flops(model.config, 8, 128, 128, False) == pytest.approx(everywhere, rel=0.02)


def test_a_causal_kernel_needs_about_half_of_the_scores():
    config = make_config(**CLASSIC)
    full, half = (
        forward_flops(config, 1, 512, 512, True, causal_half=half) for half in (False, True)
    )
    scores = 2 * 2 * 512 * 512 * 512 * config.num_layers
    assert full - half == pytest.approx(scores / 2, rel=0.01)


def check_two_streams(count):
    """An encoder of 2 layers at 160 places and a decoder of 3 at 96."""
    config = make_config(**MODERN | dict(num_decoder_layers=3, num_kv_heads=2))
    found = count(config, 2, 160, 96, True, target_len=96)
    expected = xla_flops(EncoderDecoder(config), 2, 96, source_len=160)
    assert found == pytest.approx(expected, rel=0.02)


def test_an_encoder_decoders_count_is_xlas():
    check_two_streams(train_step_flops)


def test_the_check_fails_without_cross_attention_and_for_equal_stacks():
    def without_cross(config, rows, seq_len, *args, target_len):
        cross = 3 * rows * config.num_decoder_layers * cross_flops(config, target_len, seq_len)
        return train_step_flops(config, rows, seq_len, *args, target_len=target_len) - cross

    def equal_stacks(config, *args, **kwargs):
        return train_step_flops(dataclasses.replace(config, num_decoder_layers=0), *args, **kwargs)

    for wrong in (without_cross, equal_stacks):
        with pytest.raises(AssertionError):
            check_two_streams(wrong)
