"""Sound files of text and of rows, and their readers."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TEXTS = [
    "The cat sat. It's 3.14 o'clock! Why?\n\nA new line.\n" * 8,
    "你好，世界。今天天气很好！\n",
    "def f(x):\n\treturn x  ==   3\r\n",
]
RECORDS = [{"text": f"line {i} of several", "label": "ab"[i % 2]} for i in range(12)]


class Kind(NamedTuple):
    """make: writes a sound file into a folder (and what it needs beside it), and returns it. read: reads and uses it, and
    returns how many bad rows it counted. pack, unpack: of a compressed file, whose content is mutated half of the time."""

    make: Callable[[Path], Path]
    read: Callable[[Path], int]
    pack: Callable[[bytes], bytes] | None = None
    unpack: Callable[[bytes], bytes] | None = None


def write(name: str, content: bytes | str) -> Callable[[Path], Path]:
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
    return Kind(write(name, pack(content.encode())), read_documents, pack, unpack)


DATA_KINDS: dict[str, Callable[[], Kind]] = {
    "jsonl documents": lambda: Kind(write("d.jsonl", JSONL), read_documents),
    "jsonl.gz": lambda: compressed("d.jsonl.gz", JSONL),
    "jsonl.zst": lambda: compressed("d.jsonl.zst", JSONL),
    "txt.gz": lambda: compressed("d.txt.gz", "".join(TEXTS)),
    "txt.zst": lambda: compressed("d.txt.zst", "".join(TEXTS)),
    "parquet": lambda: Kind(make_parquet, read_parquet),
    "jsonl records": lambda: Kind(write("r.jsonl", JSONL), read_records),
    "json records": lambda: Kind(write("r.json", json.dumps(RECORDS)), read_records),
    "csv": lambda: Kind(write("r.csv", CSV), read_records),
    "tsv": lambda: Kind(write("r.tsv", CSV.replace(",", "\t")), read_records),
    "conll": lambda: Kind(write("r.conll", CONLL), read_records),
    "conllu": lambda: Kind(write("r.conllu", CONLLU), read_records),
    "squad": lambda: Kind(write("r.squad", SQUAD), read_records),
    "semeval": lambda: Kind(write("r.semeval", SEMEVAL), read_records),
}
