"""The laws of the optimizers: per layer, float32, and equal to plain optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from jaxlm.models.bert import BERT
from jaxlm.models.gpt import GPT
from jaxlm.models.transformer import TransformerConfig
from jaxlm.parallel.mesh import logical_axes, path_names
from jaxlm.training.optimizers import (
    OPTIMIZERS,
    clip_scale,
    ema_update,
    global_norm,
    is_axes,
    is_decayed,
    make_optimizer,
    map_axes,
    muon_dimensions,
)

pytestmark = pytest.mark.core

LAYERS, WIDTH, HEADS, HEAD_DIM, MLP, VOCAB, EXPERTS = 3, 128, 2, 6, 130, 16, 2
LEARNING_RATE = 0.02
HYPER = {
    "adamw": dict(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1),
    "adafactor": {},
    "lion": dict(b1=0.9, b2=0.98, weight_decay=0.2),
    "lamb": dict(b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.1),
    "muon": dict(
        momentum=0.95,
        nesterov=True,
        ns_steps=5,
        weight_decay=0.1,
        adam_learning_rate_ratio=0.3,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
    ),
    "sgd": dict(momentum=0.9),
}

# One layer and the rest of a toy model: every kind of parameter that the models have.
LAYER = {
    "attention": {
        "query": ((WIDTH, HEADS, HEAD_DIM), ("embed", "heads", "head_dim")),
        "query_bias": ((HEADS, HEAD_DIM), ("heads", "head_dim")),
        "out": ((HEADS, HEAD_DIM, WIDTH), ("heads", "head_dim", "embed")),
        "out_bias": ((WIDTH,), ("norm",)),
    },
    "mlp": {
        "up": ((WIDTH, MLP), ("embed", "mlp")),
        "up_bias": ((MLP,), ("mlp",)),
        "down": ((MLP, WIDTH), ("mlp", "embed")),
    },
    "experts": {str(e): {"up": ((WIDTH, MLP), ("embed", "mlp"))} for e in range(EXPERTS)},
    "norm": {"scale": ((WIDTH,), ("norm",))},
}
REST = {
    "embed": {
        "embedding": ((VOCAB, WIDTH), ("vocab", "embed")),
        "token_types": ((2, WIDTH), (None, "embed")),
    },
    "final_norm": {"scale": ((WIDTH,), ("norm",))},
}


def is_spec(x):
    return isinstance(x, tuple) and len(x) == 2 and is_axes(x[1])


def unstacked(part):
    """Part 0 (shapes) or 1 (axes) of a model whose layers are separate trees."""
    specs = {"layers": {str(i): LAYER for i in range(LAYERS)}, **REST}
    return jax.tree.map(lambda spec: spec[part], specs, is_leaf=is_spec)


def stack(tree, axis=0):
    """Separate layers, and separate experts in them -> one tree with an axis of each."""
    join = lambda trees, axis: jax.tree.map(lambda *leaves: np.stack(leaves, axis), *trees)
    layers = join([tree["layers"][str(i)] for i in range(LAYERS)], axis)
    experts = join([layers["experts"][str(e)] for e in range(EXPERTS)], axis + 1)
    return {**tree, "layers": {**layers, "experts": experts}}


def stacked_axes():
    axes = unstacked(1)
    layer = axes["layers"]["0"]
    experts = map_axes(lambda a: ("expert", *a), layer["experts"]["0"])
    layers = map_axes(lambda a: ("layers", *a), {**layer, "experts": experts})
    return {**axes, "layers": layers}


def random_tree(seed):
    """Values of very different scale from layer to layer, and expert to expert, so that mixing them up shows."""
    rng = np.random.default_rng(seed)

    def make(path, shape):
        names = path_names(path)
        scale = 10.0 ** int(names[1]) if names[0] == "layers" else 0.5
        scale *= 30.0 ** int(names[3]) if "experts" in names else 1.0
        return np.asarray(scale * rng.standard_normal(shape), np.float32)

    shapes = unstacked(0)
    return jax.tree_util.tree_map_with_path(
        make, shapes, is_leaf=lambda x: isinstance(x, tuple) and isinstance(x[0], int)
    )


def train(optimizer, params, all_grads, learning_rate=LEARNING_RATE):
    """The updates, a leading axis for the steps; directions are applied with -learning_rate."""

    def step(carry, grads):
        params, state = carry
        directions, state = optimizer.update(grads, state, params)
        updates = jax.tree.map(lambda d: -learning_rate * d, directions)
        return (optax.apply_updates(params, updates), state), updates

    @jax.jit
    def run(params, all_grads):
        return jax.lax.scan(step, (params, optimizer.init(params)), all_grads)[1]

    return jax.device_get(run(params, all_grads))


@functools.cache
def problem():
    """Parameters, and the gradients of 5 steps on a leading axis."""
    all_grads = [random_tree(1 + i) for i in range(5)]
    return random_tree(0), jax.tree.map(lambda *grads: np.stack(grads), *all_grads)


def assert_equal(found, expected, rtol=2e-4):
    """Equal up to float32 rounding, relative to the largest entry of each array."""

    def compare(path, a, b):
        scale = max(float(np.max(np.abs(b))), 1e-12)
        np.testing.assert_allclose(
            a / scale, b / scale, atol=rtol, rtol=0, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree_util.tree_map_with_path(compare, found, expected)


# --- stacked and unstacked --------------------------------------------------------------------------------------------


def check_stacked_equals_unstacked(make):
    """make(axes) -> optimizer. Updates of 5 steps are equal, layer by layer."""
    params, all_grads = problem()
    single = train(make(unstacked(1)), params, all_grads)
    stacked = train(make(stacked_axes()), stack(params), stack(all_grads, axis=1))
    # Layer by layer, since the scales of the layers are far apart.
    layers = {str(i): jax.tree.map(lambda x: x[:, i], stacked["layers"]) for i in range(LAYERS)}
    for layer in layers.values():
        joined = layer["experts"]
        layer["experts"] = {str(e): jax.tree.map(lambda x: x[:, e], joined) for e in range(EXPERTS)}
    assert_equal({**stacked, "layers": layers}, single)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_and_unstacked_layers_get_equal_updates(name):
    check_stacked_equals_unstacked(lambda axes: make_optimizer(name, axes=axes, **HYPER[name]))


NAIVE = {
    "lamb": lambda axes: optax.lamb(-1.0),
    "adafactor": lambda axes: optax.adafactor(-1.0),
    "muon": lambda axes: contrib.muon(-1.0),
    "decay by ndim": lambda axes: optax.adamw(
        -1.0, weight_decay=0.1, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    ),
}


@pytest.mark.parametrize("name", NAIVE)
def test_plain_optax_on_stacked_layers_breaks_that_law(name):
    with pytest.raises(AssertionError):
        check_stacked_equals_unstacked(NAIVE[name])


# --- against plain optax ----------------------------------------------------------------------------------------------


def plain(name):
    """The optimizer as optax has it, learning rate and all, for an unstacked model."""
    axes, hyper, rate = unstacked(1), dict(HYPER[name]), LEARNING_RATE
    mask = map_axes(is_decayed, axes)
    if name == "muon":
        return plain_muon(axes, mask, rate, hyper)
    if name == "adafactor":
        return optax.adafactor(rate)
    if name == "sgd":
        return optax.sgd(rate, momentum=hyper["momentum"])
    return getattr(optax, name)(rate, **hyper, mask=mask)


def plain_muon(axes, mask, rate, hyper):
    decay, ratio = hyper["weight_decay"], hyper["adam_learning_rate_ratio"]
    muon = contrib.muon(
        rate,
        beta=hyper["momentum"],
        nesterov=hyper["nesterov"],
        ns_steps=hyper["ns_steps"],
        eps=hyper["eps"],
        weight_decay=decay,
        muon_weight_dimension_numbers=map_axes(muon_dimensions, axes),
    )
    adam = {key: hyper[key] for key in ("b1", "b2", "eps")}
    adam = optax.adamw(rate * ratio, **adam, weight_decay=decay, mask=mask)
    labels = map_axes(lambda a: "muon" if muon_dimensions(a) else "adam", axes)

    def update(grads, state, params):  # all by both, then the one that each parameter wants
        by_muon, muon_state = muon.update(grads, state[0], params)
        by_adam, adam_state = adam.update(grads, state[1], params)
        pick = lambda label, m, a: m if label == "muon" else a
        return jax.tree.map(pick, labels, by_muon, by_adam), (muon_state, adam_state)

    init = lambda params: (muon.init(params), adam.init(params))
    return optax.GradientTransformation(init, update)


def check_equals_plain_optax(name, optimizer):
    params, all_grads = problem()
    ours = train(optimizer, params, all_grads)
    theirs = train(plain(name), params, all_grads, learning_rate=-1.0)
    assert_equal(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_unstacked_model_is_updated_as_by_plain_optax(name):
    check_equals_plain_optax(name, make_optimizer(name, axes=unstacked(1), **HYPER[name]))


def test_another_weight_decay_is_not_plain_optax():
    other = HYPER["adamw"] | {"weight_decay": 0.11}
    with pytest.raises(AssertionError):
        check_equals_plain_optax("adamw", make_optimizer("adamw", axes=unstacked(1), **other))


# --- what decays and what is a matrix ---------------------------------------------------------------------------------


def test_matrices_and_embeddings_decay_and_biases_and_norms_do_not():
    params = stack(problem()[0])
    optimizer = make_optimizer("adamw", axes=stacked_axes(), **HYPER["adamw"])
    zeros = jax.tree.map(lambda p: np.zeros((1, *p.shape), p.dtype), params)
    moved = {
        "/".join(path_names(path))
        for path, update in jax.tree_util.tree_leaves_with_path(train(optimizer, params, zeros))
        if np.any(update != 0)
    }
    assert moved == {
        "embed/embedding",
        "embed/token_types",
        "layers/attention/query",
        "layers/attention/out",
        "layers/mlp/up",
        "layers/mlp/down",
        "layers/experts/up",
    }


def test_the_models_biases_and_norms_do_not_decay_and_all_else_does():
    config = TransformerConfig(
        vocab_size=8,
        emb_dim=4,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        mlp_dim=8,
        max_len=4,
        norm_bias=True,
        qk_norm=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        activation="swiglu",
        num_token_types=2,
        tie_embeddings=False,
    )
    batch = {"tokens": jnp.zeros((1, 4), jnp.int32)}
    for model in (GPT(config), BERT(config, num_pair_classes=2)):
        axes = logical_axes(jax.eval_shape(model.init, jax.random.key(0), batch)["params"])
        decays = map_axes(is_decayed, axes)
        for path, decayed in jax.tree_util.tree_leaves_with_path(decays):
            name = path_names(path)[-1]
            is_vector = name == "scale" or name.endswith(("bias", "_norm"))
            assert decayed != is_vector, path


def test_muon_takes_the_layers_matrices_with_their_rows_and_columns():
    numbers = map_axes(muon_dimensions, stacked_axes())
    layers = numbers["layers"]
    assert layers["attention"]["query"] == ((1,), (2, 3))
    assert layers["attention"]["out"] == ((1, 2), (3,))
    assert layers["mlp"]["up"] == layers["mlp"]["down"] == ((1,), (2,))
    others = [layers["norm"], layers["mlp"]["up_bias"], layers["attention"]["query_bias"]]
    assert jax.tree.leaves([others, numbers["embed"], numbers["final_norm"]]) == []


# --- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_arrays_of_a_parameters_size_have_its_path_and_shape(name):
    params = stack(problem()[0])
    state = jax.eval_shape(make_optimizer(name, axes=stacked_axes(), **HYPER[name]).init, params)
    known = {path_names(path): p.shape for path, p in jax.tree_util.tree_leaves_with_path(params)}
    smallest = LAYERS * WIDTH * MLP
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        names = path_names(path)
        mirrored = [known[names[i:]] for i in range(len(names)) if names[i:] in known]
        assert leaf.size < smallest or mirrored == [leaf.shape], names


def test_adafactor_keeps_rows_and_columns_of_each_layers_matrix():
    params = stack(problem()[0])
    state = jax.eval_shape(make_optimizer("adafactor", axes=stacked_axes()).init, params)
    assert state[0].v_row["layers"]["mlp"]["up"].shape == (LAYERS, WIDTH)
    assert state[0].v_col["layers"]["mlp"]["up"].shape == (LAYERS, MLP)
    assert jax.tree.structure(state[0].v) == jax.tree.structure(params)


# --- float32 ----------------------------------------------------------------------------------------------------------


def is_jaxpr(x):
    return hasattr(x, "eqns")


def float_dtypes(jaxpr):
    """All floating-point types of the values in a jaxpr and the jaxprs inside it."""
    found = set()
    for equation in jaxpr.eqns:
        types = [v.aval.dtype for v in (*equation.invars, *equation.outvars)]
        found |= {str(t) for t in types if jnp.issubdtype(t, jnp.floating)}
        for inner in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                found |= float_dtypes(getattr(inner, "jaxpr", inner))
    return found


def check_float32(optimizer):
    params = stack(problem()[0])
    state = jax.eval_shape(optimizer.init, params)
    jaxpr = jax.make_jaxpr(optimizer.update)(params, state, params)
    assert float_dtypes(jaxpr.jaxpr) == {"float32"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_arithmetic_is_float32(name):
    check_float32(make_optimizer(name, axes=stacked_axes(), **HYPER[name]))


def test_a_bfloat16_momentum_breaks_that_law():
    with pytest.raises(AssertionError):
        check_float32(optax.scale_by_adam(mu_dtype=jnp.bfloat16))


# --- errors -----------------------------------------------------------------------------------------------------------


def test_all_wrong_hyperparameters_are_listed_at_once():
    with pytest.raises(ValueError) as error:
        make_optimizer("adamw", axes={}, b1=0.9, eps=1e-8, momentum=0.9)
    for word in ("b2 is missing", "weight_decay is missing", "momentum=0.9 is not an option"):
        assert word in str(error.value)


def test_an_unknown_optimizer_lists_the_known_ones():
    with pytest.raises(ValueError, match="adamw, adafactor, lion, lamb, muon, sgd"):
        make_optimizer("adam", axes={})


# --- clipping ---------------------------------------------------------------------------------------------------------


def check_clipping(clip):
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    clipped, norm = clip(grads, 1.0)
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, 5.0, rtol=1e-6)
    np.testing.assert_allclose(optax.tree.norm(clipped), 1.0, rtol=1e-6)
    for max_norm in (0.0, 5.1):
        same, norm = clip(grads, max_norm)
        np.testing.assert_allclose(norm, 5.0, rtol=1e-6)
        assert_equal(same, grads, rtol=0)
    nothing, norm = clip(jax.tree.map(jnp.zeros_like, grads), 1.0)
    assert norm == 0 and not jnp.any(nothing["a"])
    # 2**16 ones have norm 256; in bfloat16 their running sum would stop at 256.
    ones = {"a": jnp.ones(2**16, jnp.bfloat16)}
    clipped, norm = clip(ones, 1.0)
    np.testing.assert_allclose(norm, 256.0, rtol=1e-5)


def clip_by_global_norm(grads, max_norm):
    norm = global_norm(grads)
    return jax.tree.map(lambda g: g * clip_scale(norm, max_norm), grads), norm


def test_clipping_keeps_the_direction_and_bounds_the_global_norm():
    check_clipping(clip_by_global_norm)


def test_a_norm_is_summed_in_float32_whatever_the_arrays_are():
    tree = {"w": jnp.ones((400, 400), jnp.float16)}  # which ends at 65,504
    assert global_norm(tree) == 400.0
    assert not jnp.isfinite(optax.tree.norm(tree))


def test_clipping_each_array_alone_breaks_that_law():
    def each_alone(grads, max_norm):
        pairs = jax.tree.map(lambda g: clip_by_global_norm(g, max_norm)[0], grads)
        return pairs, clip_by_global_norm(grads, 0.0)[1]

    with pytest.raises(AssertionError):
        check_clipping(each_alone)


# --- EMA --------------------------------------------------------------------------------------------------------------


def check_ema(update):
    """Without warm-up the closed form; with it a random start is forgotten."""
    ema = {"w": jnp.zeros(2)}
    params = {"w": jnp.ones(2)}
    for step in range(10):
        ema = update(ema, params, 0.9, step, warmup=False)
    np.testing.assert_allclose(ema["w"], 1 - 0.9**10, rtol=1e-5)
    ema = {"w": jnp.full(2, 100.0)}
    for step in range(300):
        ema = update(ema, params, 0.9999, step, warmup=True)
    np.testing.assert_allclose(ema["w"], 1.0, rtol=1e-3)


def test_ema_is_the_weighted_mean_of_the_parameters_seen():
    check_ema(ema_update)


def test_ema_without_its_warmup_breaks_that_law():
    def never_warm(ema, params, decay, step, *, warmup):
        return ema_update(ema, params, decay, step, warmup=False)

    with pytest.raises(AssertionError):
        check_ema(never_warm)


def test_ema_keeps_its_dtype_and_is_computed_in_float32():
    old, new = {"w": jnp.ones(1, jnp.bfloat16)}, {"w": jnp.full(1, 2.0, jnp.bfloat16)}
    average = ema_update(old, new, 0.5, 1000)
    assert average["w"].dtype == jnp.bfloat16 and average["w"][0] == 1.5
