"""A grid over config fields, one run and one workdir for each point:

    python tools/sweep.py --config=configs/gpt.py:tiny --workdir=runs/lr \\
        --grid optimizer.learning_rate=1e-3,3e-3 --grid seed=0,1,2 -- --config.num_train_steps=500

What follows `--` goes to every run. `--entrypoint` names another one that takes --config and --workdir
(default jaxlm.pretrain). Runs go one after another. The same command again skips the finished ones and
resumes the one that was cut off; a failed run does not stop the others. At the end all are compared.
"""

import argparse
import contextlib
import itertools
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxlm.files import Appender, as_path, is_remote, write_text
from tools.compare_runs import report, summarize

STATUS = "sweep.json"
LOG = "sweep.log"


def split_values(text: str) -> list[str]:
    """'1,2' -> ['1', '2']; a comma inside brackets or quotes separates nothing: '(0.9,0.95),(0.8,0.99)'."""
    values, depth, quote, current = [], 0, "", ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0 and not quote:
            values.append(current)
            current = ""
        else:
            current += letter
    return [*values, current]


def parse_grid(entries: Sequence[str]) -> dict[str, list[str]]:
    """['seed=0,1', 'batch_size=8'] -> {'seed': ['0', '1'], 'batch_size': ['8']}.

    Raises:
      ValueError: a repair list.
    """
    grid: dict[str, list[str]] = {}
    problems = []
    for entry in entries:
        field, equals, text = entry.partition("=")
        field = field.removeprefix("--").removeprefix("config.")
        values = split_values(text)
        if not equals or not field or "" in values:
            problems.append(f"found: --grid {entry}; expected: --grid FIELD=VALUE,VALUE,…")
        elif field in grid:
            problems.append(f"found: --grid {field} twice; change: give all its values at once")
        elif len(set(values)) != len(values):
            problems.append(f"found: --grid {entry} with one value twice; change: leave one out")
        grid[field] = values
    if problems:
        raise ValueError("\n".join(problems))
    return grid


def points(grid: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Every combination, the last field varying fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def run_name(point: Mapping[str, str]) -> str:
    """{'optimizer.learning_rate': '1e-3', 'seed': '0'} -> 'learning_rate=1e-3,seed=0': a folder's name."""
    lasts = [field.rsplit(".", 1)[-1] for field in point]
    parts = []
    for (field, value), last in zip(point.items(), lasts, strict=True):
        name = last if lasts.count(last) == 1 else field
        parts.append(f"{name}={value}")
    return re.sub(r"[^\w.,=+-]+", "_", ",".join(parts)) or "run"


def make_command(
    entrypoint: str, config: str, point: Mapping[str, str], workdir: Path, extra: Sequence[str]
) -> list[str]:
    """The command of one run; `extra` comes last, so it wins over the grid."""
    fields = [f"--config.{field}={value}" for field, value in point.items()]
    return [
        sys.executable,
        "-m",
        entrypoint,
        f"--config={config}",
        f"--workdir={workdir}",
        *fields,
        *extra,
    ]


def is_finished(workdir: Path, command: Sequence[str]) -> bool:
    """Whether this very command has ended well in this workdir before."""
    path = workdir / STATUS
    if not path.is_file():
        return False
    status = json.loads(path.read_text(encoding="utf-8"))
    # The interpreter and the folder may have moved meanwhile: only the arguments count.
    return status["returncode"] == 0 and _arguments(status["command"]) == _arguments(command)


def _arguments(command: Sequence[str]) -> list[str]:
    return [part for part in command[1:] if not part.startswith("--workdir=")]


def run_one(command: Sequence[str], workdir: Path) -> int:
    """Runs it with its output in the workdir's log; returns and records the exit code."""
    workdir.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with appending(workdir / LOG) as log:
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        done = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    status = {
        "command": list(command),
        "returncode": done.returncode,
        "seconds": time.time() - began,
    }
    write_text(workdir / STATUS, json.dumps(status, indent=2) + "\n")
    return done.returncode


@contextlib.contextmanager
def appending(path: Path) -> Iterator[IO[bytes]]:
    """A file that a process can write to, at the end of `path`; on a bucket it gets there when the process has ended."""
    if not is_remote(path):
        with open(path, "ab") as file:
            yield file
        return
    with tempfile.TemporaryFile() as file:
        yield file
        file.seek(0)
        kept = Appender(path)
        kept.write(file.read())
        kept.close()


def sweep(commands: Mapping[Path, Sequence[str]]) -> dict[Path, str]:
    """Runs every command that has not ended well before; returns workdir -> 'ok', 'kept' or 'failed'."""
    outcome: dict[Path, str] = {}
    for index, (workdir, command) in enumerate(commands.items(), 1):
        label = f"[{index}/{len(commands)}] {workdir.name}"
        if is_finished(workdir, command):
            print(f"{label}: finished before", flush=True)
            outcome[workdir] = "kept"
            continue
        print(f"{label} …", flush=True)
        began = time.time()
        code = run_one(command, workdir)
        outcome[workdir] = "failed" if code else "ok"
        said = f"failed with exit code {code}; see {workdir / LOG}" if code else "ok"
        print(f"{label}: {said} ({time.time() - began:.0f} s)", flush=True)
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    argv, extra = argv[:cut], argv[cut + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="as the entrypoint takes it")
    parser.add_argument("--workdir", required=True, help="the folder of all the runs' workdirs")
    parser.add_argument("--grid", action="append", default=[], metavar="FIELD=V,V", required=True)
    parser.add_argument("--entrypoint", default="jaxlm.pretrain", help="module to run")
    parser.add_argument("--dry_run", action="store_true", help="print the commands only")
    args = parser.parse_args(argv)
    try:
        grid = parse_grid(args.grid)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    root = as_path(args.workdir)
    commands = {}
    for point in points(grid):
        workdir = root / run_name(point)
        if workdir in commands:
            print(
                f"found: two points named {workdir.name}; change: values that differ in a letter or digit"
            )
            return 2
        commands[workdir] = make_command(args.entrypoint, args.config, point, workdir, extra)
    if args.dry_run:
        for command in commands.values():
            print(*command)
        return 0
    # subprocess.run ends its child when this process is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    outcome = sweep(commands)
    done = [w for w, how in outcome.items() if how != "failed" and (w / "metrics.jsonl").is_file()]
    if done:
        print("\n" + report([summarize(w, w.name) for w in done]))
    failed = [w for w, how in outcome.items() if how == "failed"]
    if failed:
        print(
            f"\n{len(failed)} of {len(commands)} runs failed:",
            *(f"  {w / LOG}" for w in failed),
            sep="\n",
        )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
