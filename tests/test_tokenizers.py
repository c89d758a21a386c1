"""Laws of every kind of tokenizer: exact round trips, bytes that add up, reserved ids that text cannot write."""

import json
import pickle
import unicodedata

import numpy as np
import pytest
import tokenizers as hf

from jaxlm import tokenizers
from jaxlm.exits import Damaged
from jaxlm.tokenizers import load_tokenizer, make_tokenizer, train_tokenizer
from jaxlm.tokenizers.base import identity_sha256

ENGLISH = "The cat sat. It's 3.14 o'clock! \"Why?\" (Because.) It is so.\n\nA new line.\n" * 8
CHINESE = "你好，世界。今天天气很好！我们去公园吗？\n"
ARABIC = "مرحبا بالعالم. كيف حالك؟ السَّلَامُ عَلَيْكُمْ\n"
CODE = "def f(x):\n\tif x  ==   3:\r\n        return self.x[1_000]   # <pad> <extra_id_0>\n\n\n\n"
ODD = " \x00▁ e\u0301 ﬁ 👩‍👩‍👧 \u200f\ufeff  \n \t"
TEXTS = [ENGLISH, CHINESE, ARABIC, CODE, ODD, "", " ", "a", "\n", "▁▁"]
KINDS = ("bytes", "chars", "byte_bpe", "bpe", "unigram")


@pytest.fixture(scope="module")
def trained():
    sizes = {"byte_bpe": 420, "bpe": 420, "unigram": 420}
    return {
        kind: train_tokenizer(kind, TEXTS, sizes.get(kind, 0), num_sentinels=10) for kind in KINDS
    }


def check_round_trip(tokenizer, texts):
    """Ids decode to the very text, add up to its bytes, and are no special ids."""
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert tokenizer.decode(ids) == text
        assert tokenizer.num_bytes[ids].sum() == len(text.encode())
        assert not tokenizer.special_ids.intersection(ids.tolist())
    for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_kind_round_trips_english_chinese_arabic_and_code(kind, trained):
    check_round_trip(trained[kind], TEXTS)


def test_a_tokenizer_that_normalizes_fails_the_round_trip(trained):
    class Normalizing(tokenizers.kinds.ByteTokenizer):
        def _encode(self, text):
            return super()._encode(unicodedata.normalize("NFC", text))

    with pytest.raises(AssertionError):
        check_round_trip(Normalizing(b""), TEXTS)


@pytest.mark.parametrize("kind", ("bytes", "byte_bpe", "bpe", "unigram"))
def test_text_never_seen_in_training_round_trips_by_bytes(kind, trained):
    check_round_trip(trained[kind], ["日本語とελληνικά, привет\u2028 ½ \U0001f600", CHINESE[::-1]])


def test_an_unknown_character_is_unk_and_counts_no_bytes(trained):
    tokenizer = trained["chars"]
    ids = tokenizer.encode("aЖs")
    assert ids[1] == tokenizer.unk_id and tokenizer.num_bytes[ids].sum() == 2
    assert tokenizer.decode(ids) == "as"


