"""Search over vectors: the nearest are found whatever the chunks, and only what `save` wrote is loaded."""

import io
import json
import zipfile

import numpy as np
import pytest

from jaxlm.inference import search
from jaxlm.inference.search import Index, normalized


def make_vectors(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_index(n=23, width=8):
    vectors = make_vectors(0, n, width) * np.arange(1, n + 1, dtype=np.float32)[:, None]
    vectors[[7, 12, 19]] = vectors[3]  # equally near to everything
    return Index(vectors, [f"text {i}" for i in range(n)])


def check_finds_the_nearest(index, **options):
    """Against sorting the cosines of the vectors as they were given."""
    queries = 5 * make_vectors(1, 4, 8)
    queries[0] = index.vectors[3]
    cosines = normalized(queries).astype(np.float64) @ index.vectors.T.astype(np.float64)
    order = np.argsort(-np.round(cosines, 6), axis=1, kind="stable")
    for k in (1, 5, 23, 99):
        hits = index.search(queries, k, **options)
        k = min(k, len(index))
        np.testing.assert_array_equal(hits.places, order[:, :k])
        np.testing.assert_allclose(
            hits.cosines, np.take_along_axis(cosines, order[:, :k], axis=1), atol=1e-6
        )


@pytest.mark.parametrize("chunk", [3, 8, 16384])
def test_the_nearest_are_found_in_chunks_of_any_size(chunk):
    check_finds_the_nearest(make_index(), chunk=chunk)


def test_a_search_that_forgets_earlier_chunks_is_found(monkeypatch):
    right = search.merge_nearest

    def forgetful(best, *rest):
        return right((np.full_like(best[0], -np.inf), best[1]), *rest)

    monkeypatch.setattr(search, "merge_nearest", forgetful)
    with pytest.raises(AssertionError):
        check_finds_the_nearest(make_index(), chunk=8)


def test_a_search_that_finds_the_padding_of_the_last_chunk_is_found(monkeypatch):
    right = search.merge_nearest
    with_padding = lambda best, queries, part, start, size: right(best, queries, part, start, 99)
    monkeypatch.setattr(search, "merge_nearest", with_padding)
    with pytest.raises(AssertionError):
        check_finds_the_nearest(make_index(), chunk=8)


def test_lengths_do_not_matter_and_zeros_are_near_to_nothing():
    index = Index(np.array([[1e30, 0], [0, 1e-30], [0, 0]]), ["x", "y", "zero"])
    hits = index.search(np.array([[0, 1e-20], [3, 4]]), 3)
    np.testing.assert_array_equal(hits.places, [[1, 0, 2], [1, 0, 2]])
    np.testing.assert_allclose(hits.cosines, [[1, 0, 0], [0.8, 0.6, 0]], rtol=1e-6)


def test_an_empty_index_finds_nothing():
    assert Index(np.zeros((0, 4)), []).search(np.ones((2, 4)), 3).places.shape == (2, 0)


def test_a_saved_index_comes_back(tmp_path):
    index = Index(np.asfortranarray(make_vectors(0, 3, 4)), ["naïve", "", 'a\n"b"'])
    index.save(tmp_path / "corpus.npz")
    loaded = Index.load(tmp_path / "corpus.npz")
    assert loaded.ids == index.ids and [p.name for p in tmp_path.iterdir()] == ["corpus.npz"]
    np.testing.assert_allclose(loaded.vectors, index.vectors, rtol=1e-6)


def as_npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


IDS = np.frombuffer(json.dumps(["a", "b"]).encode(), np.uint8)
VECTORS = as_npy(np.eye(2, dtype=np.float32))
WRONG = {
    "pickled objects": dict(vectors=as_npy(np.array([{}, {}], object))),
    "another type": dict(vectors=as_npy(np.eye(2))),
    "more rows than bytes": dict(vectors=VECTORS.replace(b"(2, 2), } ", b"(9, 2), } ")),
    "fewer rows than bytes": dict(vectors=VECTORS.replace(b"(2, 2), } ", b"(1, 2), } ")),
    "a negative size": dict(vectors=VECTORS.replace(b"(2, 2), }  ", b"(-2, -2), }")),
    "Fortran's order": dict(vectors=as_npy(np.asfortranarray(make_vectors(0, 2, 3)))),
    "no array": dict(vectors=b"hello"),
    "cut short": dict(vectors=VECTORS[:-4]),
    "too few ids": dict(ids=as_npy(IDS[:0])),
    "ids that are no list": dict(ids=as_npy(np.frombuffer(b"{}", np.uint8))),
    "ids that are no strings": dict(ids=as_npy(np.frombuffer(b"[1, 2]", np.uint8))),
    "numbers that are not finite": dict(vectors=as_npy(np.full((2, 2), np.nan, np.float32))),
    "another name": dict(vector=VECTORS),
}


def write_zip(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(f"{name}.npy", content)


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_save_did_not_write_is_refused(case, tmp_path):
    files = dict(vectors=VECTORS, ids=as_npy(IDS))
    write_zip(tmp_path / "right.npz", files)
    assert Index.load(tmp_path / "right.npz").ids == ["a", "b"]
    wrong = WRONG[case]
    if "vector" in wrong:
        del files["vectors"]
    write_zip(tmp_path / "wrong.npz", files | wrong)
    with pytest.raises(ValueError, match="wrong.npz is no index that"):
        Index.load(tmp_path / "wrong.npz")


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path):
    write_zip(
        tmp_path / "bomb.npz", dict(vectors=bytes(10**6), ids=as_npy(IDS)), zipfile.ZIP_DEFLATED
    )
    with pytest.raises(ValueError, match="vectors.npy is compressed"):
        Index.load(tmp_path / "bomb.npz")


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match="is no index"):
        Index.load(tmp_path / "text.npz")


def test_wrong_arguments_are_listed_together():
    with pytest.raises(ValueError, match=r"2 vectors and 1 ids(.|\n)*such as 3"):
        Index(np.eye(2), [3])
    with pytest.raises(ValueError, match=r"queries \(2, 3\)(.|\n)*\(…, 2\)(.|\n)*k=0"):
        Index(np.eye(2), ["a", "b"]).search(np.ones((2, 3)), 0)
