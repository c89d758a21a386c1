"""Paths of users, local or on a bucket, and files and folders that are there whole, or not at all.

A path is pathlib's where it is local and etils.epath's where it is a URL ('gs://bucket/run'): both have the same methods.
A bucket has no append, no rename of folders and no memory maps. So there

    an append-only file     is kept in memory; the whole object is written again from time to time (`Appender`)
    a whole file            is written under its name: an object appears when its last byte is there (`write_whole`)
    a whole folder          is filled locally and uploaded, the file that says it is whole last (`new_folder`)
    a file that is mapped   is copied to a folder of this host once, and checked (`fetch`)

and a local disk keeps its own ways: appends, renames, maps.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxlm.exits import Damaged
from jaxlm.private import redact

# Scheme -> (what epath reads it with: any one of these, what to install).
SCHEMES = {"gs": (("gcsfs", "tensorflow"), "pip install 'jaxlm[gcs]'")}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 8 << 20
REWRITE_SECONDS = 30.0  # an append-only file on a bucket is written again no more often than this …
REWRITE_SHARE = 0.01  # … and takes no more than about this share of the time


def as_path(path: str | os.PathLike) -> Path:
    """The path of a user: pathlib.Path, or etils.epath.Path (which has the same methods) of a URL.

    Raises:
      ValueError: for a URL of an unknown scheme. ImportError: what to install for a known one.
    """
    text = os.fspath(path)
    url = _URL.match(text)
    if url is None:
        return Path(text)
    scheme = url[1].lower()
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(
            f"{redact(text)}: found the scheme {scheme}://, expected a local path or {known}"
        )
    packages, install = SCHEMES[scheme]
    if not any(map(importlib.util.find_spec, packages)):
        raise ImportError(f"{text} needs {packages[0]}: {install}")
    _without_stale_listings()
    from etils import epath

    # pathlib makes one slash of two, in what is made from a path that went through it.
    return epath.Path(f"{scheme}://{text[url.end() :]}")


def _without_stale_listings() -> None:
    """gcsfs remembers what a folder held, and does not see what others, Orbax's array writer among them, put there."""
    if importlib.util.find_spec("gcsfs"):
        from fsspec.config import conf

        conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is a URL, such as gs://bucket/folder."""
    return _URL.match(os.fspath(path)) is not None


def absolute(path: str | os.PathLike) -> Path:
    """The path without links and relative parts; a URL as it is."""
    return as_path(path) if is_remote(path) else Path(path).resolve()


def cache_folder(configured: str = "") -> Path:
    """Where this host keeps copies: `configured`, else `$XDG_CACHE_HOME/jaxlm`, else `~/.cache/jaxlm`."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "jaxlm"
    return Path(configured or default).expanduser()


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def new_folder(target: Path, last: str) -> Iterator[Path]:
    """A local folder to fill, which becomes `target` when it is whole; where another process was first, its folder stays.

    last: the file that is uploaded last: on a bucket a folder is whole if it has it.
    """
    if is_remote(target):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / target.name
            folder.mkdir()
            yield folder
            if not (target / last).is_file():
                upload(folder, target, last)
        return
    with tempfile.TemporaryDirectory(".partial", f"{target.name}.", target.parent) as beside:
        folder = Path(beside) / target.name
        folder.mkdir()
        yield folder
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():
                raise


def upload(folder: Path, target: Path, last: str) -> None:
    """Copies all files of a local folder below `target`, the file `last` after all others."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    for file in sorted(files, key=lambda file: file == folder / last):
        with open(file, "rb") as source, _creating(target / file.relative_to(folder)) as copy:
            shutil.copyfileobj(source, copy, _BLOCK)


def download(folder: Path, target: Path) -> None:
    """Copies the files of a folder, and of those in it, into a new local folder."""
    target.mkdir()
    for entry in folder.iterdir():
        if entry.is_dir():
            download(entry, target / entry.name)
        else:
            _copy(entry, target / entry.name)


def write_whole(path: str | os.PathLike, write: Callable[[Any], None]) -> None:
    """`write` to a binary file that takes the place of `path` when it is whole."""
    with _creating(as_path(path)) as file:
        write(file)


