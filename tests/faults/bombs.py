"""Files of a few bytes that ask for more memory than there is, to be read as they are."""

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path

from tests.faults.data_files import Kind, read_documents, read_records, write
from tests.faults.model_files import (
    make_model_folder,
    read_index,
    read_model,
    read_safetensors,
    read_tokenizer,
    trained,
)


def make_gzip_bomb(folder: Path) -> Path:
    """2 GiB of zeros in 2 MB, as one line."""
    return write("d.jsonl.gz", gzip.compress(bytes(1 << 26)) * 32)(folder)


def make_zstd_bomb(folder: Path) -> Path:
    """2 GiB of zeros in 64 KiB."""
    import zstandard

    bomb = zstandard.ZstdCompressor().compressobj()
    pieces = [bomb.compress(bytes(1 << 20)) for _ in range(2048)]
    return write("d.txt.zst", b"".join([*pieces, bomb.flush()]))(folder)


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
    return write("tokenizer.json", json.dumps(about))(folder)


def make_size_bomb(folder: Path) -> Path:
    path = make_model_folder(folder, "mixtral")
    sizes = dict(num_hidden_layers=4096, num_local_experts=1 << 27, vocab_size=1 << 27)
    return write("config.json", json.dumps(json.loads(path.read_bytes()) | sizes))(folder)


def make_header_bomb(folder: Path) -> Path:
    header = b"[" * (64 << 20)
    return write("model.safetensors", len(header).to_bytes(8, "little") + header)(folder)


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
