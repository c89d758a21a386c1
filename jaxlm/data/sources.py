"""Where text comes from: the standard library, text files, JSON lines and Parquet, by file, folder or glob.

    for document in read_documents(["stdlib", "books/*.txt", "web.jsonl.zst"]):
        match document:
            case Document(text, origin): …
            case Bad(reason, origin, detail, count): …     # nothing is lost silently

A text file is one document; one longer than 4 MiB becomes several, cut at ends of lines. A line of
.jsonl or .ndjson is a JSON object whose `text_field` is the document, and so is a row of Parquet. All but
Parquet may also be compressed (.gz, .zst). Any other ending is read as text in UTF-8. The case of an ending
does not matter, and a byte order mark is no text.
"""

import contextlib
import dataclasses
import glob
import gzip
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from jaxlm.files import absolute, as_path, is_remote, local_copy
from jaxlm.near import meant_path

MAX_DOCUMENT_BYTES = 4 << 20  # of text files: a book is whole, and a 2 GB file fits no memory
MAX_LINE_BYTES = 64 << 20
# A compressed file may be a bomb: text becomes 2 to 30 times smaller, zeros 1,000 (gzip) or 30,000 times (zstd).
FREE_EXPANSION, MAX_EXPANSION = (
    1 << 28,
    256,
)  # so many bytes come out of any, then so many for each of the file's
_ZSTD_PIECE = (
    2 << 10
)  # of the file at once: a block of 128 KiB takes 4 bytes or more, so 64 MiB come out at most
_BATCH_ROWS = 64  # of Parquet: a dictionary makes many long texts of one
_CUT_WINDOW = 64 << 10  # where an end of line is looked for, before a cut between two characters
_NOT_LIBRARY = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
_GENERATED = (
    "config-",
    "_sysconfigdata",
)  # what the build of the interpreter wrote, with its paths


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, and where it is from."""

    text: str
    origin: str  # 'path' of a text file, 'path:line' of JSON lines, 'path:row' of Parquet, from 1


@dataclasses.dataclass(frozen=True)
class Bad:
    """What could not be read: empty_file, empty_text, invalid_utf8, broken_json, missing_field, not_text,
    too_long, truncated, corrupt or unreadable. `count`: how many documents that are."""

    reason: str
    origin: str
    detail: str = ""
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Span:
    """A part of a file that can be read alone: bytes [start, stop), or row groups of Parquet.

    line: the number of its first line or row, from 1. num_bytes: its size on disk.
    """

    path: str
    start: int
    stop: int
    line: int
    num_bytes: int


def read_documents(
    sources: str | Sequence[str],
    *,
    text_field: str = "text",
    cache_dir: str = "",
    left_out: Sequence[Path] = (),
) -> Iterator[Document | Bad]:
    """Every document of the sources in their order, and in its place what is wrong with one.

    sources, cache_dir, left_out: as of `find_files`. Memory: one document, or the line of a JSON lines file.
    """
    for path in find_files(sources, cache_dir, left_out):
        for span in make_spans(path):
            yield from read_span(span, text_field)


def find_files(
    sources: str | Sequence[str], cache_dir: str = "", left_out: Sequence[Path] = ()
) -> list[Path]:
    """The files of 'stdlib', files, folders (all files below, hidden ones left out) and globs.

    The order is that of the sources, by name within one; a file that is found twice is read once. Files on a bucket
    are copied to this host first, into `cache_dir` ('': `files.cache_folder`'s).
    left_out: folders, no file below which is taken for a source that is not below them itself.

    Raises FileNotFoundError with the list of the sources that name no file.
    """
    found: dict[Path, None] = {}
    missing = []
    folders = frozenset(map(absolute, left_out))
    for source in [sources] if isinstance(sources, str) else sources:
        place = absolute(source)
        files = _files_of(str(source), cache_dir, folders.difference([place, *place.parents]))
        found.update(dict.fromkeys(files))
        if not files:
            near = meant_path(Path(str(source)))
            missing.append(f"  {source}: no such file, or a folder or glob without files{near}")
    if missing or not found:
        known = "expected 'stdlib', a file, a folder or a glob (quoted, so that the shell keeps it)"
        raise FileNotFoundError("\n".join(["no text was found:", *missing, f"  {known}"]))
    return list(found)


def make_spans(path: Path, span_bytes: int = 16 << 20) -> list[Span]:
    """Cuts a file into parts of about `span_bytes` that can be read side by side.

    A document of a text file is a span of its own. A compressed file is one span.
    A file that cannot be opened is one span, too: reading it says why.
    """
    try:
        size = path.stat().st_size
        if compression_of(path):
            return [Span(str(path), 0, size, 1, size)]
        cut = {"text": _cut_text, "jsonl": _cut_lines, "parquet": _cut_rows}[format_of(path)]
        return cut(path, size, span_bytes) or [Span(str(path), 0, 0, 1, 0)]
    except (OSError, ValueError):
        return [Span(str(path), 0, 0, 1, 0)]


def read_span(span: Span, text_field: str = "text") -> Iterator[Document | Bad]:
    """The documents of one span. What breaks off the reading of a file is its last item."""
    read = {"text": _read_text, "jsonl": _read_lines, "parquet": _read_rows}[
        format_of(Path(span.path))
    ]
    any_found = False
    try:
        for item in read(span, text_field):
            any_found = True
            yield item
        if not any_found and span.start == 0:
            yield Bad("empty_file", span.path)
    except EOFError as error:
        yield Bad("truncated", span.path, str(error))
    except (gzip.BadGzipFile, zlib.error, ValueError) as error:
        yield Bad("corrupt", span.path, str(error))
    except OSError as error:
        yield Bad("unreadable", span.path, str(error))


def format_of(path: Path) -> str:
    """'jsonl', 'parquet' or 'text', by the file's name."""
    name = path.with_suffix("") if compression_of(path) else path
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(
        name.suffix.lower(), "text"
    )


def compression_of(path: Path) -> str:
    """'.gz', '.zst' or '', by the file's name."""
    ending = path.suffix.lower()
    return ending if ending in (".gz", ".zst") else ""


def _files_of(source: str, cache_dir: str, left_out: frozenset[Path]) -> list[Path]:
    if source == "stdlib":
        return _library_files()
    is_taken = lambda file: left_out.isdisjoint(absolute(file).parents)
    if is_remote(source):
        objects = filter(is_taken, _objects_of(as_path(source)))
        return [local_copy(file, cache_dir) for file in objects]
    return list(filter(is_taken, _local_files(source)))


def _local_files(source: str) -> list[Path]:
    """The files of a file, a folder or a glob of this host."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_below(path)
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    nested = [_files_below(m) if m.is_dir() and "**" not in source else [m] for m in matches]
    return sorted(file for files in nested for file in files if file.is_file())


def _objects_of(path: Path) -> list[Path]:
    """The files of a file, a folder or a glob on a bucket; a glob's folders are left out, and it has no '**'."""
    if path.is_file():
        return [path]
    if path.is_dir():
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        return [file for entry in entries for file in _objects_of(entry)]
    if "**" in str(path):
        raise ValueError(
            f"{path}: '**' is not for buckets; expected a folder, or a glob of '*' and '?'"
        )
    bucket = path.parents[len(path.parts) - 4]  # parts: '/', scheme, bucket, …
    found = bucket.glob(str(path.relative_to(bucket))) if path != bucket else ()
    return sorted(file for file in found if file.is_file())


def _files_below(folder: Path, left_out: frozenset[str] = frozenset()) -> list[Path]:
    """All files below a folder, sorted; hidden ones and folders of the names `left_out` excepted."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in left_out]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


def _library_files() -> list[Path]:
    """The standard library's modules, without tests, generated files and empty modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        path
        for path in _files_below(root, _NOT_LIBRARY)
        if path.suffix == ".py"
        and not path.relative_to(root).parts[0].startswith(_GENERATED)
        and path.stat().st_size
    ]


