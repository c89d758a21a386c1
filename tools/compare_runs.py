"""Compares runs: `python tools/compare_runs.py W1 W2 …`.

Prints which config fields differ, the final and best held-out metrics of each run, and mean ± sd over
the runs that differ in nothing but the seed.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxlm.files import as_path
from jaxlm.training.metrics import read_metrics, usual_mode
from jaxlm.training.plots import run_names

MAIN = (
    *("loss", "perplexity", "bits_per_byte", "accuracy", "f1_macro", "entity_f1", "semeval_f1"),
    *("exact_match", "f1", "spearman", "mrr"),
)


@dataclass(frozen=True)
class RunSummary:
    """One run: its flat config, and of each held-out metric the last and the best (value, step)."""

    name: str
    config: dict[str, Any]
    final: dict[str, tuple[float, int]]
    best: dict[str, tuple[float, int]]
    tokens_per_second: float  # median over the log lines
    seconds: float  # of training, of the process that ended the run


def summarize(workdir: str | Path, name: str = "") -> RunSummary:
    """Reads config.json and metrics.jsonl of a workdir."""
    lines = read_metrics(workdir)
    config = json.loads((as_path(workdir) / "config.json").read_text(encoding="utf-8"))
    final: dict[str, tuple[float, int]] = {}
    best: dict[str, tuple[float, int]] = {}
    for line in lines:
        if line["split"] != "eval":
            continue
        for key, value in line.items():
            if key in ("step", "split") or not isinstance(value, (int, float)):
                continue
            final[key] = (float(value), line["step"])
            if key not in best or is_better(key, value, best[key][0]):
                best[key] = (float(value), line["step"])
    train = [line for line in lines if line["split"] == "train"]
    speeds = [line["tokens_per_second"] for line in train if "tokens_per_second" in line]
    return RunSummary(
        name=name or str(workdir),
        config=flatten(config),
        final=final,
        best=best,
        tokens_per_second=statistics.median(speeds) if speeds else math.nan,
        seconds=float(train[-1].get("seconds", math.nan)) if train else math.nan,
    )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def is_better(metric: str, new: float, old: float) -> bool:
    """NaN is worse than everything."""
    if math.isnan(new) or math.isnan(old):
        return math.isnan(old) and not math.isnan(new)
    return new > old if usual_mode(metric) == "max" else new < old


def differing_fields(runs: Sequence[RunSummary]) -> dict[str, list[Any]]:
    """field -> its value in each run ('absent' where a run has none), for the fields that differ."""
    names = sorted({name for run in runs for name in run.config})
    rows = {name: [run.config.get(name, "absent") for run in runs] for name in names}
    return {name: row for name, row in rows.items() if any(v != row[0] for v in row)}


def seed_groups(runs: Iterable[RunSummary]) -> list[list[RunSummary]]:
    """Runs whose configs differ in nothing but `seed`, in the order given."""
    groups: dict[str, list[RunSummary]] = {}
    for run in runs:
        rest = {name: value for name, value in run.config.items() if name != "seed"}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(run)
    return list(groups.values())


def mean_sd(values: Sequence[float]) -> str:
    """'mean ± sd', with the sample standard deviation (n - 1); of one value, the value."""
    if len(values) == 1:
        return _number(values[0])
    return f"{_number(statistics.fmean(values))} ± {_number(statistics.stdev(values))}"


def report(runs: Sequence[RunSummary], metrics: Sequence[str] = ()) -> str:
    """The whole comparison as text."""
    known = {name for run in runs for name in run.final}
    metrics = list(metrics) or [name for name in MAIN if name in known]
    parts = []
    differing = differing_fields(runs)
    if len(runs) > 1:
        names = [run.name for run in runs]
        rows = [[field, *map(str, values)] for field, values in differing.items()]
        parts.append(
            "config fields that differ\n" + table([["field", *names], *rows])
            if rows
            else "config: all the same"
        )
    header = ["run", *(f"{m} {which}" for m in metrics for which in ("final", "best"))]
    rows = [
        [run.name, *_cells(run, metrics), f"{run.tokens_per_second:,.0f}", _number(run.seconds)]
        for run in runs
    ]
    parts.append(
        "held-out metrics: value @ step\n" + table([[*header, "tokens/s", "seconds"], *rows])
    )
    groups = [group for group in seed_groups(runs) if len(group) > 1]
    if groups:
        rows = []
        for group in groups:
            label = " ".join(
                f"{field}={group[0].config.get(field, 'absent')}"
                for field in differing
                if field != "seed"
            )
            seeds = ",".join(str(run.config.get("seed")) for run in group)
            rows.append([label or "all", f"{len(group)} ({seeds})", *_group_cells(group, metrics)])
        parts.append("mean ± sd over seeds\n" + table([["runs", "n (seeds)", *header[1:]], *rows]))
    return "\n\n".join(parts)


def _cells(run: RunSummary, metrics: Sequence[str]) -> list[str]:
    cells = []
    for metric in metrics:
        for values in (run.final, run.best):
            found = values.get(metric)
            cells.append(f"{_number(found[0])} @ {found[1]}" if found else "-")
    return cells


def _group_cells(group: Sequence[RunSummary], metrics: Sequence[str]) -> list[str]:
    cells = []
    for metric in metrics:
        for which in ("final", "best"):
            found = [getattr(run, which).get(metric) for run in group]
            cells.append(mean_sd([pair[0] for pair in found]) if all(found) else "-")
    return cells


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to equal width; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", metavar="W", help="workdir of a run")
    parser.add_argument(
        "--metrics",
        default="",
        help="held-out metrics to show, with commas; default: " + ",".join(MAIN),
    )
    args = parser.parse_args(argv)
    missing = [
        str(as_path(workdir) / name)
        for workdir in args.workdirs
        for name in ("config.json", "metrics.jsonl")
        if not (as_path(workdir) / name).is_file()
    ]
    if missing:
        print(
            f"found: no {', no '.join(missing)}\nexpected: the workdirs of runs\n"
            "change: name the --workdir of each run",
            file=sys.stderr,
        )
        return 2
    names = run_names(args.workdirs)
    runs = [summarize(workdir, name) for workdir, name in zip(args.workdirs, names, strict=True)]
    wanted = [name for name in args.metrics.split(",") if name]
    known = sorted({name for run in runs for name in run.final})
    unknown = [name for name in wanted if name not in known]
    if unknown:
        print(
            f"found: --metrics {','.join(unknown)}; expected: of {', '.join(known)}",
            file=sys.stderr,
        )
        return 2
    print(report(runs, wanted))
    return 0


if __name__ == "__main__":
    sys.exit(main())
