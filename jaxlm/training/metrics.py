"""Metrics as (total, weight) pairs: summed over steps and devices, divided once, written to files."""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxlm.files import Appender, as_path, is_remote, write_text

# Of these the last value says more than the mean over the steps between two log lines.
LAST = ("learning_rate", "param_norm")
LESS_IS_BETTER = (
    "loss",
    "nll",
    "perplexity",
    "bits_per_byte",
    "mse",
    "dropped",
    "router",
)  # in a name


class MetricSums:
    """Running sums of (total, weight) pairs by name."""

    def __init__(self, sums: Mapping[str, Iterable[float]] | None = None):
        self.sums = {name: list(map(float, pair)) for name, pair in (sums or {}).items()}

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Adds the metrics of a step; of those in LAST the newest value counts."""
        for name, (total, weight) in jax.device_get(dict(metrics)).items():
            old_total, old_weight = (
                self.sums.get(name, (0.0, 0.0)) if name not in LAST else (0.0, 0.0)
            )
            self.sums[name] = [old_total + float(total), old_weight + float(weight)]

    def means(self) -> dict[str, float]:
        """name -> total / weight; a metric without any weight is left out rather than called 0."""
        return {name: total / weight for name, (total, weight) in self.sums.items() if weight}

    def copy(self) -> dict[str, list[float]]:
        """The sums as a JSON value of their own, from which the constructor makes them again."""
        return {name: list(pair) for name, pair in self.sums.items()}

    def merge(self, other: "MetricSums") -> None:
        """Adds the sums of another part of the same steps."""
        for name, (total, weight) in other.sums.items():
            mine = self.sums.setdefault(name, [0.0, 0.0])
            mine[0] += total
            mine[1] += weight


def one_behind(launched: Iterable[Any]) -> Iterator[Any]:
    """The same items, each only after the next one is made: reading one never waits for the step just launched."""
    pending: list[Any] = []
    for item in launched:
        yield from pending
        pending = [item]
    yield from pending


def with_perplexity(means: dict[str, float]) -> dict[str, float]:
    """Adds `perplexity` = exp(mean nats per token); infinite past float range instead of an error."""
    if "nll" not in means:
        return means
    return means | {"perplexity": math.exp(means["nll"]) if means["nll"] < 700 else math.inf}


class MetricWriter:
    """Appends to `metrics.jsonl`, TensorBoard and, if asked, Weights & Biases.

    On opening, lines after `start_step` are dropped: they belong to steps that a resumed run does again. So is the evaluation
    of that step, if `evaluation_left` says that it is made again. Only process 0 writes.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        start_step: int = 0,
        evaluation_left: bool = False,
        tensorboard: bool = True,
        wandb: bool = False,
        config: Mapping | None = None,
    ):
        self.is_writer = jax.process_index() == 0
        workdir = as_path(workdir)
        self.path = workdir / "metrics.jsonl"
        self._tensorboard = self._wandb = None
        if not self.is_writer:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        drop_after(self.path, start_step, evaluation_left=evaluation_left)
        self._file = Appender(self.path)
        if tensorboard:
            self._tensorboard = _open_tensorboard(workdir, start_step + 1)
        if wandb:
            self._wandb = _start_wandb(workdir, config)

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; numbers also go to the other writers as `split/name`."""
        if not self.is_writer:
            return
        line = {"step": step, "split": split, **values}
        self._file.write(f"{json.dumps(line)}\n".encode())
        numbers = {f"{split}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
        if self._tensorboard:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def write_text(self, step: int, name: str, text: str) -> None:
        """A text for TensorBoard."""
        if self.is_writer and self._tensorboard:
            self._tensorboard.add_text(name, text, step)

    def flush(self) -> None:
        """On return metrics.jsonl has every line, on a bucket, too: a checkpoint is saved after the lines before it."""
        if self.is_writer:
            self._file.flush()

    def close(self) -> None:
        """Closes all that it writes to."""
        if not self.is_writer:
            return
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def usual_mode(metric: str) -> str:
    """'min' or 'max': what the best value of a metric is, by its name ('mlm_loss', 'text/bits_per_byte', 'rouge1')."""
    return "min" if any(part in metric.rsplit("/", 1)[-1] for part in LESS_IS_BETTER) else "max"


def drop_after(path: str | Path, step: int, *, evaluation_left: bool = False) -> None:
    """Removes the lines of a JSON-lines file whose `step` is larger, and a line cut off by a kill; atomically.

    evaluation_left: also those of the evaluation of `step`, which are all that are not of split 'train'.
    """
    path = as_path(path)
    if not path.exists():
        return
    kept = []
    with path.open(encoding="utf-8") as lines:  # not splitlines(): samples have U+2028 inside
        for line in lines:
            if not line.endswith("\n"):
                continue
            content = json.loads(line)
            again = evaluation_left and content.get("split") != "train"
            if content["step"] <= step - again:
                kept.append(line)
    write_text(path, "".join(kept))


def read_metrics(workdir: str | Path, most: int = 0) -> list[dict]:
    """All lines of a run's metrics.jsonl, but not a last one that a kill cut off or a run still writes.

    most: the number of training lines above which neighbours are averaged, so that about so many are left; 0: no limit.
    """
    path, group = as_path(workdir) / "metrics.jsonl", 1
    if most:
        with path.open(encoding="utf-8") as lines:
            group = max(1, math.ceil(sum(1 for _ in lines) / most))
    with path.open(encoding="utf-8") as lines:
        parsed = (json.loads(line) for line in lines if line.endswith("\n"))
        return list(averaged(parsed, group))


def averaged(lines: Iterable[dict], group: int) -> Iterator[dict]:
    """Of `group` training lines in a row one: the means of their finite numbers, at the last one's step. Others stay."""
    window: list[dict] = []
    for line in lines:
        if group == 1 or line["split"] != "train":
            yield line
            continue
        window.append(line)
        if len(window) == group:
            yield _mean_line(window)
            window = []
    if window:
        yield _mean_line(window)


def _mean_line(lines: list[dict]) -> dict:
    values: dict[str, list[float]] = {}
    for line in lines:
        for key, value in line.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                values.setdefault(key, []).append(value)
    means = {key: statistics.fmean(found) for key, found in values.items()}
    return {**lines[-1], **means, "step": lines[-1]["step"]}


def _open_tensorboard(workdir: Path, purge_step: int):
    from tensorboardX import SummaryWriter, record_writer

    if is_remote(
        workdir
    ):  # its own writer needs another package and other credentials than the rest of the run
        record_writer.register_writer_factory("gs", _BucketEvents())
    return SummaryWriter(str(workdir), purge_step=purge_step)


class _BucketEvents:
    """How tensorboardX opens a file of events on a bucket."""

    open = Appender

    def directory_check(self, path: str) -> None:
        """A bucket has no folders to make."""


def _start_wandb(workdir, config):
    try:
        import wandb
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("log.wandb=True needs pip install 'jaxlm[wandb]'") from e
    return wandb.init(dir=str(workdir), config=dict(config or {}), resume="allow")