def _cut_text(path: Path, size: int, span_bytes: int) -> list[Span]:
    """One span per document."""
    spans, start = [], 0
    with open(path, "rb") as file:
        while start < size:
            stop = start + MAX_DOCUMENT_BYTES
            file.seek(stop)
            stop = min(stop + _cut_point(file.read(_CUT_WINDOW)), size)
            spans.append(Span(str(path), start, stop, 1, stop - start))
            start = stop
    return spans


def _cut_point(window: bytes) -> int:
    """Where to cut in the bytes after a document's size is reached: after the first line, else between
    two characters."""
    line = window.find(b"\n") + 1
    if line:
        return line
    return next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)


def _cut_lines(path: Path, size: int, span_bytes: int) -> list[Span]:
    """Spans of whole lines, with the number of their first line."""
    cuts, position, line, due = [(0, 1)], 0, 1, span_bytes
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            counted = 0
            while end := block.find(b"\n", max(due - position, 0)) + 1:
                line += block.count(b"\n", counted, end)
                counted = end
                cuts.append((position + end, line))
                due = position + end + span_bytes
            line += block.count(b"\n", counted)
            position += len(block)
    stops = [start for start, _ in cuts[1:]] + [size]
    return [
        Span(str(path), start, stop, line, stop - start)
        for (start, line), stop in zip(cuts, stops, strict=True)
        if stop > start
    ]


def _cut_rows(path: Path, size: int, span_bytes: int) -> list[Span]:
    """Spans of row groups."""
    with contextlib.closing(_parquet(path)) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    share = size / max(sum(group.num_rows for group in groups), 1)
    spans, start, row, rows = [], 0, 1, 0
    for index, group in enumerate(groups):
        rows += group.num_rows
        if rows * share >= span_bytes or index == len(groups) - 1:
            spans.append(Span(str(path), start, index + 1, row, int(rows * share)))
            start, row, rows = index + 1, row + rows, 0
    return spans


