"""Processes that tokenize pieces of text into runs."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from jaxlm.data import sources as text_sources
from jaxlm.data.runs import Runs, replacing, write_text
from jaxlm.data.sources import Bad, Document, Span
from jaxlm.data.store_format import token_dtype
from jaxlm.exits import RunError
from jaxlm.tokenizers import Tokenizer, load_tokenizer

SPLITS = ("train", "validation")


def prepare_piece(
    work: Path, number: int, spans: Sequence[Span], tokenizer: Tokenizer, recipe: dict[str, Any]
) -> dict[str, Any]:
    """Tokenizes one piece into runs and returns its summary, which it writes last: the piece is done."""
    dtype = token_dtype(tokenizer.vocab_size)
    runs = {split: Runs(work, number, split, dtype) for split in SPLITS}
    documents, bad = 0, Counter[str]()
    items = (item for span in spans for item in text_sources.read_span(span, recipe["text_field"]))
    with replacing(work / f"piece-{number:05d}.bad.jsonl") as quarantine:
        for place, item in enumerate(items):
            if isinstance(item, Bad):
                bad[item.reason] += item.count
                quarantine.write(json.dumps(dataclasses.asdict(item)) + "\n")
                continue
            documents += 1
            key = _hash(f"{recipe['seed']} {number} {place}".encode(), b"order")
            for split, text in _split(item, recipe["split"], recipe["validation_fraction"]):
                runs[split].add(key, tokenizer.encode(text), len(text.encode()))
    for split in SPLITS:
        runs[split].flush()
    counts = ("num_runs", "num_documents", "num_tokens")
    summary = dict(
        number=number,
        documents=documents,
        bad=bad,
        splits={split: {name: getattr(r, name) for name in counts} for split, r in runs.items()},
    )
    write_text(work / f"piece-{number:05d}.json", json.dumps(summary))
    return summary


def _split(document: Document, how: str, fraction: float) -> list[tuple[str, str]]:
    """(split, text) of the parts of a document; empty parts are left out."""
    text = document.text
    if how == "tail":
        cut = int(len(text) * (1 - fraction))
        return [part for part in zip(SPLITS, (text[:cut], text[cut:]), strict=True) if part[1]]
    held_out = _hash(text.encode(), b"split") < fraction * 2**64
    return [(SPLITS[held_out], text)]


def _hash(data: bytes, purpose: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=purpose).digest(), "little")


class Workers:
    """Processes that run `prepare_piece`: plain `python -m` commands that read pieces as lines of JSON and
    answer with summaries. So they import neither the caller's main module nor JAX, and end with it."""

    def __init__(self, work: Path, count: int, lock: IO):
        self.work, self.count, self.lock = work, count, lock

    def __enter__(self) -> "Workers":
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        single = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "jaxlm.data.workers", str(self.work.resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[self.lock.fileno()],  # held until they end, too
                env=os.environ | single | {"PYTHONPATH": path},
            )
            for _ in range(self.count)
        ]
        self.free: queue.SimpleQueue = queue.SimpleQueue()
        for process in self.processes:
            self.free.put(process)
        self.threads = concurrent.futures.ThreadPoolExecutor(self.count)
        return self

    def __exit__(self, *error) -> None:
        for process in self.processes:
            process.kill()
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()

    def map(self, pieces: Iterable[tuple[int, list[Span]]]) -> Iterator[dict[str, Any]]:
        """The summaries, as they come."""
        futures = [self.threads.submit(self._run, *piece) for piece in pieces]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()

    def _run(self, number: int, spans: list[Span]) -> dict[str, Any]:
        process = self.free.get()
        request = [number, [dataclasses.astuple(span) for span in spans]]
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            answer = process.stdout.readline()
        finally:
            self.free.put(process)  # a dead one, too: whoever waits for it shall not wait forever
        if not answer:
            raise RunError(
                f"a worker process ended with code {process.wait()} at piece {number} "
                f"({spans[0].path}, …); its message is above. -9 often means too little memory: use "
                "fewer workers. The same command goes on with the pieces that are finished."
            )
        return json.loads(answer)


def _work(work: Path) -> None:
    """A worker's life: it ends when its standard input does, in the middle of a piece, too."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    requests: queue.SimpleQueue = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            requests.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    recipe = json.loads((work / "plan.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(work / "tokenizer")
    while True:
        number, spans = json.loads(requests.get())
        summary = prepare_piece(work, number, [Span(*span) for span in spans], tokenizer, recipe)
        print(json.dumps(summary), file=answers, flush=True)


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
