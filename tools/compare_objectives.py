"""Which objective is worth pretraining with? One small model by each of six, for equal tokens, then two tasks, three seeds:

    python tools/compare_objectives.py --work=runs/objectives [--jobs=2]

For every objective and seed: `configs/objectives.py:OBJECTIVE` is pretrained on the running Python's standard library, and
fine-tuned for `package` (classification) and `tokens` (tagging) of `configs/finetune/demo.py`; `random` is fine-tuned from
no checkpoint, in the shapes of the first objective's. WORK has a workdir for each run; the same command again does only
what is not there. At the end it prints a table (test scores of the best checkpoint by development score, mean and standard
deviation over seeds) and draws WORK/objectives.png. --jobs runs at a time (default: one for each core). Flags after `--` go
to every pretraining run; a WORK that has runs with other ones is refused.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxlm.files import write_text
from jaxlm.training.plots import save_figure
from tools.compare_runs import mean_sd, table
from tools.sweep import is_finished, make_command, run_one

OBJECTIVES = ("mlm", "rtd", "causal", "prefix_lm", "span_corruption", "denoising")
RANDOM = "random"  # what is fine-tuned without pretraining
TASKS = {"package": "accuracy", "tokens": "accuracy"}  # the demo's tasks and what each is scored by
# One epoch of `package` is 79 steps: too few to change pretrained weights much, so random ones, which are smaller, were ahead.
ARGUMENTS = {"package": "seq_len=128,num_epochs=4", "tokens": "seq_len=128"}


@dataclasses.dataclass(frozen=True)
class Study:
    """Where the runs are and what they are told.

    pretrain_flags, finetune_flags: `--config.…=…` for each. first: the objective whose shapes RANDOM's weights have.
    """

    work: Path
    pretrain_flags: tuple[str, ...] = ()
    finetune_flags: tuple[str, ...] = ()
    first: str = OBJECTIVES[0]

    def pretraining(self, objective: str, seed: int) -> Path:
        return self.work / "pretraining" / f"{objective}-{seed}"

    def finetuning(self, objective: str, task: str, seed: int) -> Path:
        return self.work / task / f"{objective}-{seed}"

    @property
    def store(self) -> Path:
        return self.work / "data" / "store"

    def preparation(self) -> list[tuple[Path, list[str]]]:
        """(workdir, command) of what all objectives read: one tokenizer, with sentinels, and one token store."""
        data = self.work / "data"
        tokenizer = f"{data / 'tokenizer'}"
        sizes = ["--vocab_size=2048", "--num_sentinels=32"]
        train = ["tools/train_tokenizer.py", "--sources=stdlib", *sizes, f"--output={tokenizer}"]
        tokenize = ["tools/prepare_data.py", "--sources=stdlib", f"--tokenizer={tokenizer}"]
        return [
            (data / "log-tokenizer", [sys.executable, *train]),
            (data / "log-store", [sys.executable, *tokenize, f"--output={self.store}"]),
        ]

    def chain(self, objective: str, seed: int) -> list[tuple[Path, list[str]]]:
        """(workdir, command) of the runs of one objective and seed, each of which needs the first."""
        base = self.pretraining(self.first if objective == RANDOM else objective, seed)
        point = {"seed": str(seed)}
        commands = []
        if objective != RANDOM:
            config = f"configs/objectives.py:{objective}"
            flags = [f"--config.data.sources=('stdlib={self.store}',)", *self.pretrain_flags]
            command = make_command("jaxlm.pretrain", config, point, base, flags)
            commands.append((base, command))
        for task in TASKS:
            workdir = self.finetuning(objective, task, seed)
            flags = [f"--config.init_from={base}", *self.finetune_flags]
            if objective == RANDOM:
                flags.append("--config.init=random")
            config = f"configs/finetune/demo.py:{task},{ARGUMENTS[task]}"
            command = make_command("jaxlm.finetune", config, point, workdir, flags)
            commands.append((workdir, command))
        return commands


def keep_flags(study: Study) -> None:
    """Writes the flags of pretraining to WORK/study.json. A fine-tuning that has ended is not run again because its
    pretraining was, so other flags would leave old scores in the table.

    Raises:
      ValueError: if the study in WORK has other ones.
    """
    path, flags = study.work / "study.json", list(study.pretrain_flags)
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))["pretrain_flags"]
        if kept != flags:
            raise ValueError(
                f"found: {study.work} holds a study with the flags {kept}; expected: {flags}; change: take another --work"
            )
    study.work.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"pretrain_flags": flags}) + "\n")


def run_chain(commands: Sequence[tuple[Path, list[str]]]) -> list[Path]:
    """Runs what has not ended well before, in order; returns the workdirs that failed. After a failure the rest waits."""
    for workdir, command in commands:
        if is_finished(workdir, command):
            continue
        print(f"{workdir.parent.name}/{workdir.name} …", flush=True)
        if code := run_one(command, workdir):
            print(f"{workdir}: exit code {code}; see {workdir / 'sweep.log'}", flush=True)
            return [workdir]
    return []


def run_all(study: Study, objectives: Sequence[str], seeds: Sequence[int], jobs: int) -> list[Path]:
    """Every chain, `jobs` at a time; returns the workdirs that failed. Random weights have the shapes of the first objective's
    checkpoint, so they come last."""
    if failed := run_chain(study.preparation()):
        return failed
    waves = [[o for o in objectives if o != RANDOM], [o for o in objectives if o == RANDOM]]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for wave in waves:
            chains = [study.chain(objective, seed) for seed in seeds for objective in wave]
            for broken in pool.map(run_chain, chains):
                failed += broken
    return failed


def score(workdir: Path, metric: str) -> float | None:
    """The test score in report.json, or None if the run has not ended."""
    path = workdir / "report.json"
    if not path.is_file():
        return None
    return float(json.loads(path.read_text(encoding="utf-8"))["test"][metric])


def scores(
    study: Study, objectives: Sequence[str], seeds: Sequence[int]
) -> dict[str, dict[str, list[float]]]:
    """{objective: {task: the scores of the seeds that are there}}."""
    found: dict[str, dict[str, list[float]]] = {}
    for objective in objectives:
        found[objective] = {}
        for task, metric in TASKS.items():
            values = [score(study.finetuning(objective, task, seed), metric) for seed in seeds]
            found[objective][task] = [value for value in values if value is not None]
    return found


def pretraining_seconds(study: Study, objective: str, seeds: Sequence[int]) -> list[float]:
    """Wall seconds of each seed's pretraining, compilation included."""
    seconds = []
    for seed in seeds:
        path = study.pretraining(objective, seed) / "sweep.json"
        if path.is_file():
            seconds.append(float(json.loads(path.read_text(encoding="utf-8"))["seconds"]))
    return seconds