def _read_text(span: Span, text_field: str) -> Iterator[Document | Bad]:
    path = Path(span.path)
    if not compression_of(path):
        with open(path, "rb") as file:
            file.seek(span.start)
            data = file.read(span.stop - span.start)
        if data:
            whole = span.start == 0 and span.num_bytes == path.stat().st_size
            origin = span.path if whole else f"{span.path}@{span.start}"
            yield _decoded(data, origin, span.start)
        return
    with _open(path) as stream:
        data = stream.read(MAX_DOCUMENT_BYTES)
        position = 0
        while data:
            window = stream.read(_CUT_WINDOW)
            cut = _cut_point(window)
            yield _decoded(data + window[:cut], f"{span.path}@{position}", position)
            position += len(data) + cut
            data = window[cut:]
            data += stream.read(MAX_DOCUMENT_BYTES - len(data))


def _read_lines(span: Span, text_field: str) -> Iterator[Document | Bad]:
    path = Path(span.path)
    remaining = float("inf") if compression_of(path) else span.stop - span.start
    number = span.line
    with _open(path) as stream:
        if span.start:
            stream.seek(span.start)
        while remaining > 0 and (line := stream.readline(MAX_LINE_BYTES)):
            remaining -= len(line)
            origin = f"{span.path}:{number}"
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while rest := stream.readline(MAX_LINE_BYTES):
                    remaining -= len(rest)
                    if rest.endswith(b"\n"):
                        break
                yield Bad("too_long", origin, f"a line of more than {MAX_LINE_BYTES >> 20} MiB")
            elif line.strip():
                yield _parsed(line, origin, text_field)
            number += 1


def _parsed(line: bytes, origin: str, text_field: str) -> Document | Bad:
    """The document of one line of JSON."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Bad("invalid_utf8", origin, str(error))
    except (ValueError, RecursionError) as error:
        return Bad("broken_json", origin, str(error))
    if not isinstance(record, dict) or text_field not in record:
        found = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        return Bad("missing_field", origin, f"expected {text_field!r}, found {found[:200]}")
    return _checked(record[text_field], origin)


def _read_rows(span: Span, text_field: str) -> Iterator[Document | Bad]:
    with contextlib.closing(_parquet(Path(span.path))) as file:
        groups = list(range(span.start, span.stop))
        if text_field not in file.schema_arrow.names:
            rows = sum(file.metadata.row_group(i).num_rows for i in groups)
            found = f"expected {text_field!r}, found {', '.join(file.schema_arrow.names)}"
            yield Bad("missing_field", span.path, found, max(rows, 1))
            return
        row = span.line
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                yield _checked(value, f"{span.path}:{row}")
                row += 1


def _decoded(data: bytes, origin: str, start: int) -> Document | Bad:
    """The document of a text file's bytes from `start` on; at the file's start a byte order mark may stand."""
    try:
        text = data.decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        return Bad("invalid_utf8", origin, str(error))
    return Document(text, origin) if text else Bad("empty_text", origin)


def _checked(text: Any, origin: str) -> Document | Bad:
    """A document's text out of a record."""
    if not isinstance(text, str):
        return Bad("not_text", origin, f"expected a string, found {type(text).__name__}")
    if not text:
        return Bad("empty_text", origin)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        return Bad("invalid_utf8", origin, str(error))
    return Document(text, origin)


def _open(path: Path) -> BinaryIO:
    unpack = {"": None, ".gz": gzip.GzipFile, ".zst": _ZstdFile}[compression_of(path)]
    if unpack is None:
        return open(path, "rb")
    limit = FREE_EXPANSION + MAX_EXPANSION * path.stat().st_size
    return io.BufferedReader(_Bounded(unpack(path), limit), 1 << 20)


class _Bounded(io.RawIOBase):
    """A stream that raises ValueError after so many bytes."""

    def __init__(self, stream: Any, limit: int):
        self._stream, self._limit, self._left = stream, limit, limit

    def readable(self):
        return True

    def readinto(self, buffer):
        count = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise ValueError(
                f"more than {self._limit:,} bytes come out of it, which is no text: unpack it yourself if it is"
            )
        return count

    def close(self):
        self._stream.close()
        super().close()


class _ZstdFile(io.RawIOBase):
    """Reads .zst files of one or more frames; zstandard's own reader ends silently where a file is cut."""

    def __init__(self, path: Path):
        import zstandard

        self._new, self._error = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        self._file, self._frame, self._ready = open(path, "rb"), None, memoryview(b"")
        self._compressed = b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self._ready:
            self._compressed = self._compressed or self._file.read(_ZSTD_PIECE)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._ready = memoryview(self._frame.decompress(self._compressed))
            except self._error as error:
                raise ValueError(str(error)) from error
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        taken, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def close(self):
        self._file.close()
        super().close()


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow: pip install 'jaxlm[parquet]'") from error
    return parquet.ParquetFile(path)
