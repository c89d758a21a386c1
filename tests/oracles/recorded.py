"""Our logits against recorded ones."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.models.layers import apply_softcap
from tests.oracles import tiny_families as families
from tests.oracles import tiny_models as tiny


def read_recorded():
    """By name; `families` has those of tiny_families.py by name."""
    return json.loads((Path(__file__).parent / "logits.json").read_text(encoding="utf-8"))


def get_logits(model, params, batch):
    """(B, T, V), or a task head's (B, T, C), (B, E, C)."""
    out = jax.jit(lambda p: model.apply({"params": p}, batch))(params)
    if out.head_logits is not None:
        return np.asarray(out.head_logits)
    logits = jnp.einsum("BTD,VD->BTV", out.hidden, out.unembed)
    if out.unembed_bias is not None:
        logits = logits + out.unembed_bias[None, None]
    return np.asarray(apply_softcap(logits, out.softcap))


def check_family_logits(name, recorded, **changes):
    """The recorded logits, each a list [row, position, first logits…], are those of our twin of the family."""
    twin = families.Twin(name, **changes)
    logits = get_logits(twin.model, twin(tiny.random_weights(twin.shapes)), twin.batch)
    for row, position, *theirs in recorded:
        assert np.abs(theirs).max() > 0.1
        ours = logits[row, position, : len(theirs)]
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def check_logits(name, recorded, **changes):
    """Logits of the model `name`, with some options changed, at the recorded positions of real tokens."""
    model, convert, batch = tiny.MODELS[name](**changes)
    params = convert(tiny.random_weights(recorded["shapes"]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    expected = jax.tree.map(lambda x: x.value.shape, shapes, is_leaf=lambda x: hasattr(x, "names"))
    assert jax.tree.map(np.shape, params) == expected
    logits = get_logits(model, params, batch)
    real = batch.get("segment_ids", np.ones(logits.shape[:2]))
    for row, positions in enumerate(recorded["positions"]):
        for place, theirs in zip(positions, recorded["logits"][row], strict=True):
            if real[row, place]:
                assert np.abs(theirs).max() > 0.1
                np.testing.assert_allclose(logits[row, place], theirs, atol=1e-4, rtol=1e-4)
