"""Pictures of a run, drawn from its metrics.jsonl: at the end of training and by tools/plot_run.py."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.files import absolute, as_path, write_whole
from jaxlm.training.metrics import read_metrics

# matplotlib takes a third of a second, so it is imported where something is drawn.
if TYPE_CHECKING:
    from matplotlib.figure import Figure


MOST_LINES = 2000  # of training that a curve shows; of longer runs neighbours are averaged
Runs = Mapping[str, list[dict[str, Any]]]  # name -> its `read_metrics`


def plot_run(workdir: str | Path) -> list[Path]:
    """Draws the `PICTURES` of one run into its `plots/`; returns what it wrote."""
    return plot_runs([workdir], as_path(workdir) / "plots")


def plot_runs(workdirs: Sequence[str | Path], output: str | Path) -> list[Path]:
    """Draws the runs over one another: all `PICTURES`.

    Returns the files written; none if no run has logged a step yet.

    Raises:
      FileNotFoundError: a workdir without metrics.jsonl.
    """
    runs = read_runs(workdirs)
    if not any(runs.values()):
        return []
    output = as_path(output)
    output.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        save_figure(draw(runs), output / name)
    return [output / name for name in PICTURES]


def read_runs(workdirs: Sequence[str | Path]) -> dict[str, list[dict[str, Any]]]:
    """The metrics of the runs by their names, thinned to what a picture can show."""
    lines = [read_metrics(workdir, most=MOST_LINES) for workdir in workdirs]
    return dict(zip(run_names(workdirs), lines, strict=True))


def plot_metric(
    workdirs: Sequence[str | Path], metric: str, output: str | Path, by: str = ""
) -> Path:
    """Draws one held-out metric of several runs: `output`/METRIC.png, which it returns.

    by: a field of their configs ('init', 'optimizer.learning_rate'): runs with one value of it have one colour, their
      mean a thick line and their name with the last mean and standard deviation. '': every run for itself.

    Raises:
      ValueError: if no run has the metric.
    """
    runs = read_runs(workdirs)
    curves = {name: series(lines, "eval", metric) for name, lines in runs.items()}
    curves = {name: curve for name, curve in curves.items() if curve[0]}
    if not curves:
        known = sorted(
            {key for ls in runs.values() for x in ls if x["split"] == "eval" for key in x}
        )
        raise ValueError(f"no run has the held-out metric {metric!r}; they have {', '.join(known)}")
    groups: dict[str, list[str]] = {}
    for name, workdir in zip(runs, workdirs, strict=True):
        if name in curves:
            label = f"{by}={read_field(workdir, by)}" if by else name
            groups.setdefault(label, []).append(name)
    figure, (axes,) = _figure(1, metric)
    for index, (label, names) in enumerate(groups.items()):
        _draw_group(axes, f"C{index % 10}", label, [curves[name] for name in names])
    axes.set_xlabel("step")
    axes.legend(fontsize="small")
    path = as_path(output) / f"{metric.replace('/', '_')}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
    return path


def _draw_group(axes: Any, color: str, label: str, curves: Sequence[Any]) -> None:
    for steps, values in curves:
        axes.plot(steps, values, color=color, alpha=0.4, linewidth=1, marker="o", markersize=2)
    shared = sorted(set.intersection(*(set(steps) for steps, _ in curves)))
    at = [dict(zip(*curve, strict=True)) for curve in curves]
    means = [statistics.mean(values[step] for values in at) for step in shared]
    last = [values[-1] for _, values in curves]
    spread = f" ± {statistics.stdev(last):.3f}, {len(last)} runs" if len(last) > 1 else ""
    label = f"{label}: {statistics.mean(last):.3f}{spread}"
    axes.plot(shared, means, color=color, linewidth=2.5, label=label)


def read_field(workdir: str | Path, field: str) -> Any:
    """The value of a dotted field in a run's config.json.

    Raises:
      ValueError: if it has none.
    """
    value = json.loads((as_path(workdir) / "config.json").read_text(encoding="utf-8"))
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"{workdir}/config.json has no field {field!r}")
        value = value[name]
    return value


def run_names(workdirs: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart: 'lr/a', 'wd/a' -> 'lr/a', 'wd/a'."""
    parts = [absolute(workdir).parts for workdir in workdirs]
    longest = max(map(len, parts), default=1)
    for depth in range(1, longest):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(p)} ({i})" for i, p in enumerate(parts)]


