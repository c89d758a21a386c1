"""Changes that a disk, a network or an attacker makes to a file; each is decided by a random generator alone."""

import random
import re
from collections.abc import Callable

SIZES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 40) + 1, (1 << 63) - 1)
NUMBERS = (b"0", b"-1", b"1e9", b"4294967295", b"99999999999999999999", b"1" * 5000, b"NaN")
WORDS = (b"null", b"true", b"[]", b"{}", b'""', b'"a"', b"7", b"[[1]]")


def flip_bits(blob: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 3, 30))):
        blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)


def cut(blob: bytearray, rng: random.Random) -> None:
    del blob[rng.randrange(len(blob)) :]


def change_length(blob: bytearray, rng: random.Random) -> None:
    """A number where a length may be: little endian, or as protobuf and Thrift write it."""
    at, size = rng.randrange(len(blob)), rng.choice(SIZES)
    fields = [size.to_bytes(8, "little"), (size & 0xFFFFFFFF).to_bytes(4, "little"), varint(size)]
    field = rng.choice(fields)
    blob[at : at + len(field)] = field


def varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def repeat(blob: bytearray, rng: random.Random) -> None:
    start, at = rng.randrange(len(blob)), rng.randrange(len(blob))
    blob[at:at] = blob[start : start + rng.choice((1, 20, 500))] * rng.choice((1, 2, 100))


def drop(blob: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(blob))
    del blob[start : start + rng.choice((1, 4, 50))]


def insert_noise(blob: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(blob))
    blob[at:at] = rng.choice(
        (rng.randbytes(40), b"\0" * 40, b"\xed\xa0\x80", b"\xff\xfe", b'"', b"\n")
    )


def nest(blob: bytearray, rng: random.Random) -> None:
    depth = rng.choice((10, 1_000, 100_000))
    _replace_one(blob, rng, rb"[\[{:,]", lambda found: found + rng.choice((b"[", b'{"a":')) * depth)


def change_number(blob: bytearray, rng: random.Random) -> None:
    _replace_one(blob, rng, rb"-?\d+(\.\d+)?", lambda found: rng.choice(NUMBERS))


def change_value(blob: bytearray, rng: random.Random) -> None:
    _replace_one(
        blob, rng, rb'(?<=: )("[^"\n]*"|\d+|\[|\{|true|null)', lambda found: rng.choice(WORDS)
    )


def _replace_one(blob: bytearray, rng: random.Random, pattern: bytes, new: Callable) -> None:
    if found := list(re.finditer(pattern, blob)):
        match = rng.choice(found)
        blob[match.start() : match.end()] = new(match[0])


MUTATIONS = (
    flip_bits,
    cut,
    change_length,
    repeat,
    drop,
    insert_noise,
    nest,
    change_number,
    change_value,
)


def mutate(blob: bytes, rng: random.Random) -> bytes:
    changed = bytearray(blob)
    for change in rng.choices(MUTATIONS, k=rng.choice((1, 1, 1, 2))):
        if changed:
            change(changed, rng)
    return bytes(changed)
