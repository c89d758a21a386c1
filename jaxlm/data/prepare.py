"""Text to a token store: tokenized by worker processes, shuffled once, in bounded memory, resumable.

    sources ──spans──▶ pieces ──workers──▶ runs (sorted by key) ──buckets──▶ shards ──rename──▶ STORE

Every document gets a random 64-bit key, a function of (seed, its place in the sources) alone; the store's
order is the order of the keys. A worker writes a piece's documents sorted by key (a run). Then range after
range of keys is collected from all runs, sorted in memory and appended to the shards. So the store does not
depend on the number of workers or on interruptions, and no step holds more than a piece or a bucket.

All is written to `STORE.partial` (for a bucket: in this host's cache), which becomes STORE by one rename at the end (there:
an upload, the manifest last). A piece that is finished
there is not done again by the next run with the same sources, tokenizer and options.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import tqdm

from jaxlm.data import sources as text_sources
from jaxlm.data import store_writer, workers
from jaxlm.data.runs import in_order_of_keys, replacing, write_text
from jaxlm.data.sources import Span
from jaxlm.data.store_format import read_manifest, sha256_of
from jaxlm.data.workers import SPLITS
from jaxlm.exits import Locked
from jaxlm.files import as_path, is_remote
from jaxlm.tokenizers import Tokenizer, load_tokenizer


class OtherStore(FileExistsError):
    """At the output is a store of other data. differences: a line for each of 'what: found -> asked for'."""

    def __init__(self, output: Path, differences: list[str]):
        advice = "what it is of -> what was asked for; choose another output, or delete the store"
        lines = [f"{output} is a store of other data ({advice}):", *differences]
        super().__init__("\n  ".join(lines))
        self.differences = differences


_SHOWN = 10  # how many of the bad inputs an error names


def prepare(
    sources: str | Sequence[str],
    tokenizer: Tokenizer | str | os.PathLike,
    output: str | os.PathLike,
    *,
    split: str = "hash",
    validation_fraction: float = 0.05,
    seed: int = 0,
    num_workers: int = -1,
    shard_tokens: int = 1 << 24,
    max_bad_fraction: float = 0.01,
    text_field: str = "text",
    piece_bytes: int = 0,
    cache_dir: str = "",
    left_out: Sequence[Path] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Makes the token store `output` from text, and returns its manifest; a store that is already there,
    of the same sources, tokenizer and options, is returned at once.

    sources: 'stdlib', files, folders, globs (`jaxlm.data.sources.find_files`). What lies below `output`, or
      a folder of `left_out`, is no source.
    tokenizer: a tokenizer or its folder.
    split: 'hash' holds out whole documents, by a hash of their text: equal texts are on one side, whatever
      the seed. 'tail' holds out the end of every document, from character int(length * (1 - fraction)).
    validation_fraction: in [0, 1); with 0 there is no split 'validation'.
    num_workers: processes that tokenize; 0 = in this process, -1 = one per core if there is work for them.
    shard_tokens: tokens in a shard. piece_bytes: input in a piece; 0 = 4 MiB, more for large inputs.
    max_bad_fraction: the run stops if more than this share of the documents cannot be used. What cannot is
      listed with its origin and reason in `output/quarantine.jsonl`.
    cache_dir: where text on a bucket is copied to before it is read, and where a store for a bucket is made; '' is
      `files.cache_folder`'s.

    Raises:
      FileNotFoundError: with the list of sources that name no file.
      OtherStore: if a store of other data is at `output`. FileExistsError: if something else is.
      ValueError: for too much bad input (with the list of what was wrong), an empty split, a wrong option.
    """
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)
    _check_options(split, validation_fraction, max_bad_fraction)
    output = as_path(output)
    work = store_writer.working_folder(output, cache_dir)
    paths = text_sources.find_files(sources, cache_dir, [*left_out, output, work])
    files = _scan(paths, _known_files(output, work), progress)
    total = sum(file["size"] for file in files)
    recipe = dict(
        source_fingerprint=_fingerprint(files),
        tokenizer_sha256=tokenizer.sha256,
        split=split,
        validation_fraction=validation_fraction,
        seed=seed,
        text_field=text_field,
        shard_tokens=shard_tokens,
        piece_bytes=piece_bytes or min(max(total >> 10, 4 << 20), 64 << 20),
    )
    existing = _existing(output, recipe)
    if existing is not None:
        shutil.rmtree(work, ignore_errors=True)
        return existing
    work.mkdir(parents=True, exist_ok=True)
    with _lock(work) as lock:
        _start_or_resume(work, recipe, files, tokenizer)
        spans = [
            s
            for f in files
            for s in text_sources.make_spans(Path(f["path"]), recipe["piece_bytes"])
        ]
        pieces = list(_group(spans, recipe["piece_bytes"]))
        summaries = _tokenize(
            work, pieces, tokenizer, recipe, num_workers, max_bad_fraction, progress, lock
        )
        _check_unchanged(files)
        counts = _check_summaries(work, summaries, recipe, max_bad_fraction)
        manifest = _merge(work, summaries, tokenizer, recipe, counts, progress)
        if not is_remote(output):
            with contextlib.suppress(FileNotFoundError):
                output.rmdir()  # an empty folder may stand there
        store_writer.publish(work / "store", output)
    shutil.rmtree(work)
    return manifest


