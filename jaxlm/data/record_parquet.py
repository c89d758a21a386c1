"""Parquet, by pyarrow, which is optional."""

import contextlib
import json
from pathlib import Path
from typing import Any

from jaxlm.data.record_base import MAX_FILE_BYTES, Found, ReadOptions, Record, log


def read_parquet(path: Path, options: ReadOptions) -> Found:
    """One record a row. Class numbers become names where the `datasets` library has left the names."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow: pip install -e '.[parquet]'") from error
    try:
        with contextlib.closing(parquet.ParquetFile(path)) as file:
            meta = file.metadata
            size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
            if size > MAX_FILE_BYTES:
                raise ValueError(
                    f"{size:,} bytes when unpacked; expected: at most {MAX_FILE_BYTES:,}"
                )
            table = file.read()
    except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ValueError(f"found: {path} cannot be read as Parquet: {error}") from error
    names = _class_names(table.schema.metadata or {})
    for column in names.keys() & set(table.column_names):
        log.info("%s: the numbers of %s are read as class names", path, column)
    records = []
    for number, row in enumerate(table.to_pylist(), 1):
        fields = {k: _named(v, names[k]) if k in names else v for k, v in row.items()}
        records.append(Record(str(path), number, fields))
    return records, []


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """column -> names of classes, as `datasets` writes them for a ClassLabel or a list of them."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        found = {column: _names_of(feature) for column, feature in features.items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return {}  # another writer's metadata: the numbers stay numbers
    return {column: names for column, names in found.items() if names}


def _names_of(feature: Any) -> list[str]:
    if not isinstance(feature, dict):
        return []
    if feature.get("_type") in ("Sequence", "List", "LargeList"):
        return _names_of(feature.get("feature"))
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    return [str(name) for name in names] if isinstance(names, list) else []


def _named(value: Any, names: list[str]) -> Any:
    """-1 is how `datasets` writes a missing label."""
    if isinstance(value, list):
        return [_named(part, names) for part in value]
    if value == -1:
        return None
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value
