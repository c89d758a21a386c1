"""Streamed text is the decoded text, cut before the first stop string, however its ids arrive."""

import io
import itertools

import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.inference.text import ANCHOR, TextStream
from jaxlm.tokenizers import load_tokenizer, make_tokenizer, train_tokenizer
from jaxlm.tokenizers.kinds import JSONTokenizer, SentencePieceTokenizer

TEXT = "The cats sat on 3 mats.\n\nIt's  so.\tYou can't! 你好，世界。 naïve 👩‍👩‍👧 ▁ end\n"


def wordpiece(folder):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat ##s sat . , ' n't do 's 你 好 ##ing n ##'t !"
    (folder / "vocab.txt").write_text("\n".join(words.split()))
    return load_tokenizer(folder)


def foreign_sentencepiece():
    """As T5's: text is normalised, begins with a space that decoding drops, and spaces are joined."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, "the cat sat"] * 4),
        model_writer=model,
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())


def llama_json():
    """As Llama 2's: a run of bytes is decoded as one, and becomes U+FFFD whole if it is not UTF-8."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for token in ["▁", "▁the", "▁cat", "s", ".", "▁▁", "a", "\n", "你"]:
        vocab[token] = len(vocab)
    model = hf.Tokenizer(hf.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    spaces = [hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")]
    model.normalizer = hf.normalizers.Sequence(spaces)
    parts = [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    model.decoder = hf.decoders.Sequence([*parts, hf.decoders.Strip(content=" ", left=1)])
    return JSONTokenizer(model.to_str().encode())


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    trained = {k: train_tokenizer(k, [TEXT] * 4, 330, num_sentinels=1) for k in ("byte_bpe", "bpe")}
    return trained | {
        "bytes": make_tokenizer("bytes", num_sentinels=0),
        "sentencepiece": foreign_sentencepiece(),
        "llama": llama_json(),
        "wordpiece": wordpiece(tmp_path_factory.mktemp("wordpiece")),
    }


KINDS = ("bytes", "byte_bpe", "bpe", "sentencepiece", "llama", "wordpiece")


def stream(tokenizer, groups, stop=(), before=()):
    made = TextStream(tokenizer, stop, before)
    pieces = [made.push(group) for group in groups]
    return "".join([*pieces, made.finish()]), made.stopped


def check_stream(stream, tokenizer, groups, stop=(), before=()):
    """The pieces joined are the text after `before`, up to the first stop string."""
    ids = [*before, *itertools.chain.from_iterable(groups)]
    text = tokenizer.decode(ids)[len(tokenizer.decode(before)) :]
    places = [text.find(s) for s in stop if s in text]
    end = min(places, default=len(text))
    assert stream(tokenizer, groups, stop, before) == (text[:end], bool(places))


def fragments(tokenizer):
    """Ids whose sequences are characters, broken ones, and spaces: bytes of é, 你 and 👩, spaces, a word, a special."""
    byte_ids = {piece: i for i, piece in reversed(list(enumerate(tokenizer._pieces)))}
    spelled = [bytes([byte]) for byte in " éa你👩".encode()]
    ids = [[byte_ids[piece]] for piece in spelled if piece in byte_ids]
    whole = [tokenizer.encode(text).tolist() for text in ("é", "👩", " the", "  ", "s")]
    return ids + whole + [[tokenizer.bos_id]]


@st.composite
def cases(draw, tokenizers):
    """A tokenizer, ids in groups (of real text, or any ids at all), and stop strings that often occur or overlap."""
    tokenizer = tokenizers[draw(st.sampled_from(KINDS))]
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=4 * ANCHOR)
    text_ids = st.text(TEXT, max_size=3 * ANCHOR).map(lambda t: tokenizer.encode(t).tolist())
    hard = st.lists(st.sampled_from(fragments(tokenizer)), max_size=4 * ANCHOR)
    ids = draw(any_ids | text_ids | hard.map(lambda groups: sum(groups, [])))
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=8))) + [len(ids)]
    groups = [ids[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]
    if draw(st.booleans()):
        groups = [[i] for i in ids]
    text = tokenizer.decode(ids) or "a"
    places = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 6))
    inside = places.map(lambda at: text[at[0] : sum(at)])
    stop = draw(st.lists(inside | st.text("a. \ns", min_size=1), max_size=3))
    before = draw(st.just([]) | text_ids) if tokenizer.is_exact else []
    return tokenizer, groups, stop, before


