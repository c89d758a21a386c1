"""jaxlm.look on tiny models: maps with their tokens, planes, probes, their pictures, and what is refused."""

import dataclasses
import doctest
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import api, look
from jaxlm.look import attention, probes
from jaxlm.models import EncoderDecoder
from jaxlm.parallel.mesh import make_mesh
from jaxlm.tokenizers import make_tokenizer
from jaxlm.tokenizers.training import train_tokenizer
from tests.models.tiny import init_params, make_bert, make_config, make_gpt

SIZES = dict(vocab_size=264, num_layers=2, num_heads=2, num_kv_heads=2, max_len=64)
MODELS = {
    "gpt": lambda: make_gpt(**SIZES),
    "bert": lambda: make_bert(**SIZES),
    "encoder_decoder": lambda: EncoderDecoder(make_config(**SIZES)),
}


def make_lm(family, **changes):
    model, tokenizer = MODELS[family](), make_tokenizer("bytes", num_sentinels=0)
    row = {"tokens": jnp.zeros((1, 4), jnp.int32)}
    batch = row | ({"encoder_tokens": row["tokens"]} if family == "encoder_decoder" else {})
    return api.LanguageModel(
        checkpoint="W",
        family=family,
        model=model,
        params=init_params(model, batch),
        tokenizer=tokenizer,
        num_ids=264,
        max_len=64,
        mesh=make_mesh(devices=jax.devices()[:1]),
        prefix=(),
        end_id=tokenizer.eos_id,
        **{"writing": {"start_id": tokenizer.pad_id} if family == "encoder_decoder" else {}}
        | changes,
    )


@pytest.fixture(scope="module")
def gpt():
    return make_lm("gpt")


@pytest.fixture(scope="module")
def bert():
    return make_lm("bert")


