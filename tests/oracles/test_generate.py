"""Greedy text of a ragged batch equals transformers' `generate` of each prompt alone, for every decoder family."""

import numpy as np
import pytest

from jaxlm.inference import decode
from jaxlm.inference.sampling import make_sampling
from tests.oracles import tiny_families as families
from tests.oracles.tiny_families import DECODER, GPT2, IDS, SIZES, Tiny
from tests.oracles.tiny_models import random_weights

pytestmark = pytest.mark.oracles
MISSING = "missing: bash tools/check.sh --oracles"
torch = pytest.importorskip("torch", reason=MISSING)
pytest.importorskip("transformers", reason=MISSING)

LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
QWEN2 = dict(SIZES, **IDS, num_key_value_heads=2, rms_norm_eps=1e-6)
WINDOWS = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
CASES = {
    "gpt2": Tiny("gpt2", "GPT2LMHeadModel", GPT2),
    "llama": Tiny("llama", "LlamaForCausalLM", DECODER | dict(rope_parameters=LLAMA3_ROPE)),
    "qwen2": Tiny("qwen2", "Qwen2ForCausalLM", QWEN2 | WINDOWS),
    "qwen3": Tiny("qwen3", "Qwen3ForCausalLM", DECODER | dict(tie_word_embeddings=True)),
    **{name: families.TINY[name] for name in ("mistral", "gemma2", "gemma3")},
}
MAX_NEW_TOKENS, MAX_LEN, EOS = 14, 40, IDS["eos_token_id"]
PROMPTS = [
    np.random.RandomState(n).randint(4, families.V, n).astype(np.int32) for n in (11, 2, 6, 30)
]


@pytest.fixture(autouse=True)
def cases(monkeypatch):
    monkeypatch.setattr(families, "TINY", CASES)


def their_text(model, prompt):
    """Greedy, by transformers; without the eos that ended it."""
    ids = torch.from_numpy(prompt[None].astype(np.int64))
    room = min(MAX_NEW_TOKENS, MAX_LEN - len(prompt))
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False
    )[0, len(prompt) :].tolist()
    return made[: made.index(EOS)] if EOS in made else made


def check_greedy_text(name, **changes):
    """changes: options that our model has and theirs has not."""
    from tests.oracles import record_logits

    theirs = record_logits.make_family_model(families.Twin(name))
    shapes, _ = record_logits.run_model(theirs, families.Twin(name))  # and gives it its weights
    twin = families.Twin(name, **changes)
    ours = decode.generate(
        decode.make_decoder(twin.model),
        twin(random_weights(shapes)),
        PROMPTS,
        max_new_tokens=MAX_NEW_TOKENS,
        max_len=MAX_LEN,
        sampling=make_sampling(temperature=0),
        eos_id=EOS,
    )
    expected = [their_text(theirs, prompt) for prompt in PROMPTS]
    assert len({tuple(text) for text in expected}) > 1
    assert [continuation.tokens.tolist() for continuation in ours] == expected


@pytest.mark.parametrize("name", CASES)
def test_greedy_text_of_a_ragged_batch_is_transformers(name):
    check_greedy_text(name)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("mistral", dict(attention_windows=(6,))),
        ("qwen2", dict(attention_windows=())),
        ("llama", dict(rope_scaling=())),
    ],
)
def test_the_check_fails_for_another_model(name, changes):
    with pytest.raises(AssertionError):
        check_greedy_text(name, **changes)
