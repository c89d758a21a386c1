"""Beams, their order and their scores are those of transformers' `generate(num_beams=…)`."""

import functools

import numpy as np
import pytest

from jaxlm.inference import decode
from jaxlm.inference.beam import beam_search
from tests.oracles import tiny_models as tiny

pytestmark = pytest.mark.oracles
torch = pytest.importorskip("torch", reason="torch is missing: bash tools/check.sh --oracles")
pytest.importorskip("transformers", reason="transformers is missing: bash tools/check.sh --oracles")

NEW, PAD = 9, 1
EOS = {"gpt2": 33, "qwen3": 36}


def make_prompts(count=20):
    rng = np.random.default_rng(5)
    return [rng.integers(2, tiny.V, rng.integers(1, 12)).astype(np.int32) for _ in range(count)]


@functools.cache
def make_both(name):
    """transformers' model and (our decoder, our parameters), with the same random weights."""
    from tests.oracles import record_logits

    theirs = record_logits.HF_MODELS[name]().eval()
    weights = tiny.random_weights({key: p.shape for key, p in theirs.named_parameters()})
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            parameter.copy_(torch.from_numpy(weights[key]))
    model, convert, _ = tiny.MODELS[name]()
    return theirs, (decode.make_decoder(model), convert(weights))


def search_theirs(model, prompts, *, eos_id, num_return, **options):
    tokens, mask = decode.pad_left(prompts, max(map(len, prompts)))
    made = model.generate(
        input_ids=torch.from_numpy(np.where(mask > 0, tokens, PAD)).long(),
        attention_mask=torch.from_numpy(mask).long(),
        max_new_tokens=NEW,
        do_sample=False,
        num_return_sequences=num_return,
        eos_token_id=eos_id,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    new = made.sequences[:, tokens.shape[1] :].tolist()
    ends = [row.index(eos_id) if eos_id in row else NEW for row in new]
    beams = [
        (row[:end], s)
        for row, end, s in zip(new, ends, made.sequences_scores.tolist(), strict=True)
    ]
    return [beams[i : i + num_return] for i in range(0, len(beams), num_return)]


def check_beams(name, search, **options):
    theirs, (decoder, params) = make_both(name)
    prompts = make_prompts()
    options = dict(num_beams=4, num_return=3, eos_id=EOS[name]) | options
    expected = search_theirs(theirs, prompts, **options)
    found = search(decoder, params, prompts, max_new_tokens=NEW, max_len=tiny.P, **options)
    lengths = [len(tokens) for beams in expected for tokens, _ in beams]
    assert len(found) == 20 and min(lengths) < NEW == max(lengths), "eos never, or always"
    for ours, beams in zip(found, expected, strict=True):
        tokens = [b.tokens.tolist() for b in ours]
        assert tokens == [tokens for tokens, _ in beams], "other beams"
        np.testing.assert_allclose([b.score for b in ours], [s for _, s in beams], atol=1e-4)


@pytest.mark.parametrize("name", EOS)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(early_stopping=True),
        dict(early_stopping="never"),
        dict(length_penalty=0.0),
        dict(length_penalty=2.0, early_stopping="never"),
        dict(length_penalty=2.0),
        dict(length_penalty=-1.0, early_stopping="never"),
        dict(length_penalty=-1.0, early_stopping=True),
        dict(num_beams=2, num_return=1, length_penalty=0.6),
        dict(num_beams=9, num_return=9),
    ],
    ids=str,
)
def test_beams_of_twenty_ragged_prompts_are_those_of_transformers(name, options):
    check_beams(name, beam_search, **options)


@pytest.mark.parametrize(
    "options, wrong",
    [
        (dict(length_penalty=0.0), dict(length_penalty=1.0)),
        (dict(early_stopping=True), dict(early_stopping=False)),
        (dict(length_penalty=2.0), dict(length_penalty=2.0, early_stopping="never")),
        (dict(num_beams=4), dict(num_beams=3)),
        (dict(), dict(eos_id=-1)),
    ],
    ids=str,
)
def test_the_check_fails_for_other_options(options, wrong):
    def search(*args, **kwargs):
        return beam_search(*args, **kwargs | wrong)

    with pytest.raises(AssertionError, match="other beams|Not equal"):
        check_beams("gpt2", search, **options)
