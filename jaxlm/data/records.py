"""Labelled files for fine-tuning: CSV, JSON, Parquet, CoNLL columns, SQuAD, SemEval-2010 task 8, parallel texts.

    records, problems = read_records("train.csv")
    roles = ROLES["sequence_classification"]
    chosen = choose_columns(records, roles, {"label": "intent"})
    records, more = as_role_records(records, chosen)
    print(check_problems([*problems, *more], num_rows, workdir / "problems.jsonl"))

A row that cannot be read is a problem with its line, never dropped in silence; a file that cannot be
read is a ValueError. What was guessed about a file is said in the log of `jaxlm`.
"""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from jaxlm.data.record_base import (
    Found,
    Problem,
    ReadOptions,
    Record,
    check_problems,
    format_problems,
    value_problem,
    write_problems,
)
from jaxlm.data.record_csv import read_csv, read_tsv
from jaxlm.data.record_json import read_json, read_json_lines, read_squad
from jaxlm.data.record_lines import RELATION_LINE, read_conll, read_conllu, read_semeval
from jaxlm.data.record_parallel import parallel_files, read_parallel
from jaxlm.data.record_parquet import read_parquet
from jaxlm.files import as_path, local_copy
from jaxlm.near import meant_path

__all__ = [
    "FORMATS",
    "Problem",
    "Record",
    "check_problems",
    "format_problems",
    "read_records",
    "write_problems",
]

FORMATS: dict[str, Callable[[Path, ReadOptions], Found]] = {
    "csv": read_csv,
    "tsv": read_tsv,
    "jsonl": read_json_lines,
    "json": read_json,
    "parquet": read_parquet,
    "conll": read_conll,
    "conllu": read_conllu,
    "squad": read_squad,
    "semeval": read_semeval,
}
_ENDINGS = {
    **{f".{name}": name for name in ("csv", "tsv", "jsonl", "json", "parquet", "conll", "conllu")},
    **{".tab": "tsv", ".ndjson": "jsonl", ".bio": "conll", ".iob": "conll", ".iob2": "conll"},
}
_HEAD_CHARS = 1 << 16


def read_records(
    path: str | Path,
    format: str = "",
    *,
    header: str = "auto",
    delimiter: str = "",
    split: str = "",
    cache_dir: str = "",
) -> Found:
    """The rows of a labelled file in their order, and the rows that cannot be read.

    path: a file; for JSON whose top level is an object of lists also PATH:SPLIT or PATH:SPLIT+SPLIT; for parallel texts
      the files of sources and of targets, a.en+a.de.
    format: a key of FORMATS, '' for that of the ending, or, for an unknown ending, of the first lines.
    header (CSV): yes, no or auto. delimiter (CSV): one character, '' to guess it.
    split (JSON): the same as in the path.
    cache_dir: where a file on a bucket is copied to; '' is `files.cache_folder`'s.

    Fields are named as in the file; columns without a name are column0, column1, …

    Raises FileNotFoundError; ValueError for a file that cannot be read or has no rows; ImportError for
    Parquet without pyarrow.
    """
    if pair := parallel_files(os.fspath(path)):
        records, problems = read_parallel(*(local_copy(file, cache_dir) for file in pair))
    else:
        path, split = _path_and_split(os.fspath(path), split)
        path = local_copy(path, cache_dir)
        format = format or _ENDINGS.get(path.suffix.lower()) or _sniffed_format(path)
        if format not in FORMATS:
            raise ValueError(f"found: format={format!r}; expected: one of {', '.join(FORMATS)}")
        records, problems = FORMATS[format](path, ReadOptions(header, delimiter, split))
    if not records and not problems:
        raise ValueError(f"found: {path} has no rows; expected: rows of format {format}")
    usable = []
    for record in records:
        if text := value_problem(record.fields):
            problems.append(Problem(record.source, record.line, text))
        else:
            usable.append(record)
    return usable, problems


def _path_and_split(name: str, split: str) -> tuple[Path, str]:
    path = as_path(name).expanduser()
    before, _, after = name.rpartition(":")
    if not path.exists() and "/" not in after and as_path(before).expanduser().is_file():
        path, split = as_path(before).expanduser(), split or after
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(
            f"found: {kind} at {name}; expected: a labelled file{meant_path(Path(name))}"
        )
    if split and path.suffix.lower() != ".json":
        raise ValueError(
            f"found: split {split!r} of {path}; expected: a split of a .json file only"
        )
    return path, split


def _sniffed_format(path: Path) -> str:
    """The format of a file with an unknown ending, by its first lines."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        lines = file.read(_HEAD_CHARS).split("\n")[:-1]
    filled = [line for line in lines if line.strip()]
    first = filled[0].lstrip() if filled else ""
    if first.startswith(("{", "[")):
        return "json"
    if RELATION_LINE.fullmatch(first) and "<e1>" in first:
        return "semeval"
    widths = Counter(len(line.split()) for line in filled if not line.startswith("#"))
    width, count = widths.most_common(1)[0] if widths else (0, 0)
    if len(filled) < len(lines) and width > 1 and count > 0.9 * widths.total():
        return "conll"
    raise ValueError(
        f"found: {path}, whose ending and first lines are of no known format"
        f"\nexpected: one of {', '.join(sorted(_ENDINGS))}\nchange: data.format={'|'.join(FORMATS)}"
    )
