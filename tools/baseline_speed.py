"""Real tokens per second of jaxlm and of `transformers.Trainer` on the rows of tools/baselines.py, side by side.

    python tools/baseline_speed.py --work=runs/baselines --dataset=clinc150 --batch_sizes=32,64 --steps=20 --turns=5

Each side trains at each batch size in a process of its own (in one, their thread pools would disturb each other). The
processes take turns: each does --steps steps and then waits until all others have done theirs. The first turn, with
compilation, is not counted. Padding is not counted either: a token is real, or it is none. The line that WORK's
results.jsonl gets has every turn, and the ratio of each side's best batch size by the median of its turns.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import baselines
from tools.baseline_data import DATASETS, read_rows, write_splits
from tools.compare_runs import table
from tools.trainer_baseline import Clock, Settings, make_trainer

ROOT = Path(__file__).resolve().parents[1]

Turn = tuple[int, float]  # real tokens, seconds
# Called when a turn is over with what it took; returns when the next one may begin.
Wait = Callable[[Turn], None]


# --- a side, in its process -------------------------------------------------------------------------------------------


def train_ours(
    run: baselines.Run, files: Mapping[str, Path], model: str, workdir: Path, steps: int, wait: Wait
) -> None:
    """Trains through the loop that users run, `steps` steps a turn, until the run ends."""
    from jaxlm import config_files, tuning
    from jaxlm.host import keep_freed_memory
    from jaxlm.training.loop import Intervals, Loop, Work

    keep_freed_memory()
    fields = baselines.our_fields(run, files, model)
    config = config_files.read_config(str(ROOT / DATASETS[run.dataset].config), fields)
    prepared = tuning.prepare(config, workdir)
    task_run = tuning.make_run(prepared, workdir)
    state = tuning.initial_state(task_run, prepared.source)
    device_batches, batches = task_run.device_batches(0), task_run.train_batches
    for first in range(0, task_run.config.num_train_steps - steps, steps):
        began = time.perf_counter()
        loop = Loop(
            train_step=task_run.train_step,
            num_train_steps=first + steps,
            intervals=Intervals(0, 0, 0),
            work=Work(task_run.step_tokens, task_run.step_flops, 1.0),
            progress=False,
        )
        state = loop.fit(state, device_batches)
        seconds = time.perf_counter() - began
        ids = [i for k in range(first, first + steps) for i in batches.ids(k)]
        wait((int(batches.examples.lengths[ids].sum()), seconds))


def train_theirs(
    run: baselines.Run, files: Mapping[str, Path], model: str, workdir: Path, steps: int, wait: Wait
) -> None:
    """Trains a `transformers.Trainer`, which waits after every `steps` steps."""
    import transformers

    settings = Settings(**run.settings)
    rows = read_rows(files["train"])
    trainer, _ = make_trainer(DATASETS[run.dataset].task, model, rows, settings, workdir)
    clock, before = Clock(), [0]

    class Turns(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **other):
            clock.start()

        def on_step_end(self, args, state, control, **other):
            if state.global_step % steps:
                return
            clock.stop()
            wait((int(state.num_input_tokens_seen) - before[0], clock.seconds))
            before[0], clock.seconds = int(state.num_input_tokens_seen), 0.0
            clock.start()

    trainer.add_callback(Turns())
    trainer.train()


TRAIN = {"ours": train_ours, "theirs": train_theirs}


def work(spec: Mapping[str, Any]) -> None:
    """The process of a side: a line on stdin begins a turn, and a line [tokens, seconds] on stdout ends it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes where errors go

    def next_turn() -> None:
        if not sys.stdin.readline():
            raise SystemExit  # no turn will come any more

    def wait(turn: Turn) -> None:
        print(json.dumps(turn), file=answers, flush=True)
        next_turn()

    run = baselines.Run(**spec["run"])
    files = {split: Path(path) for split, path in spec["files"].items()}
    next_turn()
    TRAIN[run.side](run, files, spec["model"], Path(spec["workdir"]), spec["steps"], wait)


# --- turns ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def start_worker(spec: Mapping[str, Any], log: Path) -> Iterator[Callable[[], Turn]]:
    """A process for `work`; gives what makes it do one turn."""
    command = [sys.executable, str(Path(__file__).resolve()), f"--worker={json.dumps(spec)}"]
    with (
        open(log, "w", encoding="utf-8") as errors,
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None

        def turn() -> Turn:
            process.stdin.write("\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"no turn came of {spec['run']['side']}; see {log}")
            tokens, seconds = json.loads(line)
            return tokens, seconds

        yield turn  # then its stdin is closed, and it ends


def take_turns(turns: Mapping[str, Callable[[], Turn]], count: int) -> dict[str, list[float]]:
    """Real tokens per second of `count` turns of each, one after the other; a first round is left out."""
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(count + 1):
        for name, turn in turns.items():
            tokens, seconds = turn()
            if number:
                speeds[name].append(tokens / seconds)
    return speeds


def measure(
    dataset: str,
    batch_sizes: Sequence[int],
    files: Mapping[str, Path],
    model: str,
    folder: Path,
    steps: int,
    turns: int,
) -> dict[str, Any]:
    """The line of a measurement: the speed of every side and batch size, turn by turn, and the ratio of the best.

    Raises:
      RuntimeError: if a process ends before its turns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = {
        f"{run.side}-{run.settings['batch_size']}": run
        for size in batch_sizes
        for run in baselines.make_runs(
            [dataset], baselines.SIDES, [0], dict.fromkeys(baselines.SIDES, {"batch_size": size})
        )
    }
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, run in runs.items():
            spec = {
                "run": dataclasses.asdict(run),
                "files": {split: str(path) for split, path in files.items()},
                "model": model,
                "workdir": str((folder / name).resolve()),
                "steps": steps,
            }
            workers[name] = stack.enter_context(start_worker(spec, folder / f"{name}.log"))
        speeds = take_turns(workers, turns)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    best = {
        side: max(
            (name for name, run in runs.items() if run.side == side), key=lambda name: medians[name]
        )
        for side in baselines.SIDES
    }
    return {
        "benchmark": "speed",
        "dataset": dataset,
        "settings": {name: run.settings for name, run in runs.items()},
        "steps": steps,
        "tokens_per_second": speeds,
        "medians": medians,
        "ratio": medians[best["ours"]] / medians[best["theirs"]],
        **baselines.environment(),
    }


def show(line: Mapping[str, Any]) -> str:
    header = ["side and batch size", "real tokens/s", "least", "most"]
    rows = [
        [name, *(f"{v:,.0f}" for v in (line["medians"][name], min(speeds), max(speeds)))]
        for name, speeds in line["tokens_per_second"].items()
    ]
    return (
        table([header, *rows]) + f"\neach at its best batch size: ours / theirs {line['ratio']:.2f}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    baselines.add_places(parser)
    parser.add_argument("--dataset", choices=list(DATASETS), default="clinc150")
    parser.add_argument("--batch_sizes", default="32,64", help="with commas; each for both sides")
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    parser.add_argument("--turns", type=int, default=5, help="of each that are counted")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(json.loads(args.worker))
        return 0
    try:
        sizes = [int(size) for size in args.batch_sizes.split(",")]
        if problems := baselines.missing(args.model):
            raise ValueError("\n".join(problems))
        files = write_splits(args.dataset, args.data, (args.work / "data").resolve())
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    folder = args.work / "speed" / args.dataset
    line = measure(args.dataset, sizes, files, args.model, folder, args.steps, args.turns)
    baselines.add_result(args.work / "results.jsonl", line)
    print(show(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
