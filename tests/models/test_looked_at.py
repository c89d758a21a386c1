"""What can be looked at in a model is what it computes, and costs nothing where nobody looks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.inference import internals
from jaxlm.models import BERT, EncoderDecoder, Head, attention, transformer
from tests.models.tiny import (
    CLASSIC,
    MODERN,
    get_loss,
    init_params,
    is_close,
    make_batch,
    make_bert,
    make_config,
    make_gpt,
    run,
)

MODELS = {
    "modern decoder with windows": make_gpt(**MODERN, attention_windows=(3, 0)),
    "soft-capped decoder": make_gpt(attention_softcap=2.0, query_scale=0.7),
    "encoder of shared layers": make_bert(**CLASSIC, share_layers=True),
    "encoder-decoder with biases": EncoderDecoder(make_config(position="relative")),
}


def batch_of(model):
    batch = make_batch()
    encoder = {f"encoder_{key}": x for key, x in make_batch(seed=1).items()}
    return batch | encoder if isinstance(model, EncoderDecoder) else batch


def softmax_NTS(query_TNH, key_SKH, mask_TS, bias_NTS, softcap):
    """Attention's probabilities of one row as the paper writes them, in float64; 0 where there is no key."""
    key_SNH = np.repeat(key_SKH, query_TNH.shape[1] // key_SKH.shape[1], axis=1)
    scores = np.einsum("TNH,SNH->NTS", query_TNH, key_SNH) / np.sqrt(query_TNH.shape[-1])
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    weights = np.where(mask_TS, np.exp(scores + bias_NTS), 0)
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)


def check_maps(model, monkeypatch):
    """What is kept of each layer is the softmax of the very queries and keys that its attention got."""
    got, batch, attend = [], batch_of(model), attention.attend_xla

    def recorded(query, key, value, mask, rng=None, bias=None, **options):
        shape = (query.shape[2], query.shape[1], key.shape[1])
        bias_NTS = jnp.zeros(shape) if bias is None else bias
        jax.debug.callback(lambda *x: got.append(x), query, key, mask, bias_NTS, ordered=True)
        return attend(query, key, value, mask, rng, bias, **options)

    monkeypatch.setattr(attention, "attend_xla", recorded)
    params = init_params(model, batch)
    read = jax.jit(lambda params: internals.read_inside(model, params, batch))
    found = {k: x for k, x in read(params).items() if k.endswith("probs")}
    jax.effects_barrier()
    # The order of the calls: the encoder's layers, then in each of the decoder's its own and the cross attention.
    kept = {k: x.reshape(-1, *x.shape[-4:]) for k, x in found.items()}
    order = [x for k, x in kept.items() if k.startswith(("encoder/", "layers/"))]
    pairs = [x for k, x in sorted(kept.items()) if k.startswith("decoder/")]
    calls = [layer for x in order for layer in x]
    calls += [layer for both in zip(*pairs, strict=True) for layer in both]
    assert len(calls) == len(got) == model.config.num_layers * (3 if pairs else 1)
    softcap = model.config.attention_softcap
    for probs_BNTS, (query, key, mask, bias_NTS) in zip(calls, got, strict=True):
        for row in range(len(query)):
            wanted = softmax_NTS(query[row], key[row], mask[row], bias_NTS, softcap)
            is_real = np.asarray(mask[row].any(-1))
            np.testing.assert_allclose(probs_BNTS[row][:, is_real], wanted[:, is_real], atol=2e-6)
            np.testing.assert_allclose(probs_BNTS[row].sum(-1), 1, atol=1e-5)


@pytest.mark.core
@pytest.mark.parametrize("name", MODELS)
def test_a_map_is_the_softmax_of_what_attention_got(name, monkeypatch):
    check_maps(MODELS[name], monkeypatch)


WRONG = {
    "it forgets the mask": lambda q, k, mask, bias, **o: (q, k, jnp.ones_like(mask), bias),
    "it takes the heads in another order": lambda q, k, mask, bias, **o: (
        q[:, :, ::-1],
        k,
        mask,
        bias,
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_map_is_found(wrong, monkeypatch):
    right = attention.attention_probs
    monkeypatch.setattr(attention, "attention_probs", lambda *x, **o: right(*WRONG[wrong](*x), **o))
    with pytest.raises(AssertionError):
        check_maps(MODELS["modern decoder with windows"], monkeypatch)


def test_a_decoders_maps_are_causal_and_an_encoders_are_not():
    batch = {"tokens": make_batch()["tokens"]}
    for model, is_causal in ((make_gpt(), True), (make_bert(), False)):
        (probs,) = internals.make_attention_reader(model)(init_params(model, batch), batch).values()
        assert probs.shape == (3, 2, 4, 12, 12)
        assert (np.triu(probs, 1) == 0).all() == is_causal


def lower_gradient(model, params):
    batch = make_batch()
    grad = jax.grad(lambda params: get_loss(model, params, batch))
    return jax.jit(grad).lower(params).as_text()


@pytest.mark.parametrize("name", ["modern decoder with windows", "encoder of shared layers"])
def test_nothing_of_it_is_in_a_program_of_training(name, monkeypatch):
    params = init_params(MODELS[name], make_batch())
    text = lower_gradient(MODELS[name], params)
    # apply never changes 'params', and the loop over layers has that collection anyway: nobody can look.
    monkeypatch.setattr(transformer, "LOOKED_AT", "params")
    monkeypatch.setattr(attention, "LOOKED_AT", "params")
    assert lower_gradient(MODELS[name], params) == text


def test_the_states_of_each_layer_are_those_of_a_model_that_ends_there():
    model = make_bert(**CLASSIC)
    rows = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    params = init_params(model, {"tokens": jnp.zeros((1, 4), jnp.int32)})
    states = internals.pooled_states(model, params, rows, pooling="mean", max_len=16)
    assert states.shape == (4, 2, 16)
    for layers in (1, 3):
        config = make_config(**CLASSIC, norm_position="post", num_layers=layers)
        body = BERT(config, head=Head(config, num_classes=0, pooling="mean"))
        first = jax.tree.map(lambda x: x[:layers], params["layers"])
        out = run(body, {"embed": params["embed"], "layers": first}, {"tokens": rows[:1]})
        assert is_close(out.head_logits[0, 0], states[layers, 0])


def test_the_first_states_are_the_embeddings():
    model, row = make_gpt(position="none"), np.array([3, 1, 4])
    params = init_params(model, {"tokens": jnp.zeros((1, 4), jnp.int32)})
    states = internals.pooled_states(model, params, [row], pooling="last", max_len=16)
    assert is_close(states[0, 0], params["embed"]["embedding"][4])
