"""Pictures of a run, drawn from its metrics.jsonl: at the end of training and by tools/plot_run.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from jaxlm.training.metrics import read_metrics


def plot_run(workdir: str | Path) -> list[Path]:
    """Draws `plots/loss.png` and `plots/throughput.png` of one run; returns what it wrote."""
    return plot_runs([workdir], Path(workdir) / "plots")


def plot_runs(workdirs: Sequence[str | Path], output: str | Path) -> list[Path]:
    """Draws the runs over one another: loss.png (training and held-out loss) and throughput.png.

    Returns the files written; none if no run has logged a step yet.

    Raises:
      FileNotFoundError: a workdir without metrics.jsonl.
    """
    runs = dict(zip(run_names(workdirs), map(read_metrics, workdirs), strict=True))
    if not any(runs.values()):
        return []
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    pictures = {"loss.png": draw_loss(runs), "throughput.png": draw_throughput(runs)}
    for name, figure in pictures.items():
        figure.savefig(output / name, dpi=120)
    return [output / name for name in pictures]


def run_names(workdirs: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart: 'lr/a', 'wd/a' -> 'lr/a', 'wd/a'."""
    parts = [Path(workdir).resolve().parts for workdir in workdirs]
    longest = max(map(len, parts), default=1)
    for depth in range(1, longest):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(p)} ({i})" for i, p in enumerate(parts)]


def draw_loss(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Training loss as thin lines, held-out loss as marked ones, in nats, over the steps."""
    figure, (axes,) = _figure(1, "loss (nats per predicted token)")
    finite: list[float] = []
    for index, (name, lines) in enumerate(runs.items()):
        color = f"C{index % 10}"
        steps, losses = series(lines, "train", "loss")
        axes.plot(steps, losses, color=color, alpha=0.45, linewidth=1, label=f"{name}: training")
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


def draw_throughput(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Three panels over the steps: tokens per second, model FLOPs utilisation, time spent on input."""
    panels = {
        "tokens_per_second": ("tokens/s", 1),
        "mfu": ("MFU (%)", 100),
        "input_wait": ("waiting for input (%)", 100),
    }
    figure, all_axes = _figure(len(panels), *(label for label, _ in panels.values()))
    for axes, (key, (_, scale)) in zip(all_axes, panels.items(), strict=True):
        for index, (name, lines) in enumerate(runs.items()):
            steps, values = series(lines, "train", key)
            scaled = [scale * value for value in values]
            axes.plot(steps, scaled, color=f"C{index % 10}", linewidth=1, label=name)
        axes.set_ylim(bottom=0)
    all_axes[0].legend(fontsize="small")
    all_axes[-1].set_xlabel("step")
    return figure


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
    # Figure itself, not pyplot: no window system, no global state, safe in any thread.
    figure = Figure(figsize=(8, 2.4 + 2.2 * panels), layout="constrained")
    all_axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    for axes, label in zip(all_axes, labels, strict=True):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    return figure, all_axes
