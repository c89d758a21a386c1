"""The characters behind each id, for every kind of tokenizer: trained ones by their bytes, foreign ones by their backend."""

import io
import json
import unicodedata

import numpy as np
import pytest
import sentencepiece

from jaxlm import tokenizers
from jaxlm.tokenizers import load_tokenizer, make_tokenizer, train_tokenizer
from jaxlm.tokenizers.kinds import ByteTokenizer

TEXTS = [
    "Two cafés, it's 3.14 o'clock!\n\n\tA  new line. \r\n",
    "你好，世界。 日本 مرحبا السَّلَامُ",
    "e\u0301 ﬁ Ünï ① İx 👩‍👩‍👧 \x00\u200d\ufeff ▁▁ a▁b",
    "",
    " ",
    "a",
    "\u0301",
]
EXACT = ("bytes", "chars", "byte_bpe", "bpe", "unigram")
FOREIGN = ("sentencepiece", "sentencepiece_bytes", "wordpiece", "prefix_space", "lower_nfc")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    sizes = {"byte_bpe": 400, "bpe": 400, "unigram": 400}
    made = {kind: train_tokenizer(kind, TEXTS, sizes.get(kind, 0), 4) for kind in EXACT}
    for name, options in (("sentencepiece", {}), ("sentencepiece_bytes", {"byte_fallback": True})):
        file = folder / f"{name}.model"
        file.write_bytes(train_usual_sentencepiece(**options))
        made[name] = load_tokenizer(file)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] two cafes it ' s a new line . un ##i e 你 好".split()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    made["wordpiece"] = load_tokenizer(folder / "vocab.txt")
    for name, change in (
        ("prefix_space", {"pre_tokenizer": byte_level(add_prefix_space=True)}),
        ("lower_nfc", {"normalizer": lower_nfc()}),
    ):
        file = folder / f"{name}.json"
        file.write_text(json.dumps(json.loads(made["byte_bpe"].blob) | change))
        made[name] = make_tokenizer("tokenizer_json", path=file)
    return made


def train_usual_sentencepiece(**options):
    """With SentencePiece's defaults: NFKC, single spaces, a space before the text; so its pieces are not the text's."""
    model = io.BytesIO()
    sentences = [text for text in TEXTS if text.strip()] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=350 if options else 70,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def byte_level(**options):
    return {"type": "ByteLevel", "trim_offsets": True, "use_regex": True, **options}


def lower_nfc():
    return {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}


def check_offsets(tokenizer, text):
    """Spans are of encode's ids, ascend, and together hold every character that stands for something."""
    ids, spans = tokenizer.encode_with_offsets(text)
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert spans.shape == (len(ids), 2) and spans.dtype == np.int64
    assert ((spans >= 0) & (spans <= len(text))).all() and (spans[:, 0] <= spans[:, 1]).all()
    assert (np.diff(spans, axis=0) >= 0).all()
    held = {i for start, end in spans for i in range(start, end)}
    missing = [text[i] for i in range(len(text)) if i not in held]
    if tokenizer.is_exact:
        assert not missing
    assert {unicodedata.category(c)[0] for c in missing} <= {"Z", "C", "M"}


def check_spans_are_the_pieces(tokenizer, text):
    """Ids i to j of an exact tokenizer decode to the text of their spans, where no character is cut."""
    ids, spans = tokenizer.encode_with_offsets(text)
    whole = [i for i in range(1, len(ids)) if spans[i, 0] == spans[i - 1, 1]]
    bounds = [0, *whole, len(ids)] if len(ids) else [0]
    for i, j in zip(bounds, bounds[1:], strict=False):
        assert tokenizer.decode(ids[i:j]) == text[spans[i, 0] : spans[j - 1, 1]]


@pytest.mark.parametrize("kind", (*EXACT, *FOREIGN))
def test_spans_ascend_and_hold_the_text(kind, kinds):
    for text in TEXTS:
        check_offsets(kinds[kind], text)


@pytest.mark.parametrize("kind", EXACT)
def test_spans_of_exact_tokenizers_are_the_text_of_their_pieces(kind, kinds):
    for text in TEXTS:
        check_spans_are_the_pieces(kinds[kind], text)


def test_offsets_in_bytes_fail_both_checks():
    class Bytewise(ByteTokenizer):
        def encode_with_offsets(self, text):
            ids = self.encode(text)
            return ids, np.stack([np.arange(len(ids)), np.arange(len(ids)) + 1], axis=1)

    for check in (check_offsets, check_spans_are_the_pieces):
        with pytest.raises(AssertionError):
            check(Bytewise(b""), TEXTS[0])


def check_word(tokenizer, text, word):
    """The ids whose spans touch the word have spans that together are the word, spaces beside it aside."""
    start = text.index(word)
    _, spans = tokenizer.encode_with_offsets(text)
    touching = spans[(spans[:, 1] > start) & (spans[:, 0] < start + len(word))]
    assert text[touching[:, 0].min() : touching[:, 1].max()].strip() == word


@pytest.mark.parametrize("kind", (*EXACT, *FOREIGN))
def test_a_word_is_found_again_whatever_was_normalised_before_it(kind, kinds):
    before = "e\u0301 ﬁ  Ü\u0301 ① \n"
    check_word(kinds[kind], before + "Two cafes a", "cafes")


def test_wordpiece_spans_are_those_of_the_text_before_lower_case_and_without_accents(kinds):
    ids, spans = kinds["wordpiece"].encode_with_offsets("Ünï  cafés\u200d E\u0301")
    assert [kinds["wordpiece"].token(i) for i in ids] == ["un", "##i", "cafes", "e"]
    assert spans.tolist() == [[0, 2], [2, 3], [5, 10], [12, 13]]


def test_an_unknown_character_has_its_place(kinds):
    ids, spans = kinds["chars"].encode_with_offsets("aЖs")
    assert ids[1] == kinds["chars"].unk_id and spans.tolist() == [[0, 1], [1, 2], [2, 3]]


@pytest.mark.parametrize("kind", (*EXACT, *FOREIGN))
def test_spans_go_on_in_the_parts_of_a_long_text(kind, kinds, monkeypatch):
    text = "Two cafés a.\n" * 9
    _, whole = kinds[kind].encode_with_offsets(text)
    monkeypatch.setattr(tokenizers.base, "_CHUNK", 30)
    assert len(list(tokenizers.base.chunks(text))) > 2
    check_offsets(kinds[kind], text)
    if kind not in (
        "sentencepiece",
        "sentencepiece_bytes",
        "prefix_space",
    ):  # a space before each part
        np.testing.assert_array_equal(kinds[kind].encode_with_offsets(text)[1], whole)