def png(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


@pytest.mark.parametrize("function", [attention.attention_maps, probes.probe])
def test_the_examples_in_the_docstrings_are_true(function, gpt):
    names = vars(look) | {"workdir": "W", "load": lambda workdir: gpt}
    (example,) = doctest.DocTestFinder(recurse=False).find(function, globs=names)
    said = []
    assert example.examples and not doctest.DocTestRunner().run(example, out=said.append).failed, (
        said
    )


# --- attention maps ---------------------------------------------------------------------------------------------------


def test_a_map_has_a_row_and_a_column_for_each_token(gpt, bert):
    (found,) = look.attention_maps(gpt, "a b\n")
    assert found.queries == found.keys == ("a", "␣", "b", "↵")
    assert found.probs_LNTS.shape == (2, 2, 4, 4)
    np.testing.assert_allclose(found.probs_LNTS.sum(-1), 1, atol=1e-5)
    (found,) = look.attention_maps(bert, "a[MASK]b")
    assert [found.keys[i] for i in (1, 3)] == ["a", "b"] and len(found.keys) == 5
    np.testing.assert_allclose(found.probs_LNTS.sum(-1), 1, atol=1e-5)


def test_the_length_that_a_text_is_padded_to_changes_no_map(gpt):
    text = "0123456789abcdefg"  # 17 tokens: padded to 32, where its first 16 alone are not padded
    (long,), (short,) = look.attention_maps(gpt, text), look.attention_maps(gpt, text[:16])
    np.testing.assert_allclose(long.probs_LNTS[:, :, :16, :16], short.probs_LNTS, atol=1e-6)


def test_a_prefix_lm_sees_its_prompt_whole(gpt):
    (causal,) = look.attention_maps(gpt, "abc")
    (prefix,) = look.attention_maps(make_lm("gpt", writing={"is_prefix_lm": True}), "abc")
    assert (np.triu(causal.probs_LNTS, 1) == 0).all() and (prefix.probs_LNTS > 0).all()


def test_an_encoder_decoder_has_three_maps():
    found = look.attention_maps(make_lm("encoder_decoder"), "abc", target="xy")
    shapes = {m.name: m.probs_LNTS.shape for m in found}
    assert shapes == {"encoder": (2, 2, 4, 4), "decoder": (2, 2, 3, 3), "cross": (2, 2, 3, 4)}
    cross = found[-1]
    assert (
        cross.name == "cross" and cross.queries[1:] == ("x", "y") and cross.keys[:3] == tuple("abc")
    )
    assert (cross.probs_LNTS > 0).all()


def test_pictures_are_drawn_of_any_text(gpt):
    (found,) = look.attention_maps(gpt, "$x_1 = {$")  # no formula, whatever matplotlib takes it for
    figure = look.draw_attention(found, layer=1)
    assert [axes.get_title() for axes in figure.axes] == ["head 0", "head 1"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(found.queries)
    assert len(look.draw_attention(found).axes) == 4
    assert png(figure).startswith(b"\x89PNG")
    with pytest.raises(IndexError, match="layer=2: expected 0 to 1"):
        look.draw_attention(found, layer=2)


def test_what_has_no_maps_is_refused(gpt):
    with pytest.raises(api.BadInput, match="family electra"):
        look.attention_maps(dataclasses.replace(gpt, family="electra"), "a")
    with pytest.raises(api.BadInput, match="only an encoder-decoder"):
        look.attention_maps(gpt, "a", target="b")
    with pytest.raises(api.BadInput, match="65 tokens, and the context holds 64"):
        look.attention_maps(gpt, "a" * 65)


# --- planes -----------------------------------------------------------------------------------------------------------


def test_a_plane_is_that_of_scikit_learn():
    from sklearn.decomposition import PCA

    vectors = np.random.default_rng(0).normal(size=(30, 8)) * np.arange(8, 0, -1)
    found, theirs = look.project(vectors), PCA(2).fit(vectors)
    np.testing.assert_allclose(np.abs(found.points), np.abs(theirs.transform(vectors)), atol=1e-4)
    np.testing.assert_allclose(found.shares, theirs.explained_variance_ratio_, atol=1e-6)
    turned = look.project(vectors[::-1])
    np.testing.assert_allclose(turned.points[::-1], found.points, atol=1e-4)


def test_tokens_have_the_rows_of_the_table(gpt):
    names, vectors = look.token_vectors(gpt, count=5)
    assert names == tuple('!"#$%'), "what can be seen of ASCII begins there"
    ids = np.concatenate([gpt.tokenizer.encode(name) for name in names])
    np.testing.assert_array_equal(vectors, gpt.params["embed"]["embedding"][ids])


@pytest.mark.parametrize("kind", ["byte_bpe", "unigram"])
def test_tokens_are_spelled_with_the_spaces_that_they_bring_along(kind, gpt):
    text = ["a cat sat on the mat and the cat ran\n"] * 50
    tokenizer = train_tokenizer(kind, text, 300, num_sentinels=0)
    lm = dataclasses.replace(gpt, tokenizer=tokenizer)
    names = attention.spell(lm, tokenizer.encode("the cat"))
    assert "".join(names).lstrip("␣") == "the␣cat"


def test_a_plane_is_drawn_with_names_and_colours(gpt):
    names, vectors = look.token_vectors(gpt, count=6)
    figure = look.draw_projection(look.project(vectors), names, groups=["x", "y"] * 3)
    (axes,) = figure.axes
    assert len(axes.texts) == 6 and len(axes.collections) == 2
    assert png(figure).startswith(b"\x89PNG")


def test_of_very_many_points_some_have_their_names():
    vectors = np.random.default_rng(0).normal(size=(501, 3))
    (axes,) = look.draw_projection(look.project(vectors), [f"n{i}" for i in range(501)]).axes
    assert [text.get_text() for text in axes.texts] == [f"n{i}" for i in range(0, 501, 3)]


def test_vectors_without_a_plane_are_refused():
    for wrong in (np.zeros((1, 4)), np.zeros(4), np.full((3, 3), np.nan)):
        with pytest.raises(ValueError, match="expected: two or more"):
            look.project(wrong)
    assert look.project(np.zeros((3, 3))).shares.tolist() == [0, 0]


# --- probes -----------------------------------------------------------------------------------------------------------


def test_a_probe_finds_what_is_there_and_only_that():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    nothing, something = rng.normal(size=(2, 400, 8))
    something[:, 0] += 6 * labels
    found = probes.probe_states(np.stack([nothing, something]), labels)
    assert found.accuracies[1] > 0.97 and abs(found.accuracies[0] - 0.5) < 0.2
    assert (np.abs(found.controls - 0.5) < 0.2).all()
    assert (found.num_train, found.num_test, found.labels) == (300, 100, ("0", "1"))


def test_a_models_layers_are_probed_and_drawn(bert):
    texts = [f"import {c}" for c in "abcdefgh"] + [f"def {c}():" for c in "abcdefgh"]
    found = look.probe(bert, texts, ["import"] * 8 + ["def"] * 8, pooling="cls")
    assert found.accuracies.shape == found.controls.shape == (3,) and found.majority == 0.5
    assert found.accuracies[0] == 0.5, "the embedding of [CLS] knows nothing of the text"
    assert png(look.draw_probe(found)).startswith(b"\x89PNG")


def test_labels_that_cannot_be_probed_are_refused(gpt):
    for labels in (["a"] * 8, ["a"] * 7 + ["b"], ["a", "b"]):
        with pytest.raises(api.BadInput, match="expected a label for each text"):
            look.probe(gpt, ["x"] * 8, labels)
        with pytest.raises(api.BadInput, match="expected a label for each text"):
            look.probe_states(np.zeros((1, 8, 4)), labels)
