"""What holds for every model, whatever its options: each law is a check that a wrong model fails."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import transformer
from tests.models.tiny import (
    CLASSIC,
    MODERN,
    get_loss,
    init_params,
    is_close,
    make_batch,
    make_bert,
    make_config,
    make_gpt,
    run,
)

OPTIONS = {"classic": CLASSIC, "modern": MODERN}


def influence(model, batch):
    """(T, T) of the first row: how strongly output t depends on the token at s, by gradient.

    Each position holds a token of its own, so that a row of the embedding table stands for a place.
    """
    length = batch["tokens"].shape[1]
    batch = {**batch, "tokens": jnp.tile(jnp.arange(length, dtype=jnp.int32), (1, 1))}
    batch = {k: v[:1] for k, v in batch.items()}
    params = init_params(model, batch)

    def output_sizes(table):
        changed = {**params, "embed": {**params["embed"], "embedding": table}}
        return jnp.sum(model.apply({"params": changed}, batch).hidden[0] ** 3, axis=-1)

    jacobian_TVD = jax.jit(jax.jacrev(output_sizes))(params["embed"]["embedding"])
    return np.abs(np.asarray(jacobian_TVD)).sum(-1)[:, :length]


def check_causality(model):
    matrix = influence(model, {"tokens": jnp.zeros((1, 12), jnp.int32)})
    sees = np.tril(np.ones(matrix.shape, bool))
    assert (matrix[sees] > 0).all(), "a position does not see its own past"
    assert (matrix[~sees] == 0).all(), "a position sees its future"


def check_segments(model, causal):
    batch = make_batch()
    segments = np.asarray(batch["segment_ids"][0])
    sees = segments[:, None] == segments[None, :]
    sees = np.tril(sees) if causal else sees
    matrix = influence(model, batch)
    assert (matrix[sees] > 0).all(), "a position does not see its own segment"
    assert (matrix[~sees] == 0).all(), "a position sees another segment"


class Ignoring:
    """A wrong model: it does not read one key of the batch."""

    def __init__(self, model, key):
        self.model, self.key = model, key

    def init(self, rng, batch):
        return self.model.init(rng, batch)

    def apply(self, variables, batch, **kwargs):
        return self.model.apply(
            variables, {k: v for k, v in batch.items() if k != self.key}, **kwargs
        )


@pytest.mark.core
@pytest.mark.parametrize("options", OPTIONS)
def test_a_decoder_never_sees_the_future(options):
    check_causality(make_gpt(tie_embeddings=False, **OPTIONS[options]))


def test_the_causality_check_fails_for_an_encoder_and_for_a_mask_that_is_off_by_one(monkeypatch):
    with pytest.raises(AssertionError, match="future"):
        check_causality(make_bert(tie_embeddings=False))
    off_by_one = lambda ids, **options: jnp.tril(jnp.ones((1, ids.shape[1], ids.shape[1]), bool), 1)
    monkeypatch.setattr(transformer, "attention_mask", off_by_one)
    with pytest.raises(AssertionError, match="future"):
        check_causality(make_gpt(tie_embeddings=False))


@pytest.mark.core
@pytest.mark.parametrize("options", OPTIONS)
def test_attention_never_crosses_a_segment(options):
    check_segments(make_gpt(tie_embeddings=False, **OPTIONS[options]), causal=True)
    check_segments(make_bert(tie_embeddings=False, **OPTIONS[options]), causal=False)


def reach(windows, causal, length=12):
    """(T, T): which tokens a position depends on through layers that see these windows."""
    place = np.arange(length)
    seen = np.eye(length, dtype=bool)
    for window in windows:
        sees = abs(place[:, None] - place[None, :]) < (window or length)
        seen = (np.tril(sees) if causal else sees) @ seen
    return seen


def check_windows(make_model, windows, causal):
    model = make_model(
        tie_embeddings=False, attention_windows=windows, num_layers=len(windows), position="none"
    )
    matrix = influence(model, {"tokens": jnp.zeros((1, 12), jnp.int32)})
    assert ((matrix > 0) == reach(windows, causal)).all(), "other places are seen"


@pytest.mark.parametrize("windows", [(3,), (2, 4)])
def test_a_layer_sees_as_far_as_its_window(windows):
    check_windows(make_gpt, windows, causal=True)
    check_windows(make_bert, windows, causal=False)


def test_the_window_check_fails_when_off_by_one_and_for_a_window_behind_an_encoders_place(
    monkeypatch,
):
    window_mask = transformer.window_mask
    for make_model, causal, wrong in (
        (make_gpt, True, lambda length, window: window_mask(length, window + 1)),
        (make_bert, False, lambda length, window: jnp.tril(window_mask(length, window))),
    ):
        monkeypatch.setattr(transformer, "window_mask", wrong)
        with pytest.raises(AssertionError, match="other places"):
            check_windows(make_model, (3,), causal)


def test_windows_repeat_over_the_layers():
    assert make_config(num_layers=5, attention_windows=(4, 0)).layer_windows == (4, 0, 4, 0, 4)
    assert make_config(num_layers=3).layer_windows == (0, 0, 0)


def test_without_windows_the_program_is_that_of_layers_that_are_all_alike():
    batch = make_batch()
    params = init_params(make_gpt(**MODERN), batch)

    def program(**fields):
        model = make_gpt(**MODERN, **fields)
        return str(jax.make_jaxpr(lambda p: model.apply({"params": p}, batch).hidden)(params))

    plain = program()
    assert program(attention_windows=(0, 0)) == plain == program(rope_local_theta=9.0)
    assert program(attention_windows=(4, 0)) != plain


def test_the_segment_check_fails_for_a_model_that_ignores_segments():
    with pytest.raises(AssertionError, match="another segment"):
        check_segments(Ignoring(make_gpt(tie_embeddings=False), "segment_ids"), causal=True)


def check_packing(model):
    """Two documents in one row give what they give in two rows, and padding changes nothing."""
    rng = np.random.default_rng(3)
    first, second = (rng.integers(0, 32, n).astype(np.int32) for n in (7, 4))
    row = {
        "tokens": np.concatenate([first, second, np.zeros(3, np.int32)]),
        "segment_ids": np.repeat(np.array([1, 2, 0], np.int32), (7, 4, 3)),
        "positions": np.concatenate([np.arange(7), np.arange(4), np.arange(3)]).astype(np.int32),
    }
    packed = {k: jnp.asarray(v)[None] for k, v in row.items()}
    params = init_params(model, packed)
    hidden = run(model, params, packed).hidden[0]
    for ids, start in ((first, 0), (second, 7)):
        alone = {"tokens": jnp.asarray(ids)[None]}
        expected = run(model, params, alone).hidden[0]
        assert is_close(hidden[start : start + len(ids)], expected), "packing changed the result"


@pytest.mark.core
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("make_model", [make_gpt, make_bert])
def test_packing_and_padding_do_not_change_the_result(make_model, options):
    check_packing(make_model(**OPTIONS[options]))


@pytest.mark.parametrize("key", ["segment_ids", "positions"])
def test_the_packing_check_fails_for_a_model_that_ignores(key):
    with pytest.raises(AssertionError, match="packing changed"):
        check_packing(Ignoring(make_gpt(), key))


@functools.cache
def loss_and_gradient(model):
    """Of fixed parameters in their stacked layout."""
    batch = make_batch()
    params = init_params(make_gpt(**MODERN), batch)
    return jax.jit(jax.value_and_grad(lambda p: get_loss(model, p, batch)))(params)


def check_same_loss_and_gradient(model, other):
    loss, grads = loss_and_gradient(model)
    other_loss, other_grads = loss_and_gradient(other)
    assert is_close(loss, other_loss), "the loss differs"
    assert is_close(grads, other_grads), "the gradient differs"


@pytest.mark.core
@pytest.mark.parametrize(
    ("remat", "unroll"),
    [
        ("none", 2),
        ("none", 0),
        ("attention", 1),
        ("dots", 1),
        ("full", 1),
        ("dots", 0),
        ("full", 2),
    ],
)
def test_unrolling_and_rematerialising_change_neither_loss_nor_gradient(remat, unroll):
    check_same_loss_and_gradient(make_gpt(**MODERN), make_gpt(**MODERN, remat=remat, unroll=unroll))


@pytest.mark.parametrize("fields", [dict(unroll=0), dict(remat="full")])
def test_layers_that_differ_run_alike_unrolled_and_rematerialised(fields):
    differing = dict(attention_windows=(3, 0), rope_local_theta=100.0, first_norm=False)
    check_same_loss_and_gradient(
        make_gpt(**MODERN, **differing), make_gpt(**MODERN, **differing, **fields)
    )


def test_the_same_loss_check_fails_for_another_phase_of_local_layers():
    with pytest.raises(AssertionError, match="differs"):
        check_same_loss_and_gradient(
            make_gpt(**MODERN, attention_windows=(3, 0)),
            make_gpt(**MODERN, attention_windows=(0, 3)),
        )


def check_sharing(other_layers, **fields):
    """One layer's parameters, run three times, against three layers with equal parameters."""
    batch = make_batch()
    shared, plain = make_gpt(share_layers=True, **fields), make_gpt(num_layers=other_layers)
    params = init_params(shared, batch)
    assert {x.shape[0] for x in jax.tree.leaves(params["layers"])} == {1}
    loss, grads = jax.jit(jax.value_and_grad(lambda p: get_loss(shared, p, batch)))(params)

    def repeated_loss(p):
        layers = jax.tree.map(lambda x: jnp.repeat(x, other_layers, axis=0), p["layers"])
        return get_loss(plain, {**p, "layers": layers}, batch)

    expected, expected_grads = jax.jit(jax.value_and_grad(repeated_loss))(params)
    assert is_close(loss, expected), "the loss differs"
    assert is_close(grads, expected_grads), "the gradient differs"


