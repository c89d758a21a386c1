"""Files that somebody changed, and the readers that meet them; run as a program, the child of test_untrusted.py.

    python tests/faults/untrusted.py FOLDER SECONDS KIND:SEED …

reads one mutated file for each KIND:SEED (-1: as it is) and prints how it ended, a line each, at once:

    refused    a ValueError, FileNotFoundError or error of jaxlm.exits, with a message
    counted    it was read, and its bad rows were counted
    loaded     it was read, and what was read could be used
    …          anything else is a fault: the error's name, MemoryError among them for a reader that wants over 2 GiB

A reader that crashes, or takes more than SECONDS of processor time, ends the program.
"""

import functools
import gzip
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MEMORY = 2 << 30
TEXTS = [
    "The cat sat. It's 3.14 o'clock! Why?\n\nA new line.\n" * 8,
    "你好，世界。今天天气很好！\n",
    "def f(x):\n\treturn x  ==   3\r\n",
]
PROBE = "A cat, 3.14!\n\t<extra_id_0> é世"
RECORDS = [{"text": f"line {i} of several", "label": "ab"[i % 2]} for i in range(12)]


class Kind(NamedTuple):
    """make: writes a sound file into a folder (and what it needs beside it), and returns it. read: reads and uses it, and
    returns how many bad rows it counted. pack, unpack: of a compressed file, whose content is mutated half of the time."""

    make: Callable[[Path], Path]
    read: Callable[[Path], int]
    pack: Callable[[bytes], bytes] | None = None
    unpack: Callable[[bytes], bytes] | None = None


# ---------------------------------------------------------------- mutations

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


# ---------------------------------------------------------------- kinds of files


