"""The same tiny random weights in Hugging Face's models and in ours give the same logits."""

import json

import numpy as np
import pytest

from jaxlm.interop import FAMILIES
from jaxlm.interop.mapping import config_to_hf
from jaxlm.interop.task_heads import head_to_hf
from tests.oracles import tiny_families as families
from tests.oracles import tiny_models as tiny
from tests.oracles.recorded import check_logits, get_logits, read_recorded

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


def check_family(name, **changes):
    from tests.oracles import record_logits

    twin = families.Twin(name, **changes)
    shapes, theirs = record_logits.run_family(name)
    assert twin.shapes == shapes
    ours = get_logits(twin.model, twin(tiny.random_weights(shapes)), twin.batch)
    assert ours.shape == theirs.shape
    real = np.ones(ours.shape[:2], bool) if ours.shape[1] == 1 else twin.batch["segment_ids"] > 0
    np.testing.assert_allclose(ours[real], theirs[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", families.TINY)
def test_a_family_through_its_table_has_hugging_faces_logits(name):
    check_family(name)


@pytest.mark.parametrize("name", families.WRONG)
def test_the_family_check_fails_for_other_options(name):
    for changes in families.WRONG[name]:
        with pytest.raises(AssertionError):
            check_family(name, **changes)


@pytest.mark.parametrize("name", families.TINY)
def test_what_is_written_is_the_same_model_to_transformers(name):
    """The config.json and the weights that come back out, in a model of transformers made from them."""
    import transformers

    from tests.oracles import record_logits

    twin = families.Twin(name)
    original = record_logits.make_family_model(twin)
    shapes, expected = record_logits.run_model(original, twin)
    written = config_to_hf(FAMILIES[twin.tiny.model_type], twin.config)
    if twin.head is not None:
        architecture, about = head_to_hf(FAMILIES[twin.tiny.model_type], twin.head, twin.kind)
        assert architecture == twin.tiny.architecture
        written |= about
    written = json.loads(json.dumps(written))
    model_type = written.pop("model_type")
    config = transformers.AutoConfig.for_model(model_type, **written)
    config._attn_implementation = "eager"
    config.pad_token_id = original.config.pad_token_id  # the tokenizer's matter
    again = type(original)(config).eval()
    weights = twin.back(twin(tiny.random_weights(shapes)))
    _, found = record_logits.run_model(again, twin, weights)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", families.TINY)
def test_the_recorded_logits_of_a_family_are_still_what_transformers_gives(name):
    from tests.oracles import record_logits

    now, recorded = record_logits.record_family(name), read_recorded()["families"][name]
    np.testing.assert_allclose(now, recorded, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_recorded_logits_are_still_what_transformers_gives(name):
    from tests.oracles import record_logits

    now, recorded = record_logits.record(name), read_recorded()[name]
    assert now["shapes"] == recorded["shapes"] and now["positions"] == recorded["positions"]
    np.testing.assert_allclose(now["logits"], recorded["logits"], atol=1e-5, rtol=1e-4)
