"""What `problems` says of whole and of damaged stores, and that stores of every schema version still load."""

import json

import numpy as np
import pytest

from jaxlm.data.store_check import problems
from jaxlm.data.store_format import fingerprint, sha256_of
from jaxlm.data.store_writer import write_store
from jaxlm.data.token_store import TokenStore
from jaxlm.sealed import seal
from jaxlm.tokenizers import load_tokenizer, make_tokenizer
from tests.fixtures import make

TOKENIZER = make_tokenizer("bytes", num_sentinels=0)
DOCUMENTS = [TOKENIZER.encode(text) for text in make.TEXTS]


@pytest.fixture
def path(tmp_path):
    make.store_2(tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize("name", ["store_1", "store_2"])
def test_a_store_of_every_schema_version_loads(name, caplog):
    store, tokenizer = TokenStore(make.HERE / name), load_tokenizer(make.HERE / name / "tokenizer")
    spans = [store.document_span(i) for i in range(store.num_documents)]
    assert [tokenizer.decode(store.tokens(*span)) for span in spans] == make.TEXTS
    assert problems(make.HERE / name) == []
    assert ("is a token store of schema 1" in caplog.text) == (name == "store_1")


def test_schemas_share_their_fingerprint():
    stores = [TokenStore(make.HERE / name) for name in ("store_1", "store_2")]
    assert stores[0].fingerprint == stores[1].fingerprint


def test_everything_that_is_wrong_is_said(path):
    (path / "train-00000.tokens.npy").unlink()
    for name in ("train-00001.sentences.npy", "validation-00000.blocks.npy"):
        data = bytearray((path / name).read_bytes())
        data[-1] ^= 1
        (path / name).write_bytes(data)
    (path / "tokenizer" / "bytes.txt").write_bytes(b"bytes\r")
    found = "\n".join(problems(path))
    for line in (
        "train-00000.tokens.npy: missing",
        "train-00001.sentences.npy: its sha256 is not the manifest's",
        "validation-00000.blocks.npy: its sha256 is not the manifest's",
        "tokenizer/bytes.txt: its sha256 is not the manifest's",
    ):
        assert line in found
    assert len(problems(path)) == 5  # the tokenizer does not load, either


def rewrite(path, part, change):
    """Changes a shard and makes all digests fit, as somebody who means harm could."""
    array = np.load(path / f"train-00000.{part}.npy")
    change(array)
    np.save(path / f"train-00000.{part}.npy", array)
    make.as_schema_1(path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["sha256"][part] = sha256_of(
        path / f"train-00000.{part}.npy"
    )
    manifest["fingerprint"] = fingerprint(manifest["tokenizer_sha256"], manifest["splits"])
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("part", ["tokens", "documents", "sentences"])
def test_numbers_that_no_store_holds_are_said_though_every_digest_fits(part, path):
    rewrite(path, part, lambda array: None)
    assert problems(path) == []
    make_path = path.with_name("changed")
    make.store_2(make_path)
    rewrite(make_path, part, lambda array: array.__setitem__(1, 60_000))
    assert [line.split(":")[0] for line in problems(make_path)] == [f"train-00000.{part}.npy"]


def test_a_folder_that_is_no_store_is_a_problem_and_not_an_exception(tmp_path, path):
    assert "is no token store" in problems(tmp_path)[0]
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["other_files"] = {"../../etc/passwd": "0" * 64}
    (path / "manifest.json").write_text(json.dumps(seal(manifest)))
    assert "other_files" in problems(path)[0]


def test_a_large_array_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.data.store_check._AT_ONCE", 7)
    write_store(tmp_path / "s", {"train": DOCUMENTS * 5}, TOKENIZER)
    assert problems(tmp_path / "s") == []
    for part in ("tokens", "documents", "sentences"):
        write_store(tmp_path / part, {"train": DOCUMENTS * 5}, TOKENIZER)
        rewrite(tmp_path / part, part, lambda array: array.__setitem__(14, 60_000))
        assert len(problems(tmp_path / part)) == 1