@pytest.mark.parametrize("fields", [dict(), dict(unroll=0), dict(remat="full")])
def test_shared_layers_are_equal_layers(fields):
    check_sharing(3, **fields)


def test_the_sharing_check_fails_for_another_number_of_layers():
    with pytest.raises(AssertionError, match="differs"):
        check_sharing(2)


def test_shared_layers_are_stacked_as_others_are():
    boxed = jax.eval_shape(make_gpt(share_layers=True).init, jax.random.key(0), make_batch())
    query = boxed["params"]["layers"]["attention"]["query"]
    assert query.names == ("layers", "embed", "heads", "head_dim") and query.value.shape[0] == 1


def check_first_norm(used, **fields):
    """Whether the first layer's attention norm has an influence; the second's always has."""
    model, batch = make_gpt(**fields), make_batch()
    grads = jax.jit(jax.grad(lambda p: get_loss(model, p, batch)))(init_params(model, batch))
    first, second = np.asarray(grads["layers"]["attention_norm"]["scale"])[:2]
    assert second.any() and first.any() == used, "the wrong norm is used"


def test_without_its_first_norm_a_model_reads_its_embeddings_as_they_are():
    check_first_norm(False, first_norm=False)
    check_first_norm(False, first_norm=False, norm_position="sandwich")
    with pytest.raises(AssertionError, match="wrong norm"):
        check_first_norm(False)


