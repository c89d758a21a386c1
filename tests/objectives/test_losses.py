"""The chunked cross-entropy is the plain one: same sums, same gradients, never all logits."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.objectives.losses import cross_entropy, plain_cross_entropy

B, T, D, V = 8, 6, 16, 40
OPTIONS = {
    "plain": {},
    "z_loss": {"z_loss": 1e-2},
    "label_smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 3.0},
    "all": {"z_loss": 1e-2, "label_smoothing": 0.2, "softcap": 4.0},
}


def make_problem(shape=(B, T), seed=0, dtype=jnp.float32, bias=True):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(*shape, D)), dtype)
    unembed = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=V), jnp.float32) if bias else None
    labels = jnp.asarray(rng.integers(0, V, shape), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 3, shape) * 0.7, jnp.float32)
    return hidden, unembed, bias, labels, weights


def total_and_gradients(loss, problem, scale=1.0, **options):
    hidden, unembed, bias, labels, weights = problem

    def total(hidden, unembed, bias):
        (total, _), metrics = loss(hidden, unembed, labels, weights, bias_V=bias, **options)
        return scale * total, (total, metrics)

    argnums = (0, 1) if bias is None else (0, 1, 2)
    step = jax.jit(jax.value_and_grad(total, argnums, has_aux=True))
    (_, aux), gradients = step(hidden, unembed, bias)
    return aux, gradients


def check_equals_plain(loss, problem, rtol=1e-5, **options):
    """Sums, metrics and gradients of `loss` are those of the definition."""
    ours = total_and_gradients(loss, problem, **options)
    expected = total_and_gradients(plain_cross_entropy, problem, **options)
    for found, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.abs(wanted.astype(jnp.float32)).max())
        np.testing.assert_allclose(
            np.asarray(found, np.float32), np.asarray(wanted, np.float32), rtol, rtol * scale
        )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunk_tokens", [0, 20])
def test_chunked_equals_plain_in_loss_and_gradient(options, chunk_tokens):
    loss = functools.partial(cross_entropy, chunk_tokens=chunk_tokens)
    check_equals_plain(loss, make_problem(), **options)


@pytest.mark.parametrize("shape", [(24,), (5, 7), (2, 3, 5)])
def test_any_label_shape_and_chunks_that_do_not_divide_it(shape):
    loss = functools.partial(cross_entropy, chunk_tokens=7)
    check_equals_plain(loss, make_problem(shape, bias=False), **OPTIONS["all"])


def test_equality_fails_without_label_smoothing_gradient():
    def wrong(*args, label_smoothing, **options):
        ours = functools.partial(cross_entropy, chunk_tokens=8)
        (total, weight), metrics = ours(*args, **options)
        (smooth, _), _ = ours(*args, label_smoothing=label_smoothing, **options)
        return (total + jax.lax.stop_gradient(smooth - total), weight), metrics

    with pytest.raises(AssertionError):
        check_equals_plain(wrong, make_problem(), label_smoothing=0.1)


def test_plain_equals_optax():
    hidden, unembed, bias, labels, weights = make_problem()
    logits = jnp.einsum("btd,vd->btv", hidden, unembed) + bias[None, None]
    per_token = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    for loss in (plain_cross_entropy, cross_entropy):
        (total, weight), metrics = loss(hidden, unembed, labels, weights, bias_V=bias)
        np.testing.assert_allclose(total, (per_token * weights).sum(), rtol=1e-5)
        np.testing.assert_allclose(metrics["nll"][0], total, rtol=1e-6)
        np.testing.assert_allclose(weight, weights.sum(), rtol=1e-6)
        hits = (logits.argmax(-1) == labels) * weights
        np.testing.assert_allclose(metrics["accuracy"][0], hits.sum(), rtol=1e-6)
    smoothed = optax.smooth_labels(jax.nn.one_hot(labels, V), 0.1)
    (total, _), _ = cross_entropy(
        hidden, unembed, labels, weights, bias_V=bias, label_smoothing=0.1
    )
    expected = (optax.softmax_cross_entropy(logits, smoothed) * weights).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def check_gradients_scale(loss):
    """Gradients of scale * total are scale times those of total, metrics give none."""
    problem = make_problem()
    _, once = total_and_gradients(loss, problem)
    _, thrice = total_and_gradients(loss, problem, scale=3.0)
    for one, three in zip(once, thrice, strict=True):
        np.testing.assert_allclose(3 * one, three, rtol=1e-5, atol=1e-6)

    hidden, unembed, bias, labels, weights = problem

    def metrics_only(hidden):
        _, metrics = loss(hidden, unembed, labels, weights, bias_V=bias)
        return sum(total for total, _ in metrics.values())

    assert not jax.grad(metrics_only)(hidden).any()


def test_gradients_scale_with_the_cotangent_and_metrics_carry_none():
    check_gradients_scale(cross_entropy)
    with pytest.raises(AssertionError):
        check_gradients_scale(plain_cross_entropy)  # its metrics have gradients


def test_gradient_of_the_weights_is_the_loss_of_each_token():
    hidden, unembed, bias, labels, weights = make_problem()

    def total(loss, weights):
        return loss(hidden, unembed, labels, weights, bias_V=bias)[0][0]

    ours = jax.grad(functools.partial(total, cross_entropy))(weights)
    plain = jax.grad(functools.partial(total, plain_cross_entropy))(weights)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_positions_of_weight_zero_count_for_nothing():
    hidden, unembed, bias, labels, weights = make_problem()
    dead = weights == 0
    other = jnp.where(dead, (labels + 1) % V, labels), jnp.where(dead[..., None], 9.0, hidden)
    first = total_and_gradients(cross_entropy, (hidden, unembed, bias, labels, weights))
    second = total_and_gradients(cross_entropy, (other[1], unembed, bias, other[0], weights))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), first, second)


def test_tied_maxima_share_the_accuracy():
    hidden, unembed, _, labels, weights = make_problem(bias=False)
    _, metrics = cross_entropy(0 * hidden, unembed, labels, weights)
    np.testing.assert_allclose(metrics["accuracy"][0] / metrics["accuracy"][1], 1 / V, rtol=1e-5)


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for leaf in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(leaf, "eqns"):
                yield from equations(leaf)


def gradient_jaxpr(loss, problem):
    return jax.make_jaxpr(lambda *args: total_and_gradients(loss, (*args, *problem[3:])))(
        *problem[:3]
    ).jaxpr


def check_no_whole_logits(loss, problem):
    """No array of the differentiated program is as large as the logits of all positions."""
    size = problem[3].size * V
    jaxpr = gradient_jaxpr(loss, problem)
    largest = max(v.aval.size for equation in equations(jaxpr) for v in equation.outvars)
    assert largest < size, f"found an array of {largest} elements; expected below {size}"


def test_whole_logits_never_exist():
    problem = make_problem((B, 16))
    for chunk_tokens in (8, 32, 64):
        check_no_whole_logits(functools.partial(cross_entropy, chunk_tokens=chunk_tokens), problem)
    with pytest.raises(AssertionError):
        check_no_whole_logits(plain_cross_entropy, problem)


def test_small_problems_make_no_loop_and_large_ones_do():
    def loops(loss, shape):
        hidden = jax.ShapeDtypeStruct((*shape, D), jnp.float32)
        unembed = jax.ShapeDtypeStruct((128_000, D), jnp.float32)
        labels = jax.ShapeDtypeStruct(shape, jnp.int32)
        weights = jax.ShapeDtypeStruct(shape, jnp.float32)
        return "scan" in str(jax.make_jaxpr(loss)(hidden, unembed, labels, weights))

    assert not loops(cross_entropy, (4, 32))
    assert loops(cross_entropy, (4, 1024))


def check_peak_memory(loss):
    """4,096 tokens x 768 against 128,000 ids: temporaries at least 4x below those of the definition.

    Compiled only; nothing of that size is made.
    """

    def temporaries(loss):
        def mean(hidden, unembed, labels, weights):
            (total, weight), _ = loss(hidden, unembed, labels, weights)
            return total / weight

        shapes = (4, 1024, 768), (128_000, 768), (4, 1024), (4, 1024)
        dtypes = jnp.float32, jnp.float32, jnp.int32, jnp.float32
        arguments = map(jax.ShapeDtypeStruct, shapes, dtypes)
        step = jax.jit(jax.value_and_grad(mean, (0, 1))).lower(*arguments).compile()
        return step.memory_analysis().temp_size_in_bytes

    assert 4 * temporaries(loss) <= temporaries(plain_cross_entropy)


def test_peak_memory_is_a_quarter_of_the_plain_one_at_most():
    check_peak_memory(cross_entropy)
    with pytest.raises(AssertionError):
        check_peak_memory(functools.partial(cross_entropy, chunk_tokens=2048))


def check_float32_inside(loss):
    """With bfloat16 hidden states, whatever has a vocabulary axis is float32, matmul inputs aside."""
    problem = make_problem(dtype=jnp.bfloat16, bias=False)
    jaxpr = gradient_jaxpr(loss, problem)

    for equation in equations(jaxpr):
        name = equation.primitive.name
        for aval in (v.aval for v in equation.outvars):
            if name in ("exp", "log", "tanh", "reduce_sum", "reduce_max", "dot_general"):
                assert aval.dtype != jnp.bfloat16, f"{name} gives {aval}"


def test_logits_and_softmax_are_float32_for_bfloat16_hidden_states():
    check_float32_inside(cross_entropy)
    check_equals_plain(cross_entropy, make_problem(dtype=jnp.bfloat16), rtol=2e-2, **OPTIONS["all"])

    def wrong(hidden, unembed, labels, weights, bias_V=None):
        logits = jnp.einsum("btd,vd->btv", hidden, unembed.astype(hidden.dtype))
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return ((nll * weights).sum(), weights.sum()), {}

    with pytest.raises(AssertionError):
        check_float32_inside(wrong)


RULES = (
    ("batch", "fsdp"),
    ("length", "context"),
    ("vocab", "tensor"),
    ("act_vocab", "tensor"),
    ("embed", "fsdp"),
)


def on_eight_devices(problem, rules, **options):
    """(the compiled gradient step, its sharded arguments): two devices share the rows and the matrix's width, two the
    length, and two the vocabulary."""

    def step(hidden, unembed, bias, labels, weights):
        problem = hidden, unembed, bias, labels, weights
        return total_and_gradients(cross_entropy, problem, **options)

    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "context", "tensor"), axis_types=auto)
    rows = PartitionSpec("fsdp", "context")
    specs = (rows, PartitionSpec("tensor", "fsdp"), PartitionSpec("tensor"), rows, rows)
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    arguments = jax.device_put(problem, shardings)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        return jax.jit(step, in_shardings=shardings).lower(*arguments).compile(), arguments


@pytest.mark.parametrize("chunk_tokens", [0, 16])
@pytest.mark.parametrize("rules", [RULES, ()], ids=["rules", "no_rules"])
def test_a_batch_over_eight_devices_gives_what_one_device_gives(chunk_tokens, rules):
    problem = make_problem()
    options = {"chunk_tokens": chunk_tokens, **OPTIONS["all"]}
    one = total_and_gradients(cross_entropy, problem, **options)
    step, arguments = on_eight_devices(problem, rules, **options)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        jax.device_get(one),
        jax.device_get(step(*arguments)),
    )


def collectives(step):
    """(operation, number of elements of its largest result, whether in a loop) of the compiled program."""
    inside, found = "", []
    for line in step.as_text().splitlines():
        inside = line.split()[0] if line and not line.startswith(" ") else inside
        if match := re.search(r" = (.*?) ([a-z]+-[a-z-]+)\(", line):
            shapes = re.findall(r"[a-z]+\d+\[([\d,]*)\]", match[1])
            size = max(math.prod(map(int, shape.split(","))) if shape else 1 for shape in shapes)
            if match[2].removesuffix("-start") in COLLECTIVES:
                found.append((match[2].removesuffix("-start"), size, inside != "ENTRY"))
    return found


COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def check_what_devices_exchange(step, tokens, width=D):
    """The matrix is gathered once and its gradient summed once, outside the loop over chunks; inside it, a few numbers
    per position and the gradient of the hidden states. tokens: of a chunk on a device."""
    found = collectives(step)
    part = V * width // 2  # of the matrix
    large = [(name, looped) for name, size, looped in found if size >= part]
    assert large.count(("all-gather", False)) <= 1, found
    assert large and all(name != "all-to-all" and not looped for name, looped in large), found
    assert max((size for _, size, looped in found if looped), default=0) <= tokens * width, found
    assert not [name for name, _, looped in found if looped and name != "all-reduce"], found


def test_chunks_exchange_neither_logits_nor_the_vocabulary_matrix():
    problem = make_problem((B, 8))
    step, _ = on_eight_devices(problem, RULES, chunk_tokens=16)
    tokens = 16 // 4
    check_what_devices_exchange(step, tokens)
    for missing in ("batch", "act_vocab", "length"):
        rules = [rule for rule in RULES if rule[0] != missing]
        with pytest.raises(AssertionError):
            step, _ = on_eight_devices(problem, rules, chunk_tokens=16)
            check_what_devices_exchange(step, tokens)


def test_evaluation_makes_one_matmul_and_training_three():
    problem = make_problem()

    def matmuls(function):
        return str(function).count("dot_general")

    hidden, unembed, bias, labels, weights = problem
    evaluation = jax.make_jaxpr(
        lambda hidden: cross_entropy(hidden, unembed, labels, weights, bias_V=bias)
    )(hidden)
    assert matmuls(evaluation) == 1
    assert matmuls(gradient_jaxpr(cross_entropy, problem)) == 3
