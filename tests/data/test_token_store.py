"""Laws of the token store: what is written is read, in any ranges, across shards, and damage is found."""

import json
import pickle

import numpy as np
import pytest

from jaxlm.data import store_format
from jaxlm.data.store_format import PARTS
from jaxlm.data.store_writer import write_store
from jaxlm.data.token_store import TokenStore
from jaxlm.exits import Damaged
from jaxlm.sealed import seal
from jaxlm.tokenizers import make_tokenizer
from tests.fixtures.make import as_schema_1

TOKENIZER = make_tokenizer("bytes", num_sentinels=0)
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
TEXTS = ["The cat sat. It slept.\n", "", "你好\nمرحبا. ok", "x" * 40, "a", "b\n\nc\n"]
DOCUMENTS = [TOKENIZER.encode(text) for text in TEXTS]
FLAT = np.concatenate([[BOS, *ids, EOS] for ids in DOCUMENTS]).astype(np.int32)
STARTS = np.concatenate([[0], np.cumsum([len(ids) + 2 for ids in DOCUMENTS])])


@pytest.fixture(params=[10, 30, 1 << 20], ids=lambda n: f"shards of {n}")
def path(request, tmp_path):
    path = tmp_path / "store"
    splits = {"train": DOCUMENTS, "validation": DOCUMENTS[:1]}
    write_store(path, splits, TOKENIZER, shard_tokens=request.param)
    return path


def check_reads_what_was_written(store):
    """Every range, document and sentence is that of the plain arrays."""
    size = len(FLAT)
    assert (store.num_tokens, store.num_documents) == (size, len(TEXTS))
    assert store.num_bytes == sum(len(text.encode()) for text in TEXTS)
    np.testing.assert_array_equal(store.document_starts(), STARTS[:-1])
    sentences = np.concatenate(
        [STARTS[i] + 1 + TOKENIZER.sentence_starts(ids) for i, ids in enumerate(DOCUMENTS)]
    )
    for start in range(0, size + 1, 7):
        for stop in {start, min(start + 1, size), (start + size) // 2, size}:
            tokens = store.tokens(start, stop)
            assert tokens.dtype == np.int32
            np.testing.assert_array_equal(tokens, FLAT[start:stop])
            for name, expected in (
                ("documents_in", STARTS[:-1]),
                ("sentence_starts", sentences),
            ):
                inside = expected[(start <= expected) & (expected < stop)]
                np.testing.assert_array_equal(getattr(store, name)(start, stop), inside)
    for position in range(size):
        index = store.document_of(position)
        start, stop = store.document_span(index)
        assert (start, stop) == (STARTS[index], STARTS[index + 1]) and start <= position < stop
    for i, text in enumerate(TEXTS):
        assert TOKENIZER.decode(store.tokens(*store.document_span(i))) == text


def test_every_range_reads_what_was_written(path):
    check_reads_what_was_written(TokenStore(path))


def test_a_store_that_forgets_the_shard_border_fails(tmp_path):
    class OneShard(TokenStore):
        def tokens(self, start, stop):
            return self._part(0, "tokens").read(start, stop).astype(np.int32)

    write_store(tmp_path / "s", {"train": DOCUMENTS}, TOKENIZER, shard_tokens=30)
    with pytest.raises(AssertionError):
        check_reads_what_was_written(OneShard(tmp_path / "s"))


def test_the_drawing_of_the_docstring(tmp_path):
    tokenizer = make_tokenizer("chars", characters="thecats. ", num_sentinels=0)
    write_store(
        tmp_path / "s", {"train": [tokenizer.encode("a cat. a"), tokenizer.encode("e")]}, tokenizer
    )
    store = TokenStore(tmp_path / "s")
    drawn = [
        tokenizer.token(i)
        for i in store.tokens(0, store.num_tokens)
    ]  # fmt: skip
    assert "".join(drawn) == "<bos>a cat. a<eos><bos>e<eos>"
    assert store.sentence_starts(0, store.num_tokens).tolist() == [1, 7, 11]
    assert store.documents_in(0, store.num_tokens).tolist() == [0, 10]


def test_every_text_token_is_a_label_once_and_every_document_ends(path):
    store = TokenStore(path)
    labels = store.tokens(1, store.num_tokens)
    assert TOKENIZER.num_bytes[labels].sum() == store.num_bytes
    assert (labels == EOS).sum() == store.num_documents


def test_shards_hold_whole_documents_and_no_more_than_asked(path):
    store = TokenStore(path)
    limit = 30
    for shard in store.manifest["splits"]["train"]["shards"]:
        assert shard["num_tokens"] <= limit or shard["num_documents"] == 1 or len(FLAT) < 1 << 20


def test_ranges_outside_the_store_are_refused(path):
    store = TokenStore(path)
    for start, stop in ((-1, 2), (0, store.num_tokens + 1), (5, 4)):
        with pytest.raises(IndexError):
            store.tokens(start, stop)
    for index in (-1, store.num_documents):
        with pytest.raises(IndexError):
            store.document_span(index)
    with pytest.raises(IndexError):
        store.document_of(store.num_tokens)


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path):
    characters = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000))) + "".join(
        map(chr, range(0x20000, 0x20000 + 46_000))
    )
    tokenizer = make_tokenizer("chars", characters=characters)
    ids = tokenizer.encode(characters)
    write_store(tmp_path / "s", {"train": [ids]}, tokenizer)
    store = TokenStore(tmp_path / "s")
    assert store.manifest["dtype"] == "uint32" and tokenizer.vocab_size > 1 << 16
    np.testing.assert_array_equal(store.tokens(1, store.num_tokens - 1), ids)