def test_factorised_embeddings_are_narrow_tables_and_a_projection():
    batch = make_batch()
    model = make_bert(embed_factor_dim=6, num_token_types=2, **CLASSIC)
    params = init_params(model, batch)
    tables = {k: v.shape for k, v in params["embed"].items() if hasattr(v, "shape")}
    assert tables == {"embedding": (32, 6), "positions": (16, 6), "token_types": (2, 6)}
    assert params["embed"]["projection"]["kernel"].shape == (6, 16)
    out = run(model, params, batch)
    assert out.hidden.shape == (2, 12, 6) == (*batch["tokens"].shape, out.unembed.shape[1])
    with pytest.raises(ValueError, match="embed_factor_dim=6.*set it to 0"):
        jax.eval_shape(make_gpt(embed_factor_dim=6).init, jax.random.key(0), batch)


def test_a_position_offset_skips_the_first_rows():
    model, batch = make_gpt(position_offset=2), make_batch()
    params = init_params(model, batch)
    rows = params["embed"]["positions"]
    assert rows.shape == (18, 16)
    without = {**params, "embed": {**params["embed"], "positions": rows[2:]}}
    assert is_close(
        run(model, params, batch).hidden, run(make_gpt(), without, batch).hidden, tolerance=0
    )


def test_the_same_loss_check_fails_for_another_normalisation():
    with pytest.raises(AssertionError, match="differs"):
        check_same_loss_and_gradient(make_gpt(**MODERN), make_gpt(**MODERN, norm_eps=1e-3))