# ---------------------------------------------------------------- what there is to do


def _check_options(split: str, validation_fraction: float, max_bad_fraction: float) -> None:
    problems = []
    if split not in ("hash", "tail"):
        problems.append(f"split {split!r}: expected 'hash' or 'tail'")
    if not 0 <= validation_fraction < 1:
        problems.append(f"validation_fraction {validation_fraction}: expected 0 <= fraction < 1")
    if not 0 <= max_bad_fraction <= 1:
        problems.append(f"max_bad_fraction {max_bad_fraction}: expected 0 <= fraction <= 1")
    if problems:
        raise ValueError("\n  ".join(["prepare:", *problems]))


def _known_files(*folders: Path) -> dict[tuple, str]:
    """(path, size, time) -> sha256, as an earlier run noted them: such a file is not read again."""
    known = {}
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, KeyError):
            for file in json.loads((folder / "sources.json").read_text(encoding="utf-8")):
                known[file["path"], file["size"], file["mtime_ns"]] = file["sha256"]
    return known


def _scan(paths: list[Path], known: dict[tuple, str], progress: bool) -> list[dict[str, Any]]:
    """Path, size, time and sha256 of every file. One that cannot be read gets an empty sha256."""
    files = []
    for path in tqdm.tqdm(paths, "reading", unit=" files", disable=not progress, leave=False):
        stat = path.stat()
        digest = known.get((str(path), stat.st_size, stat.st_mtime_ns), "")
        if not digest:
            with contextlib.suppress(OSError):
                digest = sha256_of(path)
        files.append(
            dict(path=str(path), size=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=digest)
        )
    return files


