"""The same tiny random weights in Hugging Face's models and in ours give the same logits."""

import numpy as np
import pytest

from tests.oracles import tiny_models as tiny
from tests.oracles.recorded import check_logits, read_recorded

pytestmark = pytest.mark.oracles
pytest.importorskip("torch", reason="torch is missing: bash tools/check.sh --oracles")
pytest.importorskip("transformers", reason="transformers is missing: bash tools/check.sh --oracles")


def check(name, **changes):
    from tests.oracles import record_logits

    shapes, logits = record_logits.run(name)
    every = [list(range(logits.shape[1]))] * len(logits)
    check_logits(name, {"shapes": shapes, "positions": every, "logits": logits}, **changes)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_our_logits_are_hugging_faces(name):
    check(name)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("gpt2", dict(activation="gelu")),
        ("bert", dict(norm_eps=1e-3)),
        ("qwen3", dict(rope_theta=9000.0)),
        ("llama3", dict(rope_scaling=())),
    ],
)
def test_the_check_fails_for_another_option(name, changes):
    with pytest.raises(AssertionError, match="Not equal"):
        check(name, **changes)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_recorded_logits_are_still_what_transformers_gives(name):
    from tests.oracles import record_logits

    now, recorded = record_logits.record(name), read_recorded()[name]
    assert now["shapes"] == recorded["shapes"] and now["positions"] == recorded["positions"]
    np.testing.assert_allclose(now["logits"], recorded["logits"], atol=1e-5, rtol=1e-4)