@pytest.mark.parametrize("remat", ["attention", "dots", "full"])
def test_rematerialising_really_computes_again(remat):
    batch = make_batch()
    plain, other = make_gpt(unroll=0), make_gpt(unroll=0, remat=remat)
    params = init_params(plain, batch)

    def count_flops(model):
        grad = jax.grad(lambda p: get_loss(model, p, batch))
        return jax.jit(grad).lower(params).cost_analysis()["flops"]

    more = count_flops(other) - count_flops(plain)
    scores = 2 * 2 * 12 * 12 * 4 * 4  # of one layer: rows, 2 FLOPs, T, S, N, H
    assert more >= 3 * scores, "nothing is computed twice"


def test_parameters_do_not_depend_on_how_the_layers_run():
    batch = make_batch()
    init = lambda m: jax.jit(m.init)(jax.random.key(0), batch)
    looped = init(make_gpt())
    for fields in (dict(unroll=0), dict(unroll=2, remat="full"), dict(dtype="bfloat16")):
        assert jax.tree.all(
            jax.tree.map(lambda a, b: bool((a == b).all()), looped, init(make_gpt(**fields)))
        )


def test_every_layer_is_initialised_differently():
    params = jax.jit(make_gpt().init)(jax.random.key(0), make_batch())["params"]
    query = params["layers"]["attention"]["query"].value
    assert not np.allclose(query[0], query[1])
    assert np.std(query) == pytest.approx(0.3, rel=0.1)
    out = params["layers"]["attention"]["out"].value
    assert np.std(out) == pytest.approx(0.3 / np.sqrt(6), rel=0.1)


def test_zero_initialised_outputs_make_every_block_the_identity():
    batch = make_batch()
    model = make_gpt(zero_init_out=True, position="none")
    params = jax.jit(model.init)(jax.random.key(0), batch)["params"]
    hidden = run(model, params, batch).hidden
    x = params["embed"]["embedding"].value[batch["tokens"]]
    x = x - x.mean(-1, keepdims=True)
    assert is_close(hidden, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5))


def check_gathering(gather_shift):
    """The head at gathered positions gives what the head everywhere gives there."""
    model, batch = make_bert(**CLASSIC), make_batch()
    positions = jnp.array([[3, 0, 7], [11, 2, 0]])
    params = init_params(model, batch)
    everywhere = run(model, params, batch).hidden
    gathered = run(model, params, {**batch, "masked_positions": positions}).hidden
    rows = jnp.arange(2)[:, None]
    assert is_close(gathered, everywhere[rows, positions + gather_shift]), "other positions"


def test_masked_positions_are_gathered_before_the_head():
    check_gathering(0)


def test_the_gathering_check_fails_when_off_by_one():
    with pytest.raises(AssertionError, match="other positions"):
        check_gathering(1)


def test_the_pair_head_reads_the_given_positions():
    model, batch = make_bert(num_pair_classes=2), make_batch()
    params = init_params(model, batch)
    first = run(model, params, batch).pair_logits
    assert first.shape == (2, 1, 2) and first.dtype == jnp.float32
    both = run(
        model, params, {**batch, "example_positions": jnp.array([[0, 5], [0, 3]])}
    ).pair_logits
    assert is_close(both[:, :1], first) and not np.allclose(both[:, 1:], first)


def test_token_types_matter_and_default_to_zero():
    model, batch = make_bert(num_token_types=2), make_batch()
    params = init_params(model, batch)
    hidden = lambda b: run(model, params, b).hidden
    zeros = jnp.zeros_like(batch["tokens"])
    assert is_close(hidden(batch), hidden({**batch, "token_types": zeros}))
    assert not np.allclose(hidden(batch), hidden({**batch, "token_types": zeros + 1}))


def test_a_token_outside_the_vocabulary_gives_nan():
    model, batch = make_gpt(), make_batch()
    params = init_params(model, batch)
    batch = {**batch, "tokens": batch["tokens"].at[1, 0].set(32)}
    hidden = run(model, params, batch).hidden
    assert np.isnan(hidden[1]).all() and np.isfinite(hidden[0]).all()


