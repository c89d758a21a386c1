"""Safetensors: what is written is what the reference reads, and nothing that a file claims is believed unchecked."""

import json
import random
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxlm.interop import safetensors_io as io

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.linspace(-1, 1, 7).astype(ml_dtypes.bfloat16),
    "c": np.array(2.5, np.float16),
    "empty": np.zeros((0, 3), np.float32),
}


def planned(tensors=TENSORS):
    return [io.Planned(n, a.shape, a.dtype, lambda a=a: a) for n, a in tensors.items()]


def check_same(found, tensors=TENSORS):
    assert set(found) == set(tensors)
    for name, array in tensors.items():
        read = found[name].read()
        assert (read.shape, read.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(read, array)


def test_what_is_written_is_read_back(tmp_path):
    io.write_folder(tmp_path, planned())
    assert [p.name for p in tmp_path.iterdir()] == [io.SINGLE]
    check_same(io.read_folder(tmp_path))
    rows = io.read_folder(tmp_path)["a.weight"].read_rows(1, 3)
    np.testing.assert_array_equal(rows, TENSORS["a.weight"][1:3])


def test_the_reference_reads_what_we_write_and_we_what_it_writes(tmp_path):
    reference = pytest.importorskip("safetensors.numpy")
    io.write_folder(tmp_path, planned())
    theirs = reference.load_file(tmp_path / io.SINGLE)
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(theirs[name].astype(np.float32), array.astype(np.float32))
    reference.save_file(TENSORS, tmp_path / io.SINGLE, metadata={"format": "np"})
    check_same(io.read_folder(tmp_path))


def test_a_transposed_view_is_written_as_it_looks(tmp_path):
    view = np.arange(6, dtype=np.float32).reshape(2, 3).T
    io.write_folder(tmp_path, planned({"w": view}))
    check_same(io.read_folder(tmp_path), {"w": view})


def test_shards_are_named_and_indexed_as_huggingface_hub_does(tmp_path):
    io.write_folder(tmp_path, planned(), max_shard_bytes=50)
    index = json.loads((tmp_path / io.INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(a.nbytes for a in TENSORS.values())}
    assert index["weight_map"]["a.weight"] == "model-00001-of-00002.safetensors"
    check_same(io.read_folder(tmp_path))


# --- files that lie ---------------------------------------------------------------------------------------------------


def file_of(header, data=b"", length=None):
    blob = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(blob) if length is None else length).to_bytes(8, "little") + blob + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


EIGHT = b"\0" * 8
LIES = {
    "empty": b"",
    "half a length": b"\1\0\0",
    "a length of exabytes": file_of({}, length=1 << 63),
    "a length past the end": file_of({"w": entry()}, EIGHT, length=500),
    "no JSON": file_of(b"\xff\xfe\x00"),
    "a list": file_of([1]),
    "deep JSON": file_of(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a huge number": file_of(b'{"w":' + b"9" * 10_000 + b"}"),
    "a name twice": file_of(
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        EIGHT,
    ),
    "an entry that is none": file_of({"w": 3}, EIGHT),
    "a field more": file_of({"w": entry(x=1)}, EIGHT),
    "an unknown dtype": file_of({"w": entry("C128")}, EIGHT),
    "a dtype that is a list": file_of({"w": entry(["F32"])}, EIGHT),
    "a negative size": file_of({"w": entry(shape=[-2])}, EIGHT),
    "a size that is a bool": file_of({"w": entry(shape=[True, 2])}, EIGHT),
    "a size that is a float": file_of({"w": entry(shape=[2.0])}, EIGHT),
    "an endless shape": file_of({"w": entry(shape=[1] * 10_000)}, EIGHT),
    "a shape of exabytes": file_of({"w": entry(shape=[1 << 40, 1 << 40])}, EIGHT),
    "offsets past the end": file_of({"w": entry(offsets=(0, 16), shape=[4])}, EIGHT),
    "offsets backwards": file_of({"w": entry(offsets=(8, 0))}, EIGHT),
    "negative offsets": file_of({"w": entry(offsets=(-8, 0))}, EIGHT),
    "too few bytes": file_of({"w": entry(shape=[3])}, EIGHT),
    "overlap": file_of({"w": entry(), "v": entry()}, EIGHT),
    "a gap": file_of({"w": entry(), "v": entry(offsets=(16, 24))}, EIGHT * 3),
    "bytes at the end": file_of({"w": entry()}, EIGHT * 2),
}


def check_refuses(read, path):
    for name, blob in LIES.items():
        path.write_bytes(blob)
        started = time.perf_counter()
        try:
            read(path)
        except io.BadFile:
            assert time.perf_counter() - started < 1, name
            continue
        raise AssertionError(f"taken: {name}")


def test_every_lie_is_refused_at_once(tmp_path):
    check_refuses(io.read_header, tmp_path / io.SINGLE)


def test_a_reader_without_checks_would_be_caught(tmp_path):
    def trusting(path):
        blob = path.read_bytes()
        length = int.from_bytes(blob[:8], "little")
        try:
            return json.loads(blob[8 : 8 + length])
        except (ValueError, RecursionError) as error:
            raise io.BadFile(str(error)) from error

    with pytest.raises(AssertionError, match="taken"):
        check_refuses(trusting, tmp_path / io.SINGLE)


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    header = {"w": entry("C128"), "v": entry(shape=[-1]), "u": entry(offsets=(0, 800))}
    (tmp_path / io.SINGLE).write_bytes(file_of(header, EIGHT))
    with pytest.raises(io.BadFile) as error:
        io.read_folder(tmp_path)
    assert all(f"'{name}'" in str(error.value) for name in header)


def mutate(blob: bytes, rng: random.Random) -> bytes:
    """One file of 300: flipped bits, cut ends, lengths and numbers that lie, tensors that overlap."""
    length = int.from_bytes(blob[:8], "little")
    header, data = blob[8 : 8 + length], blob[8 + length :]
    kind = rng.randrange(8)
    if kind == 0:  # bits anywhere
        changed = bytearray(blob)
        for _ in range(rng.choice((1, 3, 30))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 1:  # bits of the header
        changed = bytearray(header)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return blob[:8] + bytes(changed) + data
    if kind == 2:
        return blob[: rng.randrange(len(blob))]
    if kind == 3:
        return (
            rng.choice((0, 1, length - 1, length + 1, 1 << 31, (1 << 64) - 1)).to_bytes(8, "little")
            + blob[8:]
        )
    if kind == 4:  # another number in the header
        digits = [i for i, c in enumerate(header) if chr(c).isdigit()]
        at = rng.choice(digits)
        number = rng.choice((b"0", b"7", b"-1", b"1e9", b"99999999999999999999", b"null", b"true"))
        return file_of(header[:at] + number + header[at + 1 :], data)
    about = json.loads(header)
    one, other = rng.sample([n for n in about if n != "__metadata__"], 2)
    if kind == 5:
        about[one]["data_offsets"] = about[other]["data_offsets"]
    elif kind == 6:
        about[one]["shape"] = [
            rng.choice((0, 1, 2, 1 << 20, 1 << 62)) for _ in range(rng.randrange(40))
        ]
    else:
        depth = rng.choice((10, 1000, 200_000))
        text = json.dumps(about)[:-1] + ',"x":' + "[" * depth + "]" * depth + "}"
        return file_of(text.encode(), data)
    return file_of(about, data)


def check_mutations(folder: Path, count: int) -> int:
    """A typed error or a load of the claimed shapes, within a second each; returns how many loaded."""
    io.write_folder(folder, planned())
    blob, loaded = (folder / io.SINGLE).read_bytes(), 0
    for number in range(count):
        (folder / io.SINGLE).write_bytes(mutate(blob, random.Random(number)))
        started = time.perf_counter()
        try:
            tensors = io.read_folder(folder)
            for tensor in tensors.values():
                assert tensor.read().shape == tensor.shape
            loaded += 1
        except io.BadFile:
            pass
        assert time.perf_counter() - started < 1, number
    return loaded


def test_mutated_files_load_or_give_a_typed_error(tmp_path):
    assert 0 < check_mutations(tmp_path, 60) < 60


@pytest.mark.slow
def test_three_hundred_mutated_files_load_or_give_a_typed_error(tmp_path):
    assert 0 < check_mutations(tmp_path, 300) < 150


# --- names that leave the folder --------------------------------------------------------------------------------------


def sharded(folder):
    folder.mkdir()
    io.write_folder(folder, planned(), max_shard_bytes=50)
    return json.loads((folder / io.INDEX).read_text())


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\0b", ".hidden", "~x"],
)
def test_an_index_cannot_name_files_elsewhere(name, tmp_path):
    io.write_file(tmp_path / "secret.safetensors", planned())
    index = sharded(tmp_path / "m")
    index["weight_map"]["a.weight"] = name
    (tmp_path / "m" / io.INDEX).write_text(json.dumps(index))
    with pytest.raises(io.BadFile, match="not the plain name"):
        io.read_folder(tmp_path / "m")


def test_a_link_that_leaves_the_folder_is_refused(tmp_path):
    io.write_file(tmp_path / "secret.safetensors", planned())
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / io.SINGLE).symlink_to("../secret.safetensors")
    with pytest.raises(io.BadFile, match="leaves"):
        io.read_folder(folder)


def test_the_hubs_cache_is_made_of_links_and_is_read(tmp_path):
    snapshot, blobs = (
        tmp_path / "models--x--y" / "snapshots" / "abc",
        tmp_path / "models--x--y" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    io.write_file(blobs / "1234", planned())
    (snapshot / io.SINGLE).symlink_to("../../blobs/1234")
    check_same(io.read_folder(snapshot))


def test_an_index_that_does_not_tell_what_its_files_hold_is_refused(tmp_path):
    index = sharded(tmp_path / "m")
    index["weight_map"]["ghost"] = index["weight_map"].pop("b")
    (tmp_path / "m" / io.INDEX).write_text(json.dumps(index))
    with pytest.raises(io.BadFile, match="(?s)'b'.*'ghost'|'ghost'.*'b'"):
        io.read_folder(tmp_path / "m")


def test_an_integer_is_passed_over_but_is_no_parameter(tmp_path):
    header = {"ids": entry("I64", [1], (0, 8))}
    (tmp_path / io.SINGLE).write_bytes(file_of(header, EIGHT))
    tensor = io.read_folder(tmp_path)["ids"]
    assert tensor.shape == (1,)
    with pytest.raises(io.BadFile, match="I64"):
        tensor.read()