def write_text(path: str | os.PathLike, text: str) -> None:
    """`text` as UTF-8 in the place of what was at `path`, whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def _creating(path: Path) -> Iterator[BinaryIO]:
    if is_remote(path):
        # Into a local file first: closing an upload that failed half-way would make an object of that half.
        with tempfile.TemporaryFile() as whole:
            yield whole
            whole.seek(0)
            with path.open("wb") as file:
                shutil.copyfileobj(whole, file, _BLOCK)
        return
    # Not by the process's number: two containers that share a disk may both be 7.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Removes what killed writers left in a local folder and in the folders in it; nobody may be writing there."""
    if is_remote(folder):
        return
    for path in [*folder.glob("*.partial"), *folder.glob("*/*.partial")]:
        if path.is_file():
            path.unlink()


class Appender:
    """A file that grows at its end. Local: what is written is in the file. On a bucket: kept in memory, too, and the object
    is written again at `flush`, `close`, and now and then at a write, so a kill loses what came after that."""

    def __init__(self, path: str | os.PathLike):
        self.path = as_path(path)
        self._file: BinaryIO | None = None
        if is_remote(self.path):
            if not self.path.is_file():
                self.path.write_bytes(b"")
            self._content = bytearray(self.path.read_bytes())
            self._written, self._due = len(self._content), time.monotonic() + REWRITE_SECONDS
        else:
            self._file = open(self.path, "ab", buffering=0)

    def write(self, data: bytes) -> None:
        """Appends bytes; on a bucket they are there after the next flush."""
        if self._file is not None:
            self._file.write(data)
            return
        self._content += data
        if time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """On return the file has all that was written."""
        if self._file is not None or self._written == len(self._content):
            return
        started = time.monotonic()
        self.path.write_bytes(bytes(self._content))
        self._written, now = len(self._content), time.monotonic()
        self._due = now + max(REWRITE_SECONDS, (now - started) / REWRITE_SHARE)

    def close(self) -> None:
        """Writes what is held, and closes the file."""
        self.flush()
        if self._file is not None:
            self._file.close()


# ---------------------------------------------------------------- reading


def read_at_most(path: Path, most_bytes: int) -> bytes:
    """A whole file that nobody vouches for. Raises ValueError if it is larger."""
    with path.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"{path}: found more than {most_bytes:,} bytes, which is too large a file")
    return data


def fetch(source: Path, folder: Path, sha256: str) -> Path:
    """A copy of `source` in the local `folder`, under a name by its sha256; made, and checked, once per host.

    Processes that ask at one time wait for one another.

    Raises:
      Damaged: if what was read has another sha256. ValueError: if `sha256` is none.
    """
    if not _SHA256.fullmatch(sha256):
        raise ValueError(
            f"{source}: found the sha256 {sha256[:80]!r}, expected 64 digits of 0-9a-f"
        )
    target = folder / f"sha256-{sha256}"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    lock, partial = (folder / f"{target.name}.{ending}" for ending in ("lock", "partial"))
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not target.is_file():
            found = _copy(source, partial)
            if found != sha256:
                partial.unlink()
                raise Damaged(
                    f"{source}: its sha256 is {found}, expected {sha256}: upload the file again"
                )
            os.replace(partial, target)
        # Whoever waits for the lock finds the file, and so does whoever makes the lock anew.
        lock.unlink(missing_ok=True)
    return target


def local_copy(path: str | os.PathLike, cache: str = "") -> Path:
    """A file to read here: `path` itself where it is local, else a copy under its own name, made anew when the object changes.

    cache: of `cache_folder`.
    """
    source = as_path(path)
    if not is_remote(source):
        return source
    stat = source.stat()
    version = hashlib.sha256(f"{source} {stat.length} {stat.mtime}".encode()).hexdigest()
    folder = cache_folder(cache) / "inputs" / version[:32]
    target = folder / source.name
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".partial", delete=False) as partial:
            _copy(source, Path(partial.name))
        os.replace(partial.name, target)
    return target


def _copy(source: Path, target: Path) -> str:
    """Copies a file and returns its sha256."""
    digest = hashlib.sha256()
    with source.open("rb") as stream, open(target, "wb") as file:
        while block := stream.read(_BLOCK):
            digest.update(block)
            file.write(block)
    return digest.hexdigest()
