"""Models of a few thousand parameters, and what the tests ask of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.models import BERT, GPT, TransformerConfig

SIZES = dict(
    vocab_size=32,
    emb_dim=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=24,
    max_len=16,
)
MODERN = dict(norm="rms_norm", position="rotary", activation="swiglu", qk_norm=True)
CLASSIC = dict(norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True)


def make_config(**fields) -> TransformerConfig:
    return TransformerConfig(**{**SIZES, "init_std": 0.3, **fields})


def make_gpt(**fields) -> GPT:
    return GPT(make_config(**fields))


def make_bert(num_pair_classes=0, **fields) -> BERT:
    return BERT(make_config(norm_position="post", **fields), num_pair_classes)


def make_batch(seed=0, rows=2, length=12, vocab_size=32):
    """Two documents and then padding in the first row, one whole document in each other row."""
    rng = np.random.default_rng(seed)
    segment_ids = np.ones((rows, length), np.int32)
    segment_ids[0, 5:] = 2
    segment_ids[0, length - 2 :] = 0
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    positions[0, 5:] -= 5
    return {
        "tokens": jnp.asarray(rng.integers(0, vocab_size, (rows, length)), jnp.int32),
        "segment_ids": jnp.asarray(segment_ids),
        "positions": jnp.asarray(positions),
    }


def init_params(model, batch, seed=0):
    """Random parameters, biases and scales too, so that no part of them can be forgotten unseen.

    Drawn by numpy: a compiled threefry for each of them would take longer than the test.
    """
    rng = np.random.default_rng(seed)
    boxed = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]

    def draw(path, leaf):
        is_scale = path[-1].key in ("scale", "query_norm", "key_norm")
        values = rng.normal(1.0 if is_scale else 0.0, 0.3, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(boxed))


def run(model, params, batch, **kwargs):
    """Outputs of the compiled model (uncompiled, its loop over layers is slow)."""
    return jax.jit(lambda p, b: model.apply({"params": p}, b, **kwargs))(params, batch)


def get_logits(model, params, batch, **kwargs):
    out = model.apply({"params": params}, batch, **kwargs)
    logits = jnp.einsum("...d,vd->...v", out.hidden, out.unembed.astype(out.hidden.dtype))
    if out.unembed_bias is not None:
        logits = logits + out.unembed_bias[None, None]
    return out.softcap * jnp.tanh(logits / out.softcap) if out.softcap else logits


def get_loss(model, params, batch, **kwargs):
    """A loss that depends on every real position: the mean square of log probabilities of the tokens."""
    logs = jax.nn.log_softmax(get_logits(model, params, batch, **kwargs).astype(jnp.float32))
    picked = jnp.take_along_axis(logs, batch["tokens"][..., None], axis=-1)[..., 0]
    return jnp.mean(jnp.where(batch["segment_ids"] > 0, picked**2, 0.0))


def is_close(a, b, tolerance=1e-5) -> bool:
    """Whether all leaves are within `tolerance` of each other, relative to the largest value of the leaf."""
    flat_a, flat_b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(flat_a) == len(flat_b)
    return all(
        np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max()
        <= tolerance * max(1.0, np.abs(np.asarray(x, np.float64)).max())
        for x, y in zip(flat_a, flat_b, strict=True)
    )


def equations(jaxpr):
    """All equations of a jaxpr, inner ones included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)