def _write(name: str, content: bytes | str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


JSONL = "".join(json.dumps(record) + "\n" for record in RECORDS)
CSV = "text,label\n" + "".join(f'"{r["text"]}, and",{r["label"]}\n' for r in RECORDS)
CONLL = "".join(f"word{i}\tB-PER\n" + "\n" * (i % 4 == 3) for i in range(16))
CONLLU = "".join(
    f"{i % 4 + 1}\tw{i}\tw\tNOUN\tNN\t_\t{i % 4}\tdep\t_\t_\n" + "\n" * (i % 4 == 3)
    for i in range(16)
)
SEMEVAL = "".join(
    f'{i}\t"The <e1>cat</e1> is on <e2>mat {i}</e2>."\nOther\nComment: none\n\n' for i in range(6)
)
QUESTION = {"id": "1", "question": "Where?", "answers": [{"text": "here", "answer_start": 3}]}
SQUAD = json.dumps(
    {"data": [{"title": "t", "paragraphs": [{"context": "is here", "qas": [QUESTION] * 3}] * 3}]}
)


def read_records(path: Path) -> int:
    from jaxlm.data.records import read_records

    records, problems = read_records(
        path, {".squad": "squad", ".semeval": "semeval"}.get(path.suffix, "")
    )
    assert all(isinstance(record.fields, dict) for record in records)
    return len(problems)


def read_documents(path: Path) -> int:
    from jaxlm.data.sources import Document, read_documents

    return sum(not isinstance(item, Document) for item in read_documents([str(path)]))


def make_parquet(folder: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    path = folder / "rows.parquet"
    columns = {key: [r[key] for r in RECORDS] for key in ("text", "label")}
    table = pyarrow.table(columns | {"tags": [["x", "y"]] * len(RECORDS)})
    parquet.write_table(table, path, row_group_size=5)
    return path


def read_parquet(path: Path) -> int:
    return read_documents(path) + read_records(path)


def zstd() -> tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]:
    import zstandard

    return (
        zstandard.ZstdCompressor().compress,
        lambda blob: zstandard.ZstdDecompressor().decompress(blob),
    )


def compressed(name: str, content: str) -> Kind:
    pack, unpack = (gzip.compress, gzip.decompress) if name.endswith(".gz") else zstd()
    return Kind(_write(name, pack(content.encode())), read_documents, pack, unpack)


def make_safetensors(folder: Path, **options) -> Path:
    import numpy as np

    from jaxlm.interop import safetensors_io

    arrays = {"a.weight": np.ones((3, 4), np.float32), "b": np.arange(5, dtype=np.float16)}
    planned = [
        safetensors_io.Planned(name, x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()
    ]
    safetensors_io.write_folder(folder, planned, **options)
    return folder / (safetensors_io.INDEX if options else safetensors_io.SINGLE)


def read_safetensors(path: Path) -> int:
    from jaxlm.interop.safetensors_io import read_folder

    for tensor in read_folder(path.parent).values():
        assert tensor.read().shape == tensor.shape
    return 0


def make_model_folder(folder: Path, case: str = "gpt2") -> Path:
    from tests.interop.tiny_hf import write_recorded

    shutil.rmtree(folder)
    write_recorded(folder, case)
    return folder / "config.json"


def read_model(path: Path) -> int:
    from jaxlm.interop.convert import read_source

    read_source(str(path.parent))
    return 0


def make_msgpack(folder: Path) -> Path:
    import flax.serialization
    import numpy as np

    tree = {"a": {"kernel": np.ones((3, 4), np.float32), "bias": np.ones(4, np.float16)}}
    return _write("flax_model.msgpack", flax.serialization.msgpack_serialize(tree))(folder)


def read_msgpack(path: Path) -> int:
    from jaxlm.interop.source import read_msgpack

    for tensor in read_msgpack(path).values():
        assert tensor.read().shape == tensor.shape
    return 0


@functools.cache
def trained(kind: str):
    from jaxlm.tokenizers import train_tokenizer

    return train_tokenizer(kind, TEXTS, 420, num_sentinels=10)


def make_sentencepiece(kind: str) -> Callable[[Path], Path]:
    return lambda folder: _write("tokenizer.model", trained(kind).blob)(folder)


def make_tokenizer_json(folder: Path) -> Path:
    return _write("tokenizer.json", trained("byte_bpe").blob)(folder)


def make_wordpiece_json(folder: Path) -> Path:
    from tests.tasks.tokens import wordpiece

    return _write("tokenizer.json", wordpiece().blob)(folder)


def make_saved(folder: Path) -> Path:
    trained("unigram").save(folder)
    return folder / "jaxlm_tokenizer.json"


def make_settings(folder: Path) -> Path:
    make_tokenizer_json(folder)
    settings = {f"{role}_token": f"<{role}>" for role in ("bos", "eos", "pad")}
    return _write("tokenizer_config.json", json.dumps(settings | {"extra_ids": 0}))(folder)


def make_slow_files(folder: Path) -> Path:
    blob = json.loads(trained("byte_bpe").blob)["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in blob["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    return _write("vocab.json", json.dumps(blob["vocab"] | {"<|endoftext|>": 419}))(folder)


def read_tokenizer(path: Path) -> int:
    """Loaded as a run's own or a stranger's, and used."""
    from jaxlm.interop import tokenizer_files
    from jaxlm.tokenizers import is_saved, load_tokenizer

    folder = path.parent
    load = load_tokenizer if is_saved(folder) else tokenizer_files.read_tokenizer
    tokenizer = load(folder)
    for text in (PROBE, "", *TEXTS):
        ids, spans = tokenizer.encode_with_offsets(text)
        assert len(ids) == len(spans)
        tokenizer.decode(ids)
    tokenizer.decode(range(tokenizer.vocab_size))
    return 0


def make_index(folder: Path) -> Path:
    import numpy as np

    from jaxlm.inference.search import Index

    Index(np.eye(4, 3), list("abcd")).save(folder / "index.npz")
    return folder / "index.npz"


def read_index(path: Path) -> int:
    import numpy as np

    from jaxlm.inference.search import Index

    Index.load(path).search(np.ones((1, 3), np.float32), 2)
    return 0


def read_prompts(path: Path) -> int:
    from jaxlm.inputs import read_prompts

    read_prompts(path)
    return 0


KINDS: dict[str, Callable[[], Kind]] = {
    "safetensors": lambda: Kind(make_safetensors, read_safetensors),
    "safetensors index": lambda: Kind(
        functools.partial(make_safetensors, max_shard_bytes=50), read_safetensors
    ),
    "config.json": lambda: Kind(make_model_folder, read_model),
    "config.json of experts": lambda: Kind(
        functools.partial(make_model_folder, case="mixtral"), read_model
    ),
    "msgpack": lambda: Kind(make_msgpack, read_msgpack),
    "SentencePiece unigram": lambda: Kind(make_sentencepiece("unigram"), read_tokenizer),
    "SentencePiece BPE": lambda: Kind(make_sentencepiece("bpe"), read_tokenizer),
    "tokenizer.json of BPE": lambda: Kind(make_tokenizer_json, read_tokenizer),
    "tokenizer.json of WordPiece": lambda: Kind(make_wordpiece_json, read_tokenizer),
    "vocab.txt": lambda: Kind(
        _write("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\ncat\n##s\n.\n"), read_tokenizer
    ),
    "vocab.json": lambda: Kind(make_slow_files, read_tokenizer),
    "tokenizer_config.json": lambda: Kind(make_settings, read_tokenizer),
    "saved tokenizer": lambda: Kind(make_saved, read_tokenizer),
    "jsonl documents": lambda: Kind(_write("d.jsonl", JSONL), read_documents),
    "jsonl.gz": lambda: compressed("d.jsonl.gz", JSONL),
    "jsonl.zst": lambda: compressed("d.jsonl.zst", JSONL),
    "txt.gz": lambda: compressed("d.txt.gz", "".join(TEXTS)),
    "txt.zst": lambda: compressed("d.txt.zst", "".join(TEXTS)),
    "parquet": lambda: Kind(make_parquet, read_parquet),
    "jsonl records": lambda: Kind(_write("r.jsonl", JSONL), read_records),
    "json records": lambda: Kind(_write("r.json", json.dumps(RECORDS)), read_records),
    "csv": lambda: Kind(_write("r.csv", CSV), read_records),
    "tsv": lambda: Kind(_write("r.tsv", CSV.replace(",", "\t")), read_records),
    "conll": lambda: Kind(_write("r.conll", CONLL), read_records),
    "conllu": lambda: Kind(_write("r.conllu", CONLLU), read_records),
    "squad": lambda: Kind(_write("r.squad", SQUAD), read_records),
    "semeval": lambda: Kind(_write("r.semeval", SEMEVAL), read_records),
    "index.npz": lambda: Kind(make_index, read_index),
    "prompts.jsonl": lambda: Kind(
        _write("p.jsonl", JSONL.replace('"label"', '"prompt"')), read_prompts
    ),
}

# Files of a few bytes that ask for more memory than there is: read as they are.


def make_gzip_bomb(folder: Path) -> Path:
    """2 GiB of zeros in 2 MB, as one line."""
    return _write("d.jsonl.gz", gzip.compress(bytes(1 << 26)) * 32)(folder)


def make_zstd_bomb(folder: Path) -> Path:
    """2 GiB of zeros in 64 KiB."""
    import zstandard

    bomb = zstandard.ZstdCompressor().compressobj()
    pieces = [bomb.compress(bytes(1 << 20)) for _ in range(2048)]
    return _write("d.txt.zst", b"".join([*pieces, bomb.flush()]))(folder)


def make_parquet_bomb(folder: Path) -> Path:
    """A million rows of the same MB of text, of which the file has one."""
    import numpy as np
    import pyarrow
    from pyarrow import parquet

    numbers = pyarrow.array(np.zeros(1_000_000, np.int32))
    texts = pyarrow.DictionaryArray.from_arrays(numbers, pyarrow.array(["a" * (1 << 20)]))
    table = pyarrow.table({"text": texts})
    parquet.write_table(table, folder / "d.parquet", store_schema=False)
    return folder / "d.parquet"


def read_some_documents(path: Path) -> int:
    from jaxlm.data.sources import read_documents

    return sum(len(item.text) > 0 for item in itertools.islice(read_documents([str(path)]), 500))


def make_id_bomb(folder: Path) -> Path:
    about = json.loads(trained("byte_bpe").blob)
    about["added_tokens"][-1]["id"] = 0xFFFFFFFE
    about["model"]["vocab"][about["added_tokens"][-1]["content"]] = 0xFFFFFFFE
    return _write("tokenizer.json", json.dumps(about))(folder)


def make_size_bomb(folder: Path) -> Path:
    path = make_model_folder(folder, "mixtral")
    sizes = dict(num_hidden_layers=4096, num_local_experts=1 << 27, vocab_size=1 << 27)
    return _write("config.json", json.dumps(json.loads(path.read_bytes()) | sizes))(folder)


def make_header_bomb(folder: Path) -> Path:
    header = b"[" * (64 << 20)
    return _write("model.safetensors", len(header).to_bytes(8, "little") + header)(folder)


def make_index_bomb(folder: Path) -> Path:
    import zipfile

    with zipfile.ZipFile(folder / "index.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        header = (
            b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (%d, 3), }"
            % (1 << 29)
        )
        archive.writestr("vectors.npy", header.ljust(127) + b"\n" + bytes(1 << 22))
        archive.writestr("ids.npy", b"")
    return folder / "index.npz"


BOMBS: dict[str, Callable[[], Kind]] = {
    "gzip bomb": lambda: Kind(make_gzip_bomb, read_documents),
    "zstd bomb": lambda: Kind(make_zstd_bomb, read_documents),
    "Parquet bomb, documents": lambda: Kind(make_parquet_bomb, read_some_documents),
    "Parquet bomb, records": lambda: Kind(make_parquet_bomb, read_records),
    "bomb of an id": lambda: Kind(make_id_bomb, read_tokenizer),
    "bomb of sizes": lambda: Kind(make_size_bomb, read_model),
    "bomb of a header": lambda: Kind(make_header_bomb, read_safetensors),
    "bomb of an index": lambda: Kind(make_index_bomb, read_index),
}

# Readers that believe what they read, for the test of the test.


def read_believing_lengths(path: Path) -> int:
    blob = path.read_bytes()
    length = int.from_bytes(blob[:8], "little")
    header = bytearray(length)
    header[:] = blob[8 : 8 + length]
    json.loads(header)
    return 0


def read_until_found(path: Path) -> int:
    stream = io.BytesIO(path.read_bytes())
    while b"}" not in stream.read(1 << 16):
        pass
    return 0


def read_by_address(path: Path) -> int:
    import ctypes

    if len(path.read_bytes()) != len(JSONL):
        ctypes.string_at(8)
    return 0


WRONG: dict[str, Callable[[], Kind]] = {
    "believes lengths": lambda: Kind(make_safetensors, read_believing_lengths),
    "reads until it finds": lambda: Kind(_write("a.txt", "}"), read_until_found),
    "follows addresses": lambda: Kind(_write("d.jsonl", JSONL), read_by_address),
}


# ---------------------------------------------------------------- the child


def read_one(kind: Kind, folder: Path, seed: int, seconds: float) -> str:
    from jaxlm.exits import RunError

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path, rng = kind.make(folder), random.Random(seed)
    blob = path.read_bytes()
    if kind.unpack and rng.random() < 0.5:
        path.write_bytes(kind.pack(mutate(kind.unpack(blob), rng)))
    elif seed >= 0:
        path.write_bytes(mutate(blob, rng))
    limit_memory()
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # nobody handles it, so it ends the process
    try:
        return "counted" if kind.read(path) else "loaded"
    except (ValueError, FileNotFoundError, RunError) as error:
        if isinstance(error.__cause__, MemoryError):
            return f"MemoryError, said as {error}"[:300]
        return "refused" if str(error).strip() else f"{type(error).__name__} without a message"
    except BaseException as error:  # PyO3's panics are no Exceptions
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def limit_memory() -> None:
    """To so much more than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def main(folder: Path, seconds: float, plan: list[str]) -> None:
    import jax

    logging_off()
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.random.key(0).dtype.itemsize))
    kinds = {name: make() for name, make in (KINDS | BOMBS | WRONG).items()}
    for name in KINDS.keys() & {item.rpartition(":")[0] for item in plan}:
        (folder / "sound").mkdir()
        bad = kinds[name].read(kinds[name].make(folder / "sound"))
        assert bad == 0, f"the sound {name} has {bad} bad rows"
        shutil.rmtree(folder / "sound")
    for item in plan:
        name, _, seed = item.rpartition(":")
        outcome = read_one(kinds[name], folder / "read", int(seed), seconds)
        print(json.dumps([item, outcome]), flush=True)


def logging_off() -> None:
    import logging

    logging.disable(logging.CRITICAL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
