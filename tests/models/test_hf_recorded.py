"""Our models give the logits that transformers gave for the same weights: the oracles, without torch."""

import pytest

from tests.oracles import tiny_families as families
from tests.oracles import tiny_models as tiny
from tests.oracles.recorded import check_family_logits, check_logits, read_recorded


@pytest.mark.parametrize("name", tiny.MODELS)
def test_logits_are_the_recorded_ones_of_hugging_face(name):
    check_logits(name, read_recorded()[name])


@pytest.mark.parametrize(
    "name, changes",
    [
        ("gpt2", dict(activation="gelu")),
        ("bert", dict(norm_position="pre")),
        ("qwen3", dict(qk_norm=False)),
        ("llama3", dict(rope_scaling=())),
        ("llama3_untied", dict(norm_eps=1e-2)),
    ],
)
def test_the_check_fails_for_another_option(name, changes):
    with pytest.raises(AssertionError):
        check_logits(name, read_recorded()[name], **changes)


@pytest.mark.parametrize("name", families.TINY)
def test_a_family_has_the_recorded_logits_of_hugging_face(name):
    check_family_logits(name, read_recorded()["families"][name])


@pytest.mark.parametrize("name", families.WRONG)
def test_the_family_check_fails_for_another_option(name):
    changes = families.WRONG[name][0]  # the oracle lane tries them all
    with pytest.raises(AssertionError):
        check_family_logits(name, read_recorded()["families"][name], **changes)