def test_a_store_travels_to_another_process_as_its_path(path):
    store = TokenStore(path, "validation")
    data = pickle.dumps(store)
    assert len(data) < 500
    assert pickle.loads(data).num_tokens == store.num_tokens


def test_missing_and_short_files_are_all_named_when_the_store_is_opened(path):
    (path / "train-00000.documents.npy").unlink()
    tokens = path / "train-00000.tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:20])
    (path / "train-00000.sentences.npy").rename(path / "moved")
    (path / "train-00000.sentences.npy").symlink_to("/etc/passwd")
    with pytest.raises(Damaged) as error:
        TokenStore(path)
    assert "documents.npy: missing" in str(error.value)
    assert "tokens.npy: 20 bytes" in str(error.value)
    assert "sentences.npy: a link" in str(error.value)


def test_a_pickle_in_place_of_a_shard_is_not_loaded(path):
    file = path / "train-00000.tokens.npy"
    size = file.stat().st_size
    np.save(file, np.array([{"x": 1}] * 1000, object), allow_pickle=True)
    file.write_bytes((file.read_bytes() + bytes(size))[:size])
    as_schema_1(path)
    with pytest.raises(Damaged, match="found object .*, the manifest says uint16"):
        TokenStore(path).tokens(0, 1)


def edit_manifest(path, edit, seal=seal):
    """Changes a manifest; it is sealed again, as somebody who means harm would."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(seal(manifest)))


def test_names_in_the_manifest_cannot_leave_the_folder(path):
    edit_manifest(path, lambda m: m["splits"].update({"../../etc/x": m["splits"]["train"]}))
    with pytest.raises(ValueError, match="a split is named"):
        TokenStore(path)
    with pytest.raises(ValueError, match="lower-case"):
        write_store(path.with_name("other"), {"../x": DOCUMENTS}, TOKENIZER)


def test_another_schema_or_dtype_is_refused(path):
    edit_manifest(path, lambda m: m.update(schema_version=99, dtype="object"))
    with pytest.raises(ValueError, match="schema_version 99, expected 2"):
        TokenStore(path)
    edit_manifest(path, lambda m: m.update(schema_version=2))
    with pytest.raises(ValueError, match="dtype 'object'"):
        TokenStore(path)


def test_an_array_that_is_not_what_the_manifest_says_is_refused(path):
    file = path / "train-00000.tokens.npy"
    size = len(np.load(file))
    np.save(file, np.zeros(size, np.int16))
    with pytest.raises(Damaged, match="bytes 0 to .* are not those that were written"):
        TokenStore(path).tokens(0, 1)
    as_schema_1(path)
    with pytest.raises(Damaged, match="found int16 .*, the manifest says uint16"):
        TokenStore(path).tokens(0, 1)
    np.save(file, np.zeros(size + 1, np.uint16))
    with pytest.raises(Damaged, match="bytes, expected"):
        TokenStore(path)


def check_reads_nothing_else(store, expected):
    """Each read gives what was written, or says that it is not there any more."""
    reads = {
        "tokens": lambda: store.tokens(0, store.num_tokens),
        "documents": lambda: store.documents_in(0, store.num_tokens),
        "document_of": lambda: [store.document_of(i) for i in range(store.num_tokens)],
        "spans": lambda: [store.document_span(i) for i in range(store.num_documents)],
        "sentences": lambda: store.sentence_starts(0, store.num_tokens),
        "starts": store.document_starts,
    }
    damaged = set()
    for name, read in reads.items():
        try:
            found = np.asarray(read()).tolist()
        except Damaged as error:
            assert "train-00000" in str(error)
            damaged.add(name)
        else:
            assert found == expected.setdefault(name, found), name
    return damaged


PLACES = {"tokens": {"tokens"}, "sentences": {"sentences"}}
PLACES["documents"] = {"documents", "document_of", "spans", "starts"}


@pytest.mark.parametrize("part", PARTS)
def test_a_flipped_bit_is_found_by_what_reads_it_and_by_nothing_else(part, path):
    expected = {}
    assert check_reads_nothing_else(TokenStore(path), expected) == set()
    file = path / f"train-00000.{part}.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert check_reads_nothing_else(TokenStore(path), expected) == PLACES[part]
    as_schema_1(path)  # whose reads are not checked
    with pytest.raises(AssertionError):
        check_reads_nothing_else(TokenStore(path), expected)


def test_a_search_that_a_flipped_bit_leads_astray_is_found(tmp_path):
    """Also where the block that it ends in is whole."""
    documents = [TOKENIZER.encode("ab")] * 50_000
    write_store(tmp_path / "s", {"train": documents}, TOKENIZER)
    file = tmp_path / "s" / "train-00000.documents.npy"
    data = bytearray(file.read_bytes())
    middle = 128 + 8 * 25_000
    data[middle + 3] ^= 1  # the first number that a search looks at, by 2**24
    file.write_bytes(data)
    store = TokenStore(tmp_path / "s")
    assert store.documents_in(10, 30).tolist() == [
        12,
        16,
        20,
        24,
        28,
    ]  # below: the search goes left
    with pytest.raises(Damaged, match="bytes 196,608 to 262,144"):
        store.documents_in(180_000, 180_010)


def test_a_changed_manifest_is_found(path):
    edit_manifest(path, lambda m: m.update(vocab_size=262), seal=lambda manifest: manifest)
    with pytest.raises(Damaged, match="manifest.json: its sha256 is not the one in it"):
        TokenStore(path)


@pytest.mark.parametrize(
    "edit, says",
    [
        (lambda m: m["splits"]["train"].update(num_tokens=5), "num_tokens 5 is not the sum"),
        (lambda m: m["splits"]["train"]["shards"][0].update(num_tokens=-1), "expected counts"),
        (lambda m: m["splits"]["train"]["shards"][0].update(num_tokens=1 << 60), "expected counts"),
        (lambda m: m["splits"]["train"]["shards"][0].update(sha256="../x"), "expected a sha256"),
        (lambda m: m["splits"].update(train=[]), "names no shards"),
        (lambda m: m.update(splits=3), "names no splits"),
        (lambda m: m.update(vocab_size=1 << 20), "do not fit one another"),
        (lambda m: m.update(fingerprint="0" * 64), "fingerprint is not that of its files"),
    ],
)
def test_numbers_and_names_that_no_store_has_are_refused_before_they_are_used(path, edit, says):
    edit_manifest(path, edit)
    with pytest.raises(ValueError, match=says):
        TokenStore(path)


def test_a_manifest_that_is_no_json_or_too_large_is_damage(path, monkeypatch):
    file = path / "manifest.json"
    whole = file.read_bytes()
    for content in (b"", b"\xff" + whole, whole[:-9], b"[" * 100_000, b"[1]"):
        file.write_bytes(content)
        with pytest.raises(Damaged, match=r"manifest.json: found"):
            TokenStore(path)
    file.write_bytes(whole)
    monkeypatch.setattr(store_format, "_MANIFEST_BYTES", len(whole) - 1)
    with pytest.raises(Damaged, match="more than"):
        TokenStore(path)


def test_a_large_shard_may_be_declared_but_is_compared_with_its_file_first(path):
    def larger(manifest):
        for counts in (manifest["splits"]["train"], manifest["splits"]["train"]["shards"][0]):
            counts["num_tokens"] += 1 << 40

    edit_manifest(path, larger)
    with pytest.raises(Damaged, match="tokens.npy: .* bytes, expected 2,199"):
        TokenStore(path)


def test_an_unknown_split_lists_the_known_ones(path):
    with pytest.raises(ValueError, match="train, validation"):
        TokenStore(path, "test")


def test_a_folder_without_a_manifest_is_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare_data"):
        TokenStore(tmp_path)


def test_the_fingerprint_is_of_the_contents(tmp_path):
    manifests = [
        write_store(tmp_path / str(i), {"train": documents}, TOKENIZER)
        for i, documents in enumerate((DOCUMENTS, DOCUMENTS, DOCUMENTS[::-1]))
    ]
    assert manifests[0] == manifests[1]
    assert manifests[0]["fingerprint"] != manifests[2]["fingerprint"]


def test_a_store_is_not_overwritten_and_ids_are_checked(path):
    with pytest.raises(FileExistsError):
        write_store(path, {"train": DOCUMENTS}, TOKENIZER)
    with pytest.raises(ValueError, match="ids from 5 to 999"):
        write_store(path.with_name("other"), {"train": [np.array([5, 999])]}, TOKENIZER)
    assert not path.with_name("other").exists()
