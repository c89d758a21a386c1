"""What holds for encoder-decoders: who sees whom, packing, the ways to run, the cache, and that they learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.inference.beam import beam_search
from jaxlm.inference.decode import generate, make_decoder
from jaxlm.inference.logits import unembed
from jaxlm.inference.sampling import make_sampling
from jaxlm.models import EncoderDecoder, attention, cache, encoder_decoder, transformer
from jaxlm.models.cache import make_cache
from tests.models import sequences
from tests.models.test_laws import Ignoring
from tests.models.tiny import CLASSIC, get_logits, get_loss, init_params, is_close, make_config, run

T5 = dict(
    norm="rms_norm",
    position="relative",
    relative_buckets=8,
    relative_max_distance=6,
    activation="geglu_tanh",
    query_scale=1.0,
    logit_scale=0.25,
)
BART = CLASSIC | dict(norm_position="post", embed_norm=True, position_offset=2)
VASWANI = dict(norm_position="post", position="sinusoidal", scale_embeddings=True)
FAMILIES = {"t5": T5, "bart": BART, "transformer": VASWANI}


def make_model(family="t5", **fields):
    sizes = dict(num_layers=2, num_decoder_layers=1)
    return EncoderDecoder(make_config(**sizes | FAMILIES[family] | fields))


def make_batch(source=(4, 5, 2), target=(5, 3, 3), rows=1):
    """Rows of packed pairs; lengths of the documents, of which the last is padding on both sides.

    Every place holds a token of its own, so that a row of the embedding table stands for a place.
    """

    def stream(lengths, first):
        documents = np.arange(1, len(lengths) + 1)
        documents[-1] = 0
        tokens = np.arange(first, first + sum(lengths))
        positions = np.concatenate([np.arange(n) for n in lengths])
        values = dict(tokens=tokens, segment_ids=np.repeat(documents, lengths), positions=positions)
        return {k: jnp.asarray(np.tile(v, (rows, 1)), jnp.int32) for k, v in values.items()}

    encoder = {f"encoder_{k}": x for k, x in stream(source, sum(target)).items()}
    return {**encoder, **stream(target, 0)}


# --- who sees whom ----------------------------------------------------------------------------------------------------


def check_sight(model):
    """By gradient: the encoder's places see their segment; the decoder's see it, too, and their own past."""
    batch = make_batch()
    params, length = init_params(model, batch), batch["tokens"].shape[1]

    def output_sizes(table):
        changed = {**params, "embed": {"embedding": table}}
        out, state = model.apply({"params": changed}, batch, capture_intermediates=is_encoder)
        (encoded, *_), *_ = state["intermediates"]["encoder"]["__call__"]
        return [jnp.sum(x[0] ** 3, axis=-1) for x in (out.hidden, encoded)]

    jacobians = jax.jit(jax.jacrev(output_sizes))(params["embed"]["embedding"])
    decoder, encoder = (np.abs(np.asarray(x)).sum(-1) > 0 for x in jacobians)
    segments, sources = (np.asarray(batch[k][0]) for k in ("segment_ids", "encoder_segment_ids"))
    own = np.tril(segments[:, None] == segments[None, :])
    source, among = segments[:, None] == sources[None, :], sources[:, None] == sources[None, :]
    assert (decoder[:, :length] == own).all(), "the decoder sees other places of its own"
    assert (decoder[:, length : length + len(sources)] == source).all(), "others of the encoder"
    assert (encoder[:, length : length + len(sources)] == among).all(), "the encoder sees others"


def is_encoder(module, method):
    return module.name == "encoder" and method == "__call__"


@pytest.mark.core
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_decoder_sees_its_past_and_the_encoders_whole_segment(family):
    check_sight(make_model(family))


def test_the_check_of_sight_fails_where_segments_are_ignored_or_a_stack_sees_ahead_or_not(
    monkeypatch,
):
    with pytest.raises(AssertionError, match="of the encoder"):
        check_sight(Ignoring(make_model(), "encoder_segment_ids"))
    stack = encoder_decoder.Stack
    for causal, complaint in ((True, "the encoder sees"), (False, "of its own")):
        both = lambda c, _, *args, causal=causal, **kw: stack(c, causal, *args, **kw)
        monkeypatch.setattr(encoder_decoder, "Stack", both)
        with pytest.raises(AssertionError, match=complaint):
            check_sight(make_model("bart"))


def check_packing(model):
    """Two pairs in one row give what they give in rows of their own, and padding changes nothing."""
    batch = make_batch()
    params = init_params(model, batch)
    hidden = run(model, params, batch).hidden[0]
    for segment in (1, 2):
        own = {p: np.asarray(batch[p + "segment_ids"][0]) == segment for p in ("", "encoder_")}
        alone = {f"{p}tokens": batch[f"{p}tokens"][:, here] for p, here in own.items()}
        expected = run(model, params, alone).hidden[0]
        assert is_close(hidden[own[""]], expected), "packing changed the result"


@pytest.mark.core
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_packing_and_padding_do_not_change_the_result(family):
    check_packing(make_model(family))


@pytest.mark.parametrize("key", ["encoder_segment_ids", "encoder_positions", "positions"])
def test_the_packing_check_fails_for_a_model_that_ignores(key):
    with pytest.raises(AssertionError, match="packing changed"):
        check_packing(Ignoring(make_model("bart"), key))


# --- the ways to run --------------------------------------------------------------------------------------------------


@functools.cache
def loss_and_gradient(**fields):
    model, batch = make_model(num_decoder_layers=3, num_kv_heads=4, **fields), make_batch()
    params = init_params(make_model(num_decoder_layers=3, num_kv_heads=4), batch)
    return jax.jit(jax.value_and_grad(lambda p: get_loss(model, p, batch)))(params)


def check_same_loss_and_gradient(**fields):
    for found, expected in zip(loss_and_gradient(**fields), loss_and_gradient(), strict=True):
        assert is_close(found, expected), "the loss or the gradient differs"


@pytest.mark.core
@pytest.mark.parametrize("fields", [dict(unroll=0), dict(remat="full", unroll=2)])
def test_unrolling_and_rematerialising_change_neither_loss_nor_gradient(fields):
    check_same_loss_and_gradient(**fields)


def test_the_same_loss_check_fails_for_another_scale_of_logits():
    with pytest.raises(AssertionError, match="differs"):
        check_same_loss_and_gradient(logit_scale=0.3)


def test_every_parameter_has_a_gradient_and_names_its_axes():
    loss, grads = loss_and_gradient()
    assert np.isfinite(loss)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and grad.any(), jax.tree_util.keystr(path)
    boxed = jax.eval_shape(make_model("bart").init, jax.random.key(0), make_batch())["params"]
    for stack in ("encoder", "decoder"):
        attention = boxed[stack]["layers"]["attention"]
        assert attention["query"].names == ("layers", "embed", "heads", "head_dim")
        assert set(boxed[stack]["embed"]) == {"positions", "norm"}
    assert boxed["decoder"]["layers"]["cross_attention"]["key"].names[2] == "kv"
    assert "cross_attention" not in boxed["encoder"]["layers"]


def test_the_routers_of_both_stacks_add_to_the_loss():
    model, batch = make_model("transformer", num_experts=4, router_aux_weight=0.1), make_batch()
    params = init_params(model, batch)
    both = run(model, params, batch).auxiliary
    assert np.isfinite(both.loss) and both.loss > 0
    changed = {**params, "encoder": jax.tree.map(lambda x: 2 * x, params["encoder"])}
    assert run(model, changed, batch).auxiliary.loss != both.loss


# --- decoding ---------------------------------------------------------------------------------------------------------


def read_in_parts(model, params, batch, prompt):
    """Logits (B, T - prompt + 1, V): the encoder and `prompt` tokens at once, then one token at a time."""
    rows, length = batch["tokens"].shape
    source = {k: batch[k] for k in ("encoder_tokens", "encoder_segment_ids")}
    stored = make_cache(model.config, rows, prompt, source["encoder_tokens"].shape[1])

    def read(stored, start, stop, extra):
        part = {k: batch[k][:, start:stop] for k in ("tokens", "segment_ids")}
        out = model.apply({"params": params}, part | extra, cache=stored)
        return out.cache, unembed(out, out.hidden[:, -1:])

    stored, logits = read(stored, 0, prompt, source)
    stored, found = cache.grow(stored, length), [logits]
    for place in range(prompt, length):
        stored, logits = read(stored, place, place + 1, {})
        found.append(logits)
    return jnp.concatenate(found, axis=1)


PROMPT = 2


@functools.cache
def read_whole(family):
    """(model, parameters, batch, logits (B, T, V)) of rows of a pair each, the second with a shorter source."""
    model, rng = make_model(family, num_decoder_layers=2), np.random.default_rng(0)
    batch = {
        "encoder_tokens": jnp.asarray(rng.integers(0, 32, (2, 7)), jnp.int32),
        "encoder_segment_ids": jnp.array([[1] * 7, [1] * 4 + [0] * 3]),
        "tokens": jnp.asarray(rng.integers(0, 32, (2, 6)), jnp.int32),
        "segment_ids": jnp.ones((2, 6), jnp.int32),
    }
    params = init_params(model, batch)
    return model, params, batch, jax.jit(lambda p: get_logits(model, p, batch))(params)


def check_cached_logits(family):
    model, params, batch, whole = read_whole(family)
    parts = jax.jit(lambda p: read_in_parts(model, p, batch, PROMPT))(params)
    assert np.abs(whole).max() > 0.1
    np.testing.assert_allclose(parts, whole[:, PROMPT - 1 :], atol=1e-4, rtol=1e-4)


@pytest.mark.core
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_logits_with_a_cache_are_those_without_at_each_step(family):
    check_cached_logits(family)


def sees_padding(real):
    return lambda stored, segment_ids: real(stored, jnp.ones_like(segment_ids))


def one_layer_for_all(real):
    return lambda stored, layer, *rest: real(stored, jnp.zeros_like(layer), *rest)


def counts_from_each_call(real):
    return lambda *options, **kw: lambda queries, keys, first: real(*options, **kw)(queries, keys)


WRONG = {
    "padding of the source is seen": (transformer, "add_segments", sees_padding),
    "all layers write into one": (attention, "write_layer", one_layer_for_all),
    "places count from each call": (transformer, "RelativeBias", counts_from_each_call),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_check_fails_for_a_wrong_cache(name, monkeypatch):
    read_whole("t5")
    module, function, change = WRONG[name]
    monkeypatch.setattr(module, function, change(getattr(module, function)))
    with pytest.raises(AssertionError, match="Not equal"):
        check_cached_logits("t5")


def test_taken_rows_take_the_memory_and_a_grown_cache_keeps_it():
    config = make_model(num_decoder_layers=3).config
    stored = make_cache(config, 2, 4, 5)
    assert stored.key.shape == (3, 2, 2, 4, 4) and stored.memory.key.shape == (3, 2, 2, 5, 4)
    memory = stored.memory.replace(segment_ids=jnp.array([[1] * 5, [1, 1, 0, 0, 0]]))
    taken = cache.take_rows(stored.replace(memory=memory), jnp.array([1, 1, 0]))
    np.testing.assert_array_equal(taken.memory.segment_ids.sum(1), [2, 2, 5])
    grown = cache.grow(taken, 8)
    assert grown.size == 8 and grown.memory.size == 5
    assert make_cache(config, 2, 4).memory is None


def test_wrong_inputs_say_what_to_give():
    model, batch = make_model(), make_batch()
    with pytest.raises(ValueError, match="also reads encoder_tokens"):
        jax.eval_shape(model.init, jax.random.key(0), {"tokens": batch["tokens"]})
    with pytest.raises(ValueError, match="source_len"):
        stored = make_cache(model.config, 1, 16)
        jax.eval_shape(lambda: model.init(jax.random.key(0), batch, cache=stored))
    with pytest.raises(ValueError, match="embed_factor_dim=6.*set it to 0"):
        jax.eval_shape(make_model(embed_factor_dim=6).init, jax.random.key(0), batch)
    with pytest.raises(ValueError) as error:
        make_model(relative_buckets=6, relative_max_distance=3, num_decoder_layers=-1)
    for part in ("a multiple of 4", "relative_max_distance=3", "num_decoder_layers=-1"):
        assert part in str(error.value)


# --- learning ---------------------------------------------------------------------------------------------------------


def check_learned(task, steps, share):
    """Of 1,000 sequences that it never saw, the model writes more than `share` without any mistake; beams find the same."""
    model, params, losses = sequences.learn(task, steps)
    rng = np.random.default_rng(10**6)
    pairs = [(x, sequences.TASKS[task](x)) for x in (sequences.draw(rng) for _ in range(1000))]
    prompts = [np.append(source, sequences.END) for source, _ in pairs]
    decoder = make_decoder(model, start_id=sequences.START)
    longest = model.config.max_len
    sizes = dict(max_new_tokens=longest - 1, max_len=longest, eos_id=sequences.END)
    greedy = generate(decoder, params, prompts, sampling=make_sampling(temperature=0.0), **sizes)
    written = [row.tokens.tolist() for row in greedy]
    exact = np.mean([a == b.tolist() for a, (_, b) in zip(written, pairs, strict=True)])
    assert exact > share, (exact, losses)
    beams = beam_search(decoder, params, prompts[:100], num_beams=4, **sizes)
    assert [best.tokens.tolist() for best, *_ in beams] == written[:100]


@pytest.mark.slow
@pytest.mark.parametrize("task", sequences.TASKS)
def test_a_small_encoder_decoder_copies_reverses_and_sorts(task):
    check_learned(task, 800, 0.99)


def test_its_loss_falls_at_once():
    """Guessing costs log(27) = 3.3 nats a symbol."""
    _, _, losses = sequences.learn("copy", 101, rows=16)
    assert losses[-1] < 2.4 < losses[0], losses