def _fingerprint(files: list[dict[str, Any]]) -> str:
    """Of the files' formats and contents in their order; where they lie does not matter."""
    contents = [
        [text_sources.format_of(path), text_sources.compression_of(path), file["sha256"]]
        for file in files
        for path in [Path(file["path"])]
    ]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _existing(output: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished store of the same recipe; None if nothing is there."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / "manifest.json").is_file():
        raise FileExistsError(f"{output} exists and is no token store: choose another output")
    manifest = read_manifest(output)
    found = manifest.get("recipe", {})
    differences = [
        f"{name}: {found.get(name)} -> {value}"
        for name, value in recipe.items()
        if found.get(name) != value
    ]
    if differences:
        raise OtherStore(output, differences)
    return manifest


@contextlib.contextmanager
def _lock(work: Path) -> Iterator[IO]:
    """Only one process and its workers, which inherit the open file, write a store; the lock goes with the
    last of them, however they end: no worker of a killed run writes beside the next run."""
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Locked(f"another process is writing {work}: wait for it") from error
        yield file


def _start_or_resume(work: Path, recipe: dict, files: list[dict], tokenizer: Tokenizer) -> None:
    """Keeps the finished pieces of a run of the same recipe; those of another one are deleted."""
    plan = work / "plan.json"
    if not plan.is_file() or json.loads(plan.read_text(encoding="utf-8")) != recipe:
        for entry in work.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()
    tokenizer.save(work / "tokenizer")
    write_text(work / "sources.json", json.dumps(files))
    write_text(plan, json.dumps(recipe))


def _group(spans: Iterable[Span], piece_bytes: int) -> Iterator[list[Span]]:
    """Neighbouring spans as pieces of about `piece_bytes`; at most 10,000 files in one."""
    piece: list[Span] = []
    size = 0
    for span in spans:
        if piece and (size + span.num_bytes > piece_bytes or len(piece) == 10_000):
            yield piece
            piece, size = [], 0
        piece.append(span)
        size += span.num_bytes
    if piece:
        yield piece


def _check_unchanged(files: list[dict[str, Any]]) -> None:
    changed = [
        file["path"]
        for file in files
        for stat in [os.stat(file["path"])]
        if (stat.st_size, stat.st_mtime_ns) != (file["size"], file["mtime_ns"])
    ]
    if changed:
        raise ValueError("\n  ".join(["files changed while they were read; run again:", *changed]))


def _tokenize(
    work: Path,
    pieces: list[list[Span]],
    tokenizer: Tokenizer,
    recipe: dict[str, Any],
    num_workers: int,
    max_bad_fraction: float,
    progress: bool,
    lock: IO,
) -> list[dict[str, Any]]:
    """The summaries of all pieces, in their order; those that are done are read, the others made."""
    done = {}
    for number in range(len(pieces)):
        with contextlib.suppress(FileNotFoundError):
            done[number] = json.loads((work / f"piece-{number:05d}.json").read_bytes())
    sizes = [sum(span.num_bytes for span in piece) for piece in pieces]
    missing = [number for number in range(len(pieces)) if number not in done]
    if num_workers < 0:
        num_workers = (os.cpu_count() or 1) if len(missing) > 1 else 0
    num_workers = min(num_workers, len(missing))
    bar = tqdm.tqdm(
        desc="tokenizing",
        total=sum(sizes),
        initial=sum(sizes[number] for number in done),
        unit="B",
        unit_scale=True,
        disable=not progress,
    )
    with bar, contextlib.ExitStack() as stack:
        if num_workers == 0:
            made = (workers.prepare_piece(work, n, pieces[n], tokenizer, recipe) for n in missing)
        else:
            pool = workers.Workers(work, num_workers, lock)
            made = stack.enter_context(pool).map((n, pieces[n]) for n in missing)
        for summary in made:
            done[summary["number"]] = summary
            bar.update(sizes[summary["number"]])
            share = sum(sizes[number] for number in done) / max(sum(sizes), 1)
            _check_bad(work, done.values(), max_bad_fraction, share)
    return [done[number] for number in range(len(pieces))]


# ---------------------------------------------------------------- bad input


def _check_bad(
    work: Path, summaries: Iterable[dict[str, Any]], max_bad_fraction: float, share: float = 1.0
) -> None:
    """Raises ValueError with what was wrong if too much was: after a `share` of the input, if it would be
    too much even with nothing but good documents of the same size to come."""
    bad, documents, numbers = Counter[str](), 0, []
    for summary in summaries:
        bad.update(summary["bad"])
        documents += summary["documents"]
        numbers += [summary["number"]] if summary["bad"] else []
    total = documents + bad.total()
    if bad.total() * share <= max_bad_fraction * total:
        return
    quarantine = work.resolve() / "quarantine.jsonl"
    _collect_quarantine(work, sorted(numbers), quarantine)
    counts = [f"{reason}: {count}" for reason, count in bad.most_common()]
    with open(quarantine, encoding="utf-8") as file:
        shown = [json.loads(line) for line in itertools.islice(file, _SHOWN)]
    examples = [f"{b['origin']}: {b['reason']} {b['detail']}".rstrip() for b in shown]
    raise ValueError(
        "\n  ".join(
            [
                f"{bad.total()} of {total} documents cannot be used, more than max_bad_fraction="
                f"{max_bad_fraction} allows:",
                *counts,
                f"the first {len(examples)} (all of them so far are in {quarantine}):",
                *(f"  {example}" for example in examples),
                "repair or remove them, or allow more: tools/prepare_data.py --max_bad_fraction",
            ]
        )
    )


def _collect_quarantine(work: Path, numbers: Iterable[int], target: Path) -> None:
    with replacing(target) as out:
        for number in numbers:
            with open(work / f"piece-{number:05d}.bad.jsonl", encoding="utf-8") as file:
                shutil.copyfileobj(file, out)


def _check_summaries(
    work: Path, summaries: list[dict[str, Any]], recipe: dict[str, Any], max_bad_fraction: float
) -> dict[str, Any]:
    """The counts for the manifest. Raises ValueError for too much bad input or an empty split."""
    _check_bad(work, summaries, max_bad_fraction)
    documents = sum(summary["documents"] for summary in summaries)
    bad = sum((Counter(summary["bad"]) for summary in summaries), Counter[str]())
    for split in SPLITS if recipe["validation_fraction"] else SPLITS[:1]:
        if not any(summary["splits"][split]["num_documents"] for summary in summaries):
            raise ValueError(
                f"the split {split!r} is empty: {documents} documents, split {recipe['split']!r}, "
                f"validation_fraction {recipe['validation_fraction']}. With few documents use "
                "split='tail', which holds out the end of each; or change validation_fraction"
            )
    return dict(num_documents=documents, bad=dict(sorted(bad.items())))


# ---------------------------------------------------------------- runs to shards


def _merge(
    work: Path,
    summaries: list[dict[str, Any]],
    tokenizer: Tokenizer,
    recipe: dict[str, Any],
    counts: dict[str, Any],
    progress: bool,
) -> dict[str, Any]:
    """Writes `work/store` from the runs, from the start: this part is short."""
    store = work / "store"
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir()
    entries = {}
    splits = SPLITS if recipe["validation_fraction"] else SPLITS[:1]
    total = sum(s["splits"][split]["num_tokens"] for s in summaries for split in splits)
    bar = tqdm.tqdm(
        desc="shuffling", total=total, unit=" tokens", unit_scale=True, disable=not progress
    )
    with bar:
        for split in splits:
            writer = store_writer.ShardWriter(store, split, tokenizer, recipe["shard_tokens"])
            for ids, num_bytes in in_order_of_keys(work, summaries, split):
                writer.add(ids, num_bytes)
                bar.update(len(ids))
            entries[split] = writer.close()
    pieces = [summary["number"] for summary in summaries]
    _collect_quarantine(work, pieces, store / "quarantine.jsonl")
    shutil.copyfile(work / "sources.json", store / "sources.json")
    return store_writer.finish_store(store, entries, tokenizer, recipe=recipe, source=counts)
