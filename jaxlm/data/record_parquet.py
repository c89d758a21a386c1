"""Parquet, by pyarrow, which is optional."""

import contextlib
import json
from pathlib import Path
from typing import Any

from jaxlm.data.record_base import MAX_FILE_BYTES, Found, ReadOptions, Record, log

_BATCH_ROWS = 64


def read_parquet(path: Path, options: ReadOptions) -> Found:
    """One record a row. Class numbers become names where the `datasets` library has left the names."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow: pip install 'jaxlm[parquet]'") from error
    try:
        with contextlib.closing(parquet.ParquetFile(path)) as file:
            schema = file.schema_arrow
            rows = _read_rows(file)
    except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ValueError(f"found: {path} cannot be read as Parquet: {error}") from error
    names = _class_names(schema.metadata or {})
    for column in names.keys() & set(schema.names):
        log.info("%s: the numbers of %s are read as class names", path, column)
    records = []
    for number, row in enumerate(rows, 1):
        fields = {k: _named(v, names[k]) if k in names else v for k, v in row.items()}
        records.append(Record(str(path), number, fields))
    return records, []


def _read_rows(file: Any) -> list[dict[str, Any]]:
    """All rows, in batches: what the file says of its own size is not believed, and a dictionary can make a few bytes of it
    any number of long texts."""
    rows: list[dict[str, Any]] = []
    left = MAX_FILE_BYTES
    for batch in file.iter_batches(_BATCH_ROWS):
        left -= batch.nbytes
        if left < 0:
            raise ValueError(f"it has more than {MAX_FILE_BYTES:,} bytes when unpacked")
        rows += batch.to_pylist()
    return rows


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
