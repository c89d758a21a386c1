"""One number an array, whatever holds it; another one after any change; and copies that differ are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.exits import Corrupted
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel import offload
from jaxlm.training import checksums as module
from jaxlm.training.checksums import checksum, checksums

DTYPES = [np.float32, jnp.bfloat16, np.float16, np.int32, np.uint32, np.bool_, np.int8, np.uint8]
MESH = dict(data=2, fsdp=2, tensor=2)
SPECS = [P(), P("fsdp"), P(None, "tensor"), P(("fsdp", "data")), P("tensor", ("data", "fsdp"))]


def random(dtype, shape, seed=0):
    bits = np.random.default_rng(seed).bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    if dtype == np.bool_:
        return np.frombuffer(bits, np.uint8).reshape(shape) > 127
    return np.frombuffer(bits, dtype).reshape(shape)


def by_hand(array) -> str:
    """MurmurHash3's 32-bit finalizer and lowbias32, element by element, in Python's integers."""
    mask, totals = 2**32 - 1, [0, 0]
    words = np.asarray(array).reshape(-1)
    words = words.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[words.itemsize]).tolist()
    for index, bits in enumerate(words):
        x = bits ^ (index * 0x9E3779B1 & mask)
        x = (x ^ x >> 16) * 0x85EBCA6B & mask
        x = (x ^ x >> 13) * 0xC2B2AE35 & mask
        totals[0] += x ^ x >> 16
        x = bits ^ (index * 0x85EBCA77 & mask)
        x = (x ^ x >> 16) * 0x7FEB352D & mask
        x = (x ^ x >> 15) * 0x846CA68B & mask
        totals[1] += x ^ x >> 16
    return "".join(f"{total & mask:08x}" for total in totals)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (2, 3, 4)], ids=str)
def test_device_numpy_and_hand_give_one_number(dtype, shape):
    array = random(dtype, shape)
    assert checksums({"x": jnp.asarray(array)}) == {"x": by_hand(array)}
    assert checksum(array) == by_hand(array)


def test_numpy_counts_on_over_its_chunks(monkeypatch):
    array = random(np.float32, (7, 9))
    monkeypatch.setattr(module, "CHUNK", 10)
    assert checksum(array) == checksum(array.copy(order="F")) == by_hand(array)


def check_one_number_on_every_mesh(sums):
    mesh = meshes.make_mesh(**MESH)
    for dtype in (np.float32, jnp.bfloat16, np.bool_):
        array = random(dtype, (8, 16, 3))
        shardings = [NamedSharding(mesh, spec) for spec in SPECS]
        placed = {str(s.spec): jax.device_put(array, s) for s in shardings}
        assert set(sums(placed).values()) == {checksum(array)}


def without_offsets(tree):
    """As if the first element of each shard had the index 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "axis_index", lambda names: jnp.int32(0))
        module._summing.cache_clear()
        try:
            return checksums(tree)
        finally:
            module._summing.cache_clear()


def test_an_array_has_one_number_on_every_mesh():
    check_one_number_on_every_mesh(checksums)
    with pytest.raises(AssertionError):
        check_one_number_on_every_mesh(without_offsets)


def check_every_change_is_seen(digest):
    """A flipped bit anywhere, and any two elements, rows or columns exchanged."""
    array = random(np.float32, (4, 6))
    changed = {digest(array)}
    for bit in range(array.nbytes * 8):
        other = bytearray(array.tobytes())
        other[bit // 8] ^= 1 << bit % 8
        changed.add(digest(np.frombuffer(other, np.float32).reshape(4, 6)))
    assert len(changed) == 1 + array.nbytes * 8
    moved = [np.roll(array, n, axis) for n, axis in ((1, 0), (1, 1), (3, 1), (7, None))]
    assert len({digest(x) for x in moved} - changed) == len(moved)
    assert digest(np.zeros(3, np.float32)) != digest(np.zeros(4, np.float32))


def total(array):
    """A checksum that many systems use: the sum of the words."""
    return int(array.view(np.uint32).sum(dtype=np.uint64))


def xor(array):
    return int(np.bitwise_xor.reduce(array.view(np.uint32), axis=None))


def test_every_change_of_an_element_is_seen():
    check_every_change_is_seen(checksum)
    for wrong in (total, xor):
        with pytest.raises(AssertionError):
            check_every_change_is_seen(wrong)


def test_copies_that_differ_are_corruption_and_the_devices_are_named():
    mesh = meshes.make_mesh(**MESH)
    sharding = NamedSharding(mesh, P("fsdp"))
    array = random(np.float32, (4, 4))
    parts = sharding.addressable_devices_indices_map(array.shape)
    copies = {device.id: (device, array[index].copy()) for device, index in parts.items()}

    def place():
        shards = [jax.device_put(copy, device) for device, copy in copies.values()]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)

    assert checksums({"w": place()}) == {"w": checksum(array)}
    copies[5][1].view(np.uint32)[1, 2] ^= 1 << 9
    with pytest.raises(Corrupted, match=r"layers/w: .*cpu:5 has") as error:
        checksums({"layers": {"w": place(), "b": jnp.zeros(3)}})
    assert "layers/b" not in str(error.value) and "cpu:2" not in str(error.value)


def test_state_in_the_hosts_memory_has_the_same_number():
    mesh = meshes.make_mesh(**MESH)
    array = random(np.float32, (8, 4))
    device = NamedSharding(mesh, P("fsdp"))
    trees = {
        "host": jax.device_put(array, offload.on_host(device)),
        "device": jax.device_put(array, device),
    }
    assert trees["host"].sharding.memory_kind == offload.HOST
    assert set(checksums(trees).values()) == {checksum(array)}


def test_wide_elements_are_refused():
    with pytest.raises(TypeError, match="float64"):
        checksum(np.zeros(2))
