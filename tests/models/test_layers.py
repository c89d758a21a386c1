"""The parts alone, against formulas written in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxlm.models import attention, layers
from tests.models.tiny import equations, get_loss, init_params, make_batch, make_bert, make_gpt, run


def numpy_attention(query, key, value, mask, softcap=0.0):
    """One head at a time, in float64."""
    batch, length, heads, head_dim = query.shape
    out = np.zeros((batch, length, heads, head_dim))
    for b in range(batch):
        for n in range(heads):
            k = n // (heads // key.shape[2])
            scores = query[b, :, n] @ key[b, :, k].T / np.sqrt(head_dim)
            scores = softcap * np.tanh(scores / softcap) if softcap else scores
            scores = np.where(mask[b], scores, -np.inf)
            out[b, :, n] = scipy.special.softmax(scores, axis=-1) @ value[b, :, k]
    return out


def check_attention(attend, num_kv_heads, softcap=0.0):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 6, 4, 8)).astype(np.float32) * 3
    key, value = (rng.normal(size=(2, 6, num_kv_heads, 8)).astype(np.float32) for _ in range(2))
    mask = rng.random((2, 6, 6)) < 0.5
    mask |= np.eye(6, dtype=bool)[None]
    found = attend(query, key, value, mask, softcap=softcap)
    np.testing.assert_allclose(
        found, numpy_attention(query, key, value, mask, softcap), atol=2e-6, rtol=1e-5
    )


@pytest.mark.core
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_is_the_formula(num_kv_heads, softcap):
    check_attention(attention.attend_xla, num_kv_heads, softcap)


def test_the_attention_check_fails_for_interleaved_heads_and_for_unscaled_scores():
    def interleaved(query, *rest, **kwargs):
        order = np.array([0, 2, 1, 3])
        return attention.attend_xla(query[:, :, order], *rest, **kwargs)[:, :, order]

    unscaled = lambda query, *rest, **kw: attention.attend_xla(query * 8**0.5, *rest, **kw)
    for wrong in (interleaved, unscaled):
        with pytest.raises(AssertionError):
            check_attention(wrong, num_kv_heads=2)


def test_the_mask_is_the_drawing():
    found = layers.attention_mask(jnp.array([[1, 1, 2, 2, 0]]), causal=True)
    drawing = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(found[0], np.array(drawing, bool))


def check_rotation(rotate):
    """A score depends on the distance of two positions only, and lengths are kept (arXiv:2104.09864, eq. 11)."""
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))
    at = lambda p: layers.rotary_table(jnp.array([[p]]), 8, 10000.0)
    score = lambda i, j: jnp.sum(rotate(query, at(i)) * rotate(key, at(j)))
    assert score(5, 2) == pytest.approx(float(score(103, 100)), abs=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-3
    assert jnp.linalg.norm(rotate(query, at(9))) == pytest.approx(float(jnp.linalg.norm(query)))


def test_rotary_scores_depend_on_the_distance_only():
    check_rotation(layers.rotate)


def test_the_rotation_check_fails_for_a_wrong_sign():
    def wrong(x, table):
        first, second = jnp.split(x, 2, axis=-1)
        cos, sin = (t[:, :, None, :] for t in table)
        return jnp.concatenate([first * cos + second * sin, second * cos + first * sin], axis=-1)

    with pytest.raises(AssertionError):
        check_rotation(wrong)


def test_linear_rope_scaling_divides_positions():
    far = layers.rotary_table(jnp.array([[8]]), 8, 10000.0, (4.0,))
    near = layers.rotary_table(jnp.array([[2]]), 8, 10000.0)
    np.testing.assert_allclose(far, near, atol=1e-6)


def test_scaled_rotary_frequencies_keep_the_fast_and_stretch_the_slow():
    plain = layers.rotary_frequencies(128, 500000.0)
    scaled = layers.rotary_frequencies(128, 500000.0, (8.0, 1.0, 4.0, 8192.0))
    np.testing.assert_allclose(scaled[:20], plain[:20], rtol=1e-6)
    np.testing.assert_allclose(scaled[-20:], plain[-20:] / 8, rtol=1e-6)
    assert np.all(np.diff(np.asarray(scaled)) < 0)


def check_projection(project):
    """Value and gradients are those of a tensordot, for outputs wider and narrower than inputs."""
    rng = np.random.default_rng(0)
    cases = (((2, 3, 8), (8, 2, 6), 1), ((2, 3, 2, 6), (2, 6, 8), 2), ((4, 8), (8, 5), 1))
    for x_shape, kernel_shape, axes in cases:
        x, kernel = (rng.normal(size=s).astype(np.float32) for s in (x_shape, kernel_shape))
        run = lambda f: jax.value_and_grad(
            lambda *a, f=f, n=axes: jnp.sum(jnp.sin(f(*a, n))), argnums=(0, 1)
        )(x, kernel)
        for found, expected in zip(
            jax.tree.leaves(run(project)), jax.tree.leaves(run(jnp.tensordot)), strict=True
        ):
            np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("merge_rows", [True, False])
def test_a_projection_has_the_gradients_of_a_tensordot(merge_rows):
    check_projection(functools.partial(layers.project, merge_rows=merge_rows))


def test_the_projection_check_fails_for_a_gradient_of_half_the_size():
    half = lambda x, k, n: (
        (jnp.tensordot(x, k, n) + jax.lax.stop_gradient(jnp.tensordot(x, k, n))) / 2
    )
    with pytest.raises(AssertionError):
        check_projection(half)


def check_norm(kind, normalise):
    """(x, scale, bias) -> (x - mean) / deviation * scale + bias, without mean and bias for the RMS norm."""
    rng = np.random.default_rng(0)
    x = rng.normal(2.0, 3.0, (2, 3, 16)).astype(np.float32)
    scale, bias = rng.normal(1.0, 0.5, (2, 16)).astype(np.float32)
    centred = x - x.mean(-1, keepdims=True) if kind == "layer_norm" else x
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale
    expected += bias if kind == "layer_norm" else 0
    np.testing.assert_allclose(normalise(x, scale, bias), expected, atol=1e-5)


def our_norm(kind, eps=1e-5, offset=0.0, stored_offset=None):
    def normalise(x, scale, bias):
        has_bias = kind == "layer_norm"
        stored = scale - (offset if stored_offset is None else stored_offset)
        params = {"scale": stored} | ({"bias": bias} if has_bias else {})
        norm = layers.Norm(kind, eps, has_bias, "float32", "float32", offset)
        return norm.apply({"params": jax.tree.map(jnp.asarray, params)}, jnp.asarray(x))

    return normalise


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_norms_are_the_formulas(kind):
    check_norm(kind, our_norm(kind))
    check_norm(kind, our_norm(kind, offset=1.0))


@pytest.mark.parametrize("kind, wrong", [("layer_norm", "rms_norm"), ("rms_norm", "layer_norm")])
def test_the_norm_check_fails_for_the_other_norm_and_another_epsilon(kind, wrong):
    unshifted = our_norm(kind, offset=1.0, stored_offset=0.0)
    for normalise in (our_norm(wrong), our_norm(kind, eps=1e-2), unshifted):
        with pytest.raises(AssertionError):
            check_norm(kind, normalise)


def check_activation(name, activate):
    x = np.linspace(-4, 4, 41, dtype=np.float32)
    sigmoid = 1 / (1 + np.exp(-x))
    tanh_gelu = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    expected = {
        "gelu": x * scipy.special.ndtr(x),
        "gelu_tanh": tanh_gelu,
        "relu": np.maximum(x, 0),
        "relu2": np.maximum(x, 0) ** 2,
        "swiglu": x * sigmoid,
        "geglu": x * scipy.special.ndtr(x),
        "geglu_tanh": tanh_gelu,
    }
    assert set(expected) == set(layers.ACTIVATIONS)
    np.testing.assert_allclose(activate(x), expected[name], atol=1e-5)


# Of the gate alone.
SAME = {"gelu": "geglu", "geglu": "gelu", "gelu_tanh": "geglu_tanh", "geglu_tanh": "gelu_tanh"}


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations_are_the_formulas_and_no_other_passes(name):
    check_activation(name, layers.ACTIVATIONS[name])
    for other in set(layers.ACTIVATIONS) - {name, SAME.get(name)}:
        with pytest.raises(AssertionError):
            check_activation(name, layers.ACTIVATIONS[other])


def check_dropout(dropout):
    x = jnp.ones((400, 100))
    dropped = dropout(x, 0.25, jax.random.key(0))
    assert float((dropped == 0).mean()) == pytest.approx(0.25, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)
    assert dropout(x, 0.25, None) is x


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    check_dropout(layers.dropout)


def test_the_dropout_check_fails_without_scaling_and_for_the_share_kept():
    unscaled = lambda x, rate, key: (
        x if key is None else x * jax.random.bernoulli(key, 1 - rate, x.shape)
    )
    swapped = lambda x, rate, key: layers.dropout(x, 1 - rate, key)
    for wrong in (unscaled, swapped):
        with pytest.raises(AssertionError):
            check_dropout(wrong)


def check_bits(bits):
    """Of 64 keys and 4,096 elements: bits that are balanced, and that neither neighbours nor keys nor each other foretell.

    bits: (key, shape) -> uint32. Each bound is six standard deviations of a fair coin, over all pairs that are looked at.
    """
    rows = np.stack([np.asarray(bits(jax.random.key(seed), (64, 64))) for seed in range(64)])
    coins = np.unpackbits(rows.reshape(64, 4096).astype(">u4").view(np.uint8), axis=-1) * 2.0 - 1
    coins = coins.reshape(64, 4096, 32)
    bound = lambda count: 6 / np.sqrt(count)
    assert np.abs(coins.mean((0, 1))).max() < bound(64 * 4096)  # each bit
    for step in (1, 2, 64, 1024):  # neighbours along a row, a column
        assert np.abs((coins[:, step:] * coins[:, :-step]).mean((0, 1))).max() < bound(
            64 * (4096 - step)
        )
    top = coins[..., 0]  # what decides at a rate of a half
    between = np.abs(top @ top.T / 4096 - np.eye(64)).max()
    assert between < bound(4096)  # keys
    pairs = np.abs(np.einsum("kni,knj->ij", coins, coins) / (64 * 4096) - np.eye(32)).max()
    assert pairs < bound(64 * 4096)  # bits of one element


def test_hashed_bits_are_as_good_as_jaxs_for_masks():
    check_bits(layers.hashed_bits)
    check_bits(jax.random.bits)


def test_the_check_of_bits_fails_for_half_a_hash_and_for_half_a_key():
    index = jnp.arange(4096, dtype=jnp.uint32).reshape(64, 64)
    word = lambda key, n: jax.random.key_data(key)[n]
    without_mixing = lambda key, shape: (
        (index ^ word(key, 0)) * np.uint32(0x9E3779B1) ^ word(key, 1)
    )
    one_round = lambda key, shape: (index ^ index >> 16 ^ word(key, 0)) * np.uint32(0x7FEB352D)
    same_for_all = lambda key, shape: layers.hashed_bits(jax.random.key(0), shape)
    for wrong in (without_mixing, one_round, same_for_all):
        with pytest.raises(AssertionError):
            check_bits(wrong)


def test_hashed_bits_are_those_of_the_formula_in_whole_numbers():
    """Of an element whose index in its array is 2 * 15 + 1 * 5 + 4 = 39."""
    key = jax.random.key(7)
    words = [int(word) for word in jax.random.key_data(key)]

    def lowbias32(x):
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    bits = layers.hashed_bits(key, (3, 3, 5))
    assert int(bits[2, 1, 4]) == lowbias32(lowbias32(39 ^ words[0]) ^ words[1])


# key_data, which the mask is made from, is random_unwrap.
RANDOM = ("random_bits", "random_unwrap", "threefry2x32", "random_wrap", "random_fold_in")


def random_operations(model, **kwargs):
    batch = make_batch()
    params = init_params(model, batch)
    jaxpr = jax.make_jaxpr(lambda p: get_loss(model, p, batch, **kwargs))(params)
    return [e.primitive.name for e in equations(jaxpr.jaxpr) if e.primitive.name in RANDOM]


def test_without_dropout_no_random_operation_is_emitted():
    training = dict(deterministic=False, rngs={"dropout": jax.random.key(0)})
    dropping = make_gpt(dropout_rate=0.1, attention_dropout_rate=0.1)
    assert random_operations(dropping, **training)
    assert not random_operations(dropping)
    masks = lambda model: random_operations(model, **training).count("random_unwrap")
    assert masks(dropping) and not masks(make_gpt())


def test_every_layer_drops_other_values():
    model = make_gpt(
        dropout_rate=0.5, emb_dim=64, zero_init_out=False, position="none", num_layers=2
    )
    batch = make_batch()
    params = init_params(model, batch)

    def hidden(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return run(model, params, batch, deterministic=False, rngs=rngs).hidden

    np.testing.assert_array_equal(hidden(0), hidden(0))
    assert not np.allclose(hidden(0), hidden(1))
    both = {**params, "layers": jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), params["layers"])}
    jaxpr = jax.make_jaxpr(
        lambda p: (
            model.apply(
                {"params": p}, batch, deterministic=False, rngs={"dropout": jax.random.key(0)}
            ).hidden
        )
    )(both)
    scans = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "scan"]
    assert any("key<fry>[2]" in str(v.aval) for e in scans for v in e.invars), (
        "the layers share one key"
    )


# --- float32 where it matters -----------------------------------------------------------------------------------------

SENSITIVE = ("exp", "log", "rsqrt", "sqrt", "sin", "cos", "reduce_sum", "reduce_max", "cumsum")


def check_float32(model, batch):
    """No sensitive operation of the forward or the backward pass reads anything but float32."""
    params = init_params(model, batch)
    grad = jax.make_jaxpr(jax.grad(lambda p: get_loss(model, p, batch)))(params)
    low = [
        f"{e.primitive.name} of {e.invars[0].aval.str_short()}"
        for e in equations(grad.jaxpr)
        if e.primitive.name in SENSITIVE
        and jnp.issubdtype(e.invars[0].aval.dtype, jnp.floating)
        and e.invars[0].aval.dtype != jnp.float32
    ]
    assert not low, f"not in float32: {low}"
    matmuls = [e for e in equations(grad.jaxpr) if e.primitive.name == "dot_general"]
    inputs = [e.invars[0].aval.dtype for e in matmuls]
    assert sum(d == jnp.bfloat16 for d in inputs) > len(inputs) / 2, "the matmuls are not bfloat16"


@pytest.mark.parametrize("remat", ["none", "full"])
def test_under_bfloat16_softmax_norms_angles_and_sums_stay_float32(remat):
    common = dict(dtype="bfloat16", norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True)
    check_float32(
        make_gpt(**common, position="rotary", qk_norm=True, attention_softcap=5.0, remat=remat),
        make_batch(),
    )
    check_float32(make_bert(num_token_types=2, **common), make_batch())


def test_the_float32_check_fails_for_a_softmax_in_bfloat16(monkeypatch):
    def wrong(query, key, value, *_, **__):
        kv = jnp.repeat(key, 2, axis=2), jnp.repeat(value, 2, axis=2)
        scores = jnp.einsum("BTNH,BSNH->BNTS", query, kv[0])
        return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores), kv[1])

    monkeypatch.setattr(attention, "attend_xla", wrong)
    with pytest.raises(AssertionError, match="not in float32"):
        check_float32(make_gpt(dtype="bfloat16"), make_batch())


def test_bfloat16_is_near_float32():
    batch = make_batch()
    params = init_params(make_gpt(), batch)
    low = run(make_gpt(dtype="bfloat16"), params, batch).hidden
    assert low.dtype == jnp.bfloat16
    high = run(make_gpt(), params, batch).hidden
    assert np.abs(np.asarray(low, np.float32) - high).max() < 0.1


# --- names ------------------------------------------------------------------------------------------------------------


def test_an_unknown_logical_axis_raises():
    with pytest.raises(ValueError, match="unknown logical axis.*btach.*known.*batch"):
        layers.constrain(jnp.zeros((2, 2)), ("btach", None))
    with pytest.raises(ValueError, match="2 logical axes"):
        layers.constrain(jnp.zeros(2), ("batch", None))


def test_every_parameter_names_every_axis():
    for model in (
        make_gpt(tie_embeddings=False, norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True),
        make_bert(num_pair_classes=2, num_token_types=2),
    ):
        boxed = jax.eval_shape(model.init, jax.random.key(0), make_batch())["params"]
        is_box = lambda x: hasattr(x, "names")
        for path, box in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box):
            name = jax.tree_util.keystr(path)
            assert is_box(box), f"{name} has no axes"
            layers.check_axes(box.names, box.value.ndim)
            assert ("layers" in box.names) == ("layers" in name), name
            assert "layers" not in box.names[1:], name