def check_save_and_load(tokenizer, folder):
    tokenizer.save(folder)
    for copy in (load_tokenizer(folder), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.sha256 == tokenizer.sha256 and copy.kind == tokenizer.kind
        assert copy.roles == tokenizer.roles and copy.sentinel_ids == tokenizer.sentinel_ids
        for name in ("is_word_start", "ends_sentence", "num_bytes"):
            np.testing.assert_array_equal(getattr(copy, name), getattr(tokenizer, name))
        for text in TEXTS:
            np.testing.assert_array_equal(copy.encode(text), tokenizer.encode(text))


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_and_pickle_keep_everything(kind, trained, tmp_path):
    check_save_and_load(trained[kind], tmp_path / "saved")


def test_a_changed_model_file_is_refused(trained, tmp_path):
    trained["chars"].save(tmp_path)
    file = tmp_path / "characters.txt"
    file.write_bytes(file.read_bytes() + "\U0001f9e0".encode())
    with pytest.raises(Damaged, match="characters.txt"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_reserved_ids_are_distinct_in_range_and_named(kind, trained):
    tokenizer = trained[kind]
    reserved = [*tokenizer.roles.values(), *tokenizer.sentinel_ids]
    assert len(set(reserved)) == len(reserved) == 17
    assert set(reserved) <= tokenizer.special_ids
    assert max(reserved) < tokenizer.vocab_size == len(tokenizer.num_bytes)
    assert tokenizer.num_bytes[sorted(tokenizer.special_ids)].sum() == 0
    assert tokenizer.token(tokenizer.mask_id) == "<mask>"
    assert tokenizer.token(tokenizer.sentinel_ids[3]) == "<extra_id_3>"
    assert tokenizer.decode(reserved) == ""


@pytest.mark.parametrize("kind", ("byte_bpe", "unigram", "bpe"))
def test_the_same_texts_train_the_same_tokenizer(kind, trained):
    assert train_tokenizer(kind, TEXTS, 420, num_sentinels=10).sha256 == trained[kind].sha256


def test_long_text_is_encoded_in_parts_as_if_whole(trained, monkeypatch):
    text = (CODE + ENGLISH + CHINESE) * 5
    for kind in KINDS:
        whole = trained[kind].encode(text)
        with monkeypatch.context() as patch:
            patch.setattr(tokenizers.base, "_CHUNK", 50)
            assert len(list(tokenizers.base.chunks(text))) > 20
            np.testing.assert_array_equal(trained[kind].encode(text), whole)


def test_too_small_a_vocabulary_is_refused_with_the_least():
    with pytest.raises(ValueError, match="at least 364"):
        train_tokenizer("byte_bpe", TEXTS, 300)
    with pytest.raises(ValueError, match="byte_bpe, bytes, chars, unigram"):
        train_tokenizer("wordpiece", TEXTS, 300)


def test_words_start_at_spaces_punctuation_and_ideographs(trained):
    tokenizer = trained["byte_bpe"]
    starts = [
        tokenizer.decode([i]) for i in tokenizer.encode(" cat, dog") if tokenizer.is_word_start[i]
    ]
    assert [s[0] for s in starts] == [" ", ",", " "]
    chars = trained["chars"]
    word_start = dict(zip("a好3. 'َ", chars.is_word_start[chars.encode("a好3. 'َ")], strict=True))
    assert word_start == {"a": 0, "好": 1, "3": 0, ".": 1, " ": 1, "'": 0, "َ": 0}


@pytest.mark.parametrize("kind", ("chars", "unigram", "bpe"))
def test_sentences_start_after_marks_and_line_ends_but_not_inside_numbers(kind, trained):
    tokenizer = trained[kind]
    text = "The cat sat. It's 3.14 o'clock!\n\nA new line.你好，世界。今天"
    ids = tokenizer.encode(text)
    parts = np.split(ids, tokenizer.sentence_starts(ids)[1:])
    assert [tokenizer.decode(part) for part in parts] == [
        "The cat sat.",
        " It's 3.14 o'clock!\n\n",
        "A new line.",
        "你好，世界。",
        "今天",
    ]


def wordpiece_folder(path, lower):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat ##s sat . 你 好".split()
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(words if lower else [*words, "The"]) + "\n")
    return path


def test_a_bert_vocabulary_is_wordpiece_with_bos_and_eos_as_aliases(tmp_path):
    tokenizer = load_tokenizer(wordpiece_folder(tmp_path / "lower", lower=True))
    pieces = [tokenizer.token(i) for i in tokenizer.encode("The cats sat. 你好 [MASK]")]
    assert pieces[:5] == ["the", "cat", "##s", "sat", "."] and pieces[5:7] == ["你", "好"]
    assert tokenizer.mask_id not in tokenizer.encode("[MASK]")
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.mask_id) == (0, 2, 4)
    assert tokenizer.bos_id == tokenizer.cls_id and tokenizer.eos_id == tokenizer.sep_id
    assert tokenizer.vocab_size == 12 and not tokenizer.is_exact
    assert tokenizer.decode(tokenizer.encode("the cats sat.")) == "the cats sat."
    start = [bool(tokenizer.is_word_start[i]) for i in tokenizer.encode("the cats.")]
    assert start == [True, True, False, True]
    cased = load_tokenizer(wordpiece_folder(tmp_path / "cased", lower=False))
    assert [cased.token(i) for i in cased.encode("The the")] == ["The", "the"]