def test_streamed_text_is_the_decoded_text_before_the_first_stop_string(tokenizers):
    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(cases(tokenizers))
    def check(case):
        check_stream(stream, *case)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_and_prompts_are_streamed_as_decoded_whole(kind, tokenizers):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode((TEXT + "the cats sat. the cat do n't  sat\n") * 3).tolist()
    check_stream(stream, tokenizer, [[i] for i in ids])
    if tokenizer.is_exact:
        half = tokenizer.encode(TEXT).tolist()
    else:
        half = tokenizer.encode("the cats sat. the cats").tolist()
    check_stream(stream, tokenizer, [[i] for i in ids], ["\n\n", " end"], before=half)


def naive(tokenizer, groups, stop=(), before=()):
    text = "".join(tokenizer.decode(group) for group in groups)
    places = [text.find(s) for s in stop if s in text]
    return text[: min(places, default=len(text))], bool(places)


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_fails_if_each_piece_is_decoded_alone(kind, tokenizers):
    """Characters of several bytes, spaces between words and ## are lost then."""
    ids = tokenizers[kind].encode("the cats sat. 你好 ½👩").tolist()
    with pytest.raises(AssertionError):
        check_stream(naive, tokenizers[kind], [[i] for i in ids])


def test_the_check_fails_if_a_stop_string_is_searched_in_each_piece_alone(tokenizers):
    def in_pieces(tokenizer, groups, stop=(), before=()):
        made = TextStream(tokenizer, (), before)
        text = ""
        for group in groups:
            piece = made.push(group)
            if any(s in piece for s in stop):
                return text + piece[: min(piece.find(s) for s in stop if s in piece)], True
            text += piece
        return text + made.finish(), False

    groups = [[i] for i in tokenizers["bytes"].encode("one two.\n\nthree").tolist()]
    check_stream(stream, tokenizers["bytes"], groups, ["\n\n"])
    with pytest.raises(AssertionError):
        check_stream(in_pieces, tokenizers["bytes"], groups, ["\n\n"])


def pieces(tokenizer, text, stop=()):
    made = TextStream(tokenizer, stop)
    return [made.push([i]) for i in tokenizer.encode(text)], made


def test_text_comes_as_soon_as_it_is_certain(tokenizers):
    """Whole characters at once, and of a stop string's beginning as much as cannot be one any more."""
    found, made = pieces(tokenizers["bytes"], "aé你b")
    assert found == ["a", "", "é", "", "", "你", "b"] and made.finish() == ""
    found, made = pieces(tokenizers["bytes"], "a..b...c", stop=["..."])
    assert found == ["a", "", "", "..b", "", "", "", ""] and made.stopped and made.finish() == ""
    found, made = pieces(tokenizers["bytes"], "x.", stop=["...", "y"])
    assert found == ["x", ""] and not made.stopped and made.finish() == "." and not made.stopped


def test_of_stop_strings_that_overlap_the_one_that_begins_first_counts(tokenizers):
    found, made = pieces(tokenizers["bytes"], "abcd", stop=["bcd", "c"])
    assert "".join(found) == "a" and made.stopped
    found, made = pieces(tokenizers["bytes"], "abcx", stop=["bcd", "c"])
    assert "".join(found) == "ab" and made.stopped


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_of_a_token_does_not_grow_with_the_text(kind, tokenizers, monkeypatch):
    tokenizer, sizes = tokenizers[kind], []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: sizes.append(len(ids)) or decode(ids))
    pieces(tokenizer, "the cats sat. the cat sat. " * 40)
    assert len(sizes) > 300 and max(sizes) < 4 * ANCHOR


def test_stop_strings_must_be_a_list_of_strings_that_are_not_empty(tokenizers):
    for wrong in ("stop", ["a", ""]):
        with pytest.raises(ValueError, match="list of strings"):
            TextStream(tokenizers["bytes"], wrong)