def save_figure(figure: Figure, path: Path) -> None:
    """A PNG, in one piece or not at all."""
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))


def draw_loss(runs: Runs) -> Figure:
    """Training loss as thin lines, held-out loss as marked ones, in nats, over the steps."""
    figure, (axes,) = _figure(1, "loss (nats per predicted token)")
    finite: list[float] = []
    for index, (name, lines) in enumerate(runs.items()):
        color = f"C{index % 10}"
        steps, losses = series(lines, "train", "loss")
        style = {"alpha": 0.45, "linewidth": 1, "marker": _marker(steps)}
        axes.plot(steps, losses, color=color, label=f"{name}: training", **style)
        finite += losses[len(losses) // 20 :]  # the first steps would squeeze the rest
        steps, losses = series(lines, "eval", "loss")
        if losses:
            label = f"{name}: held-out, best {min(losses):.3f}"
            axes.plot(steps, losses, color=color, marker="o", markersize=3, label=label)
            finite += losses
    if finite and max(finite) > min(finite):
        margin = 0.05 * (max(finite) - min(finite))
        axes.set_ylim(min(finite) - margin, max(finite) + margin)
    axes.set_xlabel("step")
    axes.legend(fontsize="small")
    return figure


def draw_throughput(runs: Runs) -> Figure:
    """Three panels over the steps: tokens per second, model FLOPs utilisation, time spent on input."""
    figure = draw_panels(
        runs,
        {
            "tokens_per_second": ("tokens/s", 1),
            "mfu": ("MFU (%)", 100),
            "input_wait": ("waiting for input (%)", 100),
        },
    )
    for axes in figure.axes:
        axes.set_ylim(bottom=0)
    return figure


def draw_optimization(runs: Runs) -> Figure:
    """Two panels over the steps: the learning rate, and the gradient's norm before clipping (logarithmic)."""
    figure = draw_panels(
        runs, {"learning_rate": ("learning rate", 1), "grad_norm": ("gradient norm", 1)}
    )
    figure.axes[1].set_yscale("log", nonpositive="mask")
    return figure


def draw_panels(runs: Runs, panels: Mapping[str, tuple[str, float]]) -> Figure:
    """A panel for each training metric -> (its label, what its values are multiplied by); a colour for each run."""
    figure, all_axes = _figure(len(panels), *(label for label, _ in panels.values()))
    for axes, (key, (_, scale)) in zip(all_axes, panels.items(), strict=True):
        for index, (name, lines) in enumerate(runs.items()):
            steps, values = series(lines, "train", key)
            scaled = [scale * value for value in values]
            style = {"color": f"C{index % 10}", "linewidth": 1, "marker": _marker(steps)}
            axes.plot(steps, scaled, label=name, **style)
    all_axes[0].legend(fontsize="small")
    all_axes[-1].set_xlabel("step")
    return figure


# File -> what draws it.
PICTURES: dict[str, Callable[[Runs], Figure]] = {
    "loss.png": draw_loss,
    "optimization.png": draw_optimization,
    "throughput.png": draw_throughput,
}


def _marker(steps: Sequence[int]) -> str:
    """A line through one point cannot be seen."""
    return "o" if len(steps) == 1 else ""


def series(lines: list[dict[str, Any]], split: str, key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric of one split; lines without it, or without a number, are left out."""
    points = [
        (line["step"], float(line[key]))
        for line in lines
        if line.get("split") == split and line.get(key) is not None
    ]
    points = [
        (step, value) for step, value in points if abs(value) != float("inf") and value == value
    ]
    return [step for step, _ in points], [value for _, value in points]


def _figure(panels: int, *labels: str) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    # Figure itself, not pyplot: no window system, no global state, safe in any thread.
    figure = Figure(figsize=(8, 2.4 + 2.2 * panels), layout="constrained")
    all_axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    for axes, label in zip(all_axes, labels, strict=True):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    return figure, all_axes