def make_table(study: Study, found: Mapping[str, Mapping[str, list[float]]], seeds) -> str:
    rows = [["objective", *(f"{t} {m}" for t, m in TASKS.items()), "seeds", "pretraining (s)"]]
    for objective, tasks in found.items():
        seconds = [] if objective == RANDOM else pretraining_seconds(study, objective, seeds)
        cells = [mean_sd(values) if values else "-" for values in tasks.values()]
        count = str(min(len(values) for values in tasks.values()))
        rows.append([objective, *cells, count, mean_sd(seconds) if seconds else "-"])
    return table(rows)


def draw(found: Mapping[str, Mapping[str, list[float]]], path: Path) -> None:
    """A panel for each task: a dot for each seed and a line at their mean, objectives side by side."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        for at, tasks in enumerate(found.values()):
            values = tasks[task]
            if values:
                mean = sum(values) / len(values)
                axes.plot([at] * len(values), values, "o", color=f"C{at}", alpha=0.6, markersize=4)
                axes.hlines(mean, at - 0.3, at + 0.3, color=f"C{at}", linewidth=2.5)
        axes.set_xticks(range(len(found)), list(found), rotation=30, ha="right")
        axes.set_ylabel(f"{task}: test {TASKS[task]}")
        axes.grid(alpha=0.3, axis="y")
    save_figure(figure, path)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    argv = list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", required=True, type=Path, help="the folder of all runs")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--objectives", default=",".join((*OBJECTIVES, RANDOM)))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--finetune_flag", action="append", default=[], metavar="--config.X=Y")
    args = parser.parse_args(argv[:cut])
    args.pretrain_flags = argv[cut + 1 :]
    args.objectives = args.objectives.split(",")
    if unknown := set(args.objectives) - {*OBJECTIVES, RANDOM}:
        parser.error(
            f"found: {sorted(unknown)}; expected: some of {', '.join((*OBJECTIVES, RANDOM))}"
        )
    if args.objectives == [RANDOM]:
        parser.error(
            f"found: {RANDOM} alone, which has the shapes of another objective's checkpoint; expected: one more of "
            f"{', '.join(OBJECTIVES)}"
        )
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    first = next(objective for objective in args.objectives if objective != RANDOM)
    study = Study(
        args.work.absolute(), tuple(args.pretrain_flags), tuple(args.finetune_flag), first
    )
    try:
        keep_flags(study)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    failed = run_all(study, args.objectives, args.seeds, args.jobs)
    found = scores(study, args.objectives, args.seeds)
    text = make_table(study, found, args.seeds)
    (study.work / "table.txt").write_text(text + "\n", encoding="utf-8")
    draw(found, study.work / "objectives.png")
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