@pytest.mark.parametrize(
    ("settings", "pieces"),
    {
        "{}": ["fur", "fur", "你", "好"],
        '{"strip_accents": false}': ["für", "für", "你", "好"],
        '{"tokenize_chinese_chars": false}': ["fur", "fur", "你好"],
        '{"do_lower_case": false}': ["für", "[UNK]", "你", "好"],
        '{"do_lower_case": false, "strip_accents": true}': ["fur", "[UNK]", "你", "好"],
    }.items(),
)
def test_a_bert_vocabulary_normalizes_as_its_configuration_says(settings, pieces, tmp_path):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] für fur 你 好 你好".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(settings)
    tokenizer = load_tokenizer(tmp_path)
    assert [tokenizer.token(i) for i in tokenizer.encode("für Für 你好")] == pieces


def test_reserved_ids_that_a_loaded_vocabulary_lacks_are_appended(tmp_path, trained):
    model = hf.Tokenizer.from_str(trained["byte_bpe"].blob.decode())
    config = json.loads(model.to_str())
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    config["model"]["vocab"] = {token: i for i, token in enumerate([*alphabet, "<|endoftext|>"])}
    config["model"]["merges"] = []
    config["added_tokens"] = [{**config["added_tokens"][0], "id": 256, "content": "<|endoftext|>"}]
    config["truncation"] = dict(direction="Right", max_length=4, strategy="LongestFirst", stride=0)
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.cls_id == tokenizer.sep_id == 256
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id) == (257, 258, 259)
    assert tokenizer.vocab_size == 260 and tokenizer.sentinel_ids == ()
    check_round_trip(tokenizer, TEXTS)  # the file's truncation to 4 tokens is not applied
    check_save_and_load(tokenizer, tmp_path / "saved")
    more = make_tokenizer("tokenizer_json", path=tmp_path / "tokenizer.json", num_sentinels=5)
    assert more.sentinel_ids == (260, 261, 262, 263, 264) and more.vocab_size == 265
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<|endoftext|>"}}')
    assert load_tokenizer(tmp_path).pad_id == 256


def test_a_plain_sentencepiece_file_loads_with_the_usual_spellings(tmp_path, trained):
    file = tmp_path / "spiece.model"
    file.write_bytes(trained["unigram"].blob)
    for path in (file, tmp_path):
        tokenizer = load_tokenizer(path)
        assert tokenizer.sha256 == trained["unigram"].sha256
        check_round_trip(tokenizer, TEXTS)


def test_a_folder_without_a_tokenizer_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="vocab.txt"):
        load_tokenizer(tmp_path)


def test_saved_reserved_ids_outside_the_vocabulary_are_refused(trained, tmp_path):
    trained["bytes"].save(tmp_path)
    meta = json.loads((tmp_path / "jaxlm_tokenizer.json").read_text())
    meta["roles"]["mask"] = 10_000
    reserved = {name: meta[name] for name in ("roles", "sentinel_ids", "vocab_size")}
    meta["sha256"] = identity_sha256("bytes", (tmp_path / "bytes.txt").read_bytes(), reserved)
    (tmp_path / "jaxlm_tokenizer.json").write_text(json.dumps(meta))
    with pytest.raises(Damaged, match="do not fit"):
        load_tokenizer(tmp_path)


@pytest.mark.oracles
def test_transformers_reads_our_tokenizer_json_with_the_same_ids(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = trained["byte_bpe"]
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.mask_token_id == ours.mask_id and theirs.eos_token_id == ours.eos_id
    for text in (ENGLISH, CHINESE, ARABIC):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text).tolist()
