"""Examples are windows over documents by arithmetic, and the order is a permutation in O(1)."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.packing import Examples, permute
from jaxlm.data.store_writer import write_store
from jaxlm.data.token_store import TokenStore


class ToyTokenizer(SimpleNamespace):
    def sentence_starts(self, ids):
        return np.arange(0, len(ids), 4)

    def save(self, directory):
        directory.mkdir()


TOKENIZER = ToyTokenizer(
    vocab_size=100, bos_id=1, eos_id=2, sha256="0" * 64, num_bytes=np.full(100, 2, np.int32)
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(0)
    documents = [rng.integers(7, 100, n) for n in (5, 0, 1, 40, 13, 2, 30, 8)]
    path = tmp_path_factory.mktemp("packing") / "store"
    write_store(path, {"train": documents}, TOKENIZER, shard_tokens=50)
    return TokenStore(path)


def all_tokens(store):
    """(token, document, position, is sentence start) of every position, document by document."""
    rows = []
    for document in range(store.num_documents):
        start, stop = store.document_span(document)
        sentences = set(store.sentence_starts(start, stop).tolist())
        for position, token in enumerate(store.tokens(start, stop)):
            rows.append((int(token), document, position, start + position in sentences))
    return rows


def check_windows(examples, store, length, stride):
    """Example i is [i * stride, i * stride + length) of the store, every token read as new once."""
    rows = all_tokens(store)
    new = 0
    for i in range(len(examples)):
        expected = rows[i * stride : i * stride + length]
        example = examples[i]
        assert example["tokens"].tolist() == [row[0] for row in expected]
        documents = [row[1] - expected[0][1] + 1 for row in expected]
        assert example["segment_ids"].tolist() == documents
        offset = expected[0][2]
        positions = [row[2] - offset * (d == 1) for row, d in zip(expected, documents, strict=True)]
        assert example["positions"].tolist() == positions
        assert example["sentence_starts"].tolist() == [row[3] for row in expected]
        new += len(expected) - (length - stride)
    assert new == len(rows) - (length - stride)


@pytest.mark.parametrize("length,stride", [(9, 8), (8, 8), (16, 5), (2, 1), (1, 1), (300, 299)])
def test_examples_are_windows_that_miss_nothing(store, length, stride):
    check_windows(Examples(store, length, stride), store, length, stride)


@pytest.mark.parametrize("length,stride", [(9, 8), (16, 5)])
def test_the_window_law_fails_for_a_dropped_tail_and_for_segments_from_zero(store, length, stride):
    class Dropped(Examples):
        def __len__(self):
            return super().__len__() - 1

    class FromZero(Examples):
        def __getitem__(self, i):
            example = super().__getitem__(i)
            return {**example, "segment_ids": example["segment_ids"] - 1}

    for wrong in (Dropped, FromZero):
        with pytest.raises(AssertionError):
            check_windows(wrong(store, length, stride), store, length, stride)


def check_within_documents(examples, store, length, stride):
    """Each document's windows, in order; none crosses, all tokens are read as new once."""
    i = 0
    for document in range(store.num_documents):
        start, stop = store.document_span(document)
        first = i
        for begin in range(start, stop - (length - stride), stride):
            assert examples.span(i) == (begin, min(begin + length, stop))
            assert (examples[i]["segment_ids"] == 1).all()
            i += 1
        for j in range(first, i):
            assert examples.same_document(j) == (first, i)
    assert i == len(examples)


@pytest.mark.parametrize("length,stride", [(9, 9), (9, 8), (64, 64)])
def test_examples_within_documents(store, length, stride):
    examples = Examples(store, length, stride, within_document=True)
    check_within_documents(examples, store, length, stride)
    copy = pickle.loads(pickle.dumps(examples))
    assert [copy.span(i) for i in range(len(copy))] == [examples.span(i) for i in range(len(copy))]
    with pytest.raises((AssertionError, AttributeError)):
        check_within_documents(Examples(store, length, stride), store, length, stride)


def test_an_example_past_the_end_is_an_error(store):
    examples = Examples(store, 8, 8)
    for i in (-1, len(examples)):
        with pytest.raises(IndexError, match=f"found example {i}"):
            examples[i]
    with pytest.raises(ValueError, match="expected 0 < stride <= length"):
        Examples(store, 8, 9)


def check_permutation(permute, size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    check_permutation(permute, size, key)


def test_the_permutation_law_fails_for_random_numbers():
    with pytest.raises(AssertionError):
        check_permutation(lambda i, n, key: (i * 6 + key) % n, 15, 3)


def test_permute_looks_random():
    """No fixed points beyond chance, no runs, and keys give unrelated orders."""
    size = 5000
    orders = [np.array([permute(i, size, key) for i in range(size)]) for key in (0, 1, 2**63)]
    for order in orders:
        assert (order == np.arange(size)).sum() < 10
        assert (np.diff(order) == 1).sum() < 10
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.05
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (orders[a] == orders[b]).sum() < 10
        assert abs(np.corrcoef(orders[a], orders[b])[0, 1]) < 0.05
    first = [permute(0, 10, key) for key in range(5000)]
    assert np.bincount(first, minlength=10).min() > 400


def test_permute_of_a_huge_range_is_immediate():
    size = 10**15 + 37
    values = {permute(i, size, 5) for i in range(1000)}
    assert len(values) == 1000 and max(values) < size