OPTION_VALUES = [
    dict(norm="layer_norm"),
    dict(norm="rms_norm"),
    dict(norm_bias=True),
    dict(norm_position="post"),
    dict(norm_position="sandwich"),
    dict(norm_scale_offset=1.0),
    dict(position="sinusoidal"),
    dict(position_offset=2),
    dict(attention_windows=(3,)),
    dict(attention_windows=(3,), position="rotary", rope_local_theta=100.0),
    dict(query_scale=0.3),
    dict(scale_embeddings=True),
    dict(position="rotary"),
    dict(position="rotary", rope_scaling=(8.0,)),
    dict(position="rotary", rope_scaling=(8.0, 1.0, 4.0, 8.0)),
    dict(position="rotary", rope_theta=100.0),
    dict(position="none"),
    dict(position="relative"),
    dict(position="relative", relative_buckets=8, relative_max_distance=6),
    dict(embed_norm=True),
    dict(logit_scale=0.5),
    dict(activation="gelu"),
    dict(activation="relu"),
    dict(activation="relu2"),
    dict(activation="swiglu"),
    dict(activation="geglu"),
    dict(activation="geglu_tanh"),
    dict(qk_norm=True),
    dict(qkv_bias=True),
    dict(out_bias=True),
    dict(mlp_bias=True),
    dict(tie_embeddings=False),
    dict(num_token_types=2),
    dict(attention_softcap=2.0),
    dict(final_softcap=2.0),
    dict(num_kv_heads=4),
    dict(num_kv_heads=1),
    dict(norm_eps=0.1),
    dict(head_dim=6),
    dict(dtype="bfloat16"),
    dict(param_dtype="bfloat16"),
    dict(dropout_rate=0.5),
    dict(attention_dropout_rate=0.5),
]


@pytest.mark.parametrize("fields", OPTION_VALUES, ids=lambda f: ",".join(f"{k}={f[k]}" for k in f))
def test_every_option_runs_and_changes_something(fields):
    loss, tree = train_once(**fields)
    default_loss, default_tree = train_once()
    is_default = all(getattr(make_config(), k) == v for k, v in fields.items())
    assert (loss == default_loss and tree == default_tree) == is_default


@functools.cache
def train_once(**fields):
    """The loss and the tree of the parameters, all of which must get a finite gradient that is not zero."""
    model = make_gpt(num_layers=1, **fields)
    batch = {**make_batch(), "token_types": jnp.ones((2, 12), jnp.int32)}
    rngs = dict(deterministic=False, rngs={"dropout": jax.random.key(2)})
    params = init_params(model, batch)
    with jax.disable_jit():  # thirty models of small parts: the parts are compiled once
        loss, grads = jax.value_and_grad(lambda p: get_loss(model, p, batch, **rngs))(params)
    assert np.isfinite(loss)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        grad = np.asarray(grad, np.float32)
        assert np.isfinite(grad).all() and grad.any(), f"no gradient: {jax.tree_util.keystr(path)}"
    return float(loss), jax.tree.structure(params)


def test_a_config_lists_all_that_is_wrong_with_it():
    wrong = dict(
        norm="batch_norm", num_heads=5, dropout_rate=1.0, unroll=9, rope_scaling=(1.0, 2.0)
    )
    wrong |= dict(attention_windows=(1, 2, 3, -4), position_offset=-1)
    wrong |= dict(first_norm=False, norm_position="post")
    with pytest.raises(ValueError) as error:
        dataclasses.replace(make_gpt().config, **wrong)
    for part in (
        "batch_norm",
        "layer_norm",
        "num_heads=5",
        "dropout_rate",
        "unroll",
        "rope_scaling",
        "at most num_layers=3",
        "0 (no limit) or more",
        "position_offset=-1",
        "first_norm=False",
    ):
        assert part in str(error.value)


def test_an_unknown_attention_kernel_lists_the_known_ones():
    with pytest.raises(ValueError, match="use one of.*xla"):
        make_gpt(attention_kernel="flash").init(jax.random.key(0), make_batch())
