"""Attention's probabilities and the states between layers are those that transformers' models give out."""

import jax
import numpy as np
import pytest

from jaxlm.inference import internals
from tests.oracles import tiny_families as families

pytestmark = pytest.mark.oracles
MISSING = "missing: bash tools/check.sh --oracles"
torch = pytest.importorskip("torch", reason=MISSING)
pytest.importorskip("transformers", reason=MISSING)

THEIRS = {
    "tokens": "input_ids",
    "segment_ids": "attention_mask",
    "token_types": "token_type_ids",
}
FAMILIES = ["mistral", "gemma2", "roberta", "albert", "modernbert", "distilbert", "xlnet"]


def both_insides(name, **changes):
    """((maps, states) of theirs, ours), for the two rows of the twin's batch: lists over the layers."""
    from tests.oracles import record_logits

    twin = families.Twin(name)
    theirs = record_logits.make_family_model(twin)
    shapes, _ = record_logits.run_model(theirs, twin)  # and gives it its weights
    weights = families.Twin(name)(record_logits.tiny.random_weights(shapes))
    batch = {THEIRS[k]: torch.from_numpy(v).long() for k, v in twin.batch.items()}
    with torch.no_grad():
        out = theirs(**batch, output_attentions=True, output_hidden_states=True)
    expected = [np.stack([x.numpy() for x in kind]) for kind in (out.attentions, out.hidden_states)]
    ours = families.Twin(name, **changes)
    found = jax.jit(lambda p: internals.read_inside(ours.model, p, ours.batch))(weights)
    probs, hidden = found["layers/attention/probs"], found["layers/hidden"]
    states = [found["embed/embedded"][None], hidden.reshape(-1, *hidden.shape[-3:])]
    return expected, (probs.reshape(-1, *probs.shape[-4:]), np.concatenate(states)), ours


def check_inside(name, **changes):
    (their_maps, their_states), (maps, states), twin = both_insides(name, **changes)
    real = families.REAL  # of the first row; the second has no padding
    np.testing.assert_allclose(
        maps[:, 0, :, :real, :real], their_maps[:, 0, :, :real, :real], atol=2e-5
    )
    np.testing.assert_allclose(maps[:, 1], their_maps[:, 1], atol=2e-5)
    # In pre-norm models the last of theirs is normed once more.
    last = None if twin.config.norm_position == "post" else -1
    scale = np.abs(their_states).max()
    np.testing.assert_allclose(states[:last, 1] / scale, their_states[:last, 1] / scale, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_and_states_are_transformers(name):
    check_inside(name)


@pytest.mark.parametrize(
    ("name", "change"),
    [("mistral", dict(attention_windows=())), ("gemma2", dict(attention_softcap=0.0))],
)
def test_the_check_fails_for_other_attention(name, change):
    with pytest.raises(AssertionError):
        check_inside(name, **change)
