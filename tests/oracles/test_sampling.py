"""Penalised and filtered logits against transformers' logits processors and warpers."""

import jax
import numpy as np
import pytest

from jaxlm.inference import sampling as ours

pytestmark = pytest.mark.oracles
torch = pytest.importorskip("torch", reason="torch is missing: bash tools/check.sh --oracles")
transformers = pytest.importorskip(
    "transformers", reason="transformers is missing: bash tools/check.sh --oracles"
)
V = 37


def their_steps(options):
    """The processors of these options, in the order in which `generate` applies them."""
    from transformers.generation import logits_process as processors

    made = {
        "repetition_penalty": processors.RepetitionPenaltyLogitsProcessor,
        "temperature": processors.TemperatureLogitsWarper,
        "top_k": processors.TopKLogitsWarper,
        "top_p": processors.TopPLogitsWarper,
        "min_p": processors.MinPLogitsWarper,
    }
    return [make(options[name]) for name, make in made.items() if name in options]


def theirs(logits_BV, tokens_BT, options):
    scores, ids = torch.from_numpy(np.array(logits_BV)), torch.from_numpy(tokens_BT).long()
    return transformers.LogitsProcessorList(their_steps(options))(ids, scores).numpy()


@jax.jit
def filtered(logits_BV, tokens_BT, sampling):
    seen_BV = jax.nn.one_hot(tokens_BT, logits_BV.shape[1], dtype=bool).any(1)
    return ours.warp(ours.penalise(logits_BV, seen_BV, sampling), sampling)


def make_logits(kind):
    rng = np.random.default_rng(7)
    logits = rng.normal(0, 3, (64, V)).astype(np.float32)
    if kind == "ties":  # about three tokens at each value, both zeros among them
        logits = np.round(logits) * rng.choice(np.float32([1, -1]), logits.shape)
    return logits


TOKENS = np.random.default_rng(3).integers(0, V, (64, 9)).astype(np.int32)
CASES = [
    dict(),
    dict(temperature=0.3),
    dict(temperature=1e-5),
    dict(top_k=1),
    dict(top_k=5),
    dict(top_k=V),
    dict(top_k=10 * V),
    dict(top_p=0.9),
    dict(top_p=0.37),
    dict(top_p=1e-9),
    dict(top_p=0.999),
    dict(min_p=0.07),
    dict(min_p=1.0),
    dict(min_p=1e-8),
    dict(repetition_penalty=1.7),
    dict(repetition_penalty=0.6),
    dict(temperature=0.7, top_k=7, top_p=0.83),
    dict(temperature=1.6, top_k=9, top_p=0.93, min_p=0.11, repetition_penalty=1.3),
]


def check_filters(kind, options, filtered):
    """Equal, but of the ties at top-p's edge, which transformers cuts wherever its sort put them, all are kept."""
    logits_BV = make_logits(kind)
    found = np.asarray(filtered(logits_BV, TOKENS, ours.make_sampling(**options)))
    expected = theirs(logits_BV, TOKENS, options)
    if "top_p" in options:
        least_B1 = expected.min(-1, keepdims=True, where=np.isfinite(expected), initial=np.inf)
        is_tie = np.isclose(found, least_B1, rtol=1e-6) & np.isinf(expected)
        assert kind != "random" or not is_tie.any()
        expected = np.where(is_tie, found, expected)
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["random", "ties"])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_penalised_and_filtered_logits_are_transformers(options, kind):
    check_filters(kind, options, filtered)


@pytest.mark.parametrize(
    "options, wrong",
    [
        (dict(top_k=5), dict(top_k=6)),
        (dict(top_p=0.37), dict(top_p=0.40)),
        (dict(min_p=0.07), dict(min_p=0.09)),
        (dict(repetition_penalty=1.7), dict()),
    ],
)
def test_the_check_fails_for_other_options(options, wrong):
    with pytest.raises(AssertionError):
        check_filters("random", options, lambda *a: filtered(*a[:2], ours.make_sampling(**wrong)))


def test_the_order_is_that_of_generate():
    options = CASES[-1]
    config = transformers.GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=1, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    wanted = transformers.GenerationConfig(**options, do_sample=True)
    made = model._get_logits_processor(wanted, 1)
    assert [type(step) for step in made] == [type(step) for step in their_steps(options)]
