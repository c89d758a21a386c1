"""Our logits against recorded ones."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.oracles import tiny_models as tiny


def read_recorded():
    return json.loads((Path(__file__).parent / "logits.json").read_text(encoding="utf-8"))


def check_logits(name, recorded, **changes):
    """Logits of the model `name`, with some options changed, at the recorded positions of real tokens."""
    model, convert, batch = tiny.MODELS[name](**changes)
    params = convert(tiny.random_weights(recorded["shapes"]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    expected = jax.tree.map(lambda x: x.value.shape, shapes, is_leaf=lambda x: hasattr(x, "names"))
    assert jax.tree.map(np.shape, params) == expected
    out = jax.jit(lambda p: model.apply({"params": p}, batch))(params)
    logits = jnp.einsum("BTD,VD->BTV", out.hidden, out.unembed)
    if out.unembed_bias is not None:
        logits = logits + out.unembed_bias[None, None]
    logits, real = np.asarray(logits), batch.get("segment_ids", np.ones(logits.shape[:2]))
    for row, positions in enumerate(recorded["positions"]):
        for place, theirs in zip(positions, recorded["logits"][row], strict=True):
            if real[row, place]:
                assert np.abs(theirs).max() > 0.1
                np.testing.assert_allclose(logits[row, place], theirs, atol=1e-4, rtol=1e-4)
