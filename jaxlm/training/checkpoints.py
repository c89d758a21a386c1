"""Orbax checkpoints of a run: `checkpoints/<step>/` with the items params, ema, frozen, opt_state and manifest.

`params` (and `ema`, where the run averages) stand alone, so that fine-tuning, evaluation and export read them without
knowing which optimizer made them; where a part of the parameters did not train, it is in `frozen`, and together they
are the model's. `opt_state` holds every other array of the state. `manifest` is JSON.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from jaxlm.files import absolute, as_path, is_remote
from jaxlm.parallel.mesh import path_names
from jaxlm.training import partition
from jaxlm.training.state import TrainState

PyTree = Any


class Checkpoints:
    """The checkpoints of one workdir: saved in the background, restored exactly.

    Args:
      workdir: the run's folder.
      keep_last: how many of the newest to keep.
      keep_every: also keep each multiple of this step; 0 keeps none for that reason.
      best_metric: also keep the best by this evaluation metric; '' keeps none for that reason.
      best_mode: 'min' or 'max'.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        best_metric: str = "",
        best_mode: str = "min",
    ):
        self.directory = absolute(workdir) / "checkpoints"
        self.best_metric = best_metric
        policies: list[Any] = [managers.LatestN(keep_last)]
        options = {"enable_async_checkpointing": True}
        if keep_every:
            policies.append(managers.EveryNSteps(keep_every))
        if best_metric:
            if best_mode not in ("min", "max"):
                raise ValueError(f"checkpoint.best_mode {best_mode!r} must be 'min' or 'max'")
            value = lambda metrics: metrics[best_metric]
            policies.append(
                managers.BestN(
                    get_metric_fn=value,
                    n=1,
                    reverse=best_mode == "min",
                    keep_checkpoints_without_metrics=False,
                )
            )
            # Without best_fn a reopened manager does not read the metrics back and drops the best.
            options |= {"best_fn": value, "best_mode": best_mode}
        options["preservation_policy"] = managers.AnyPreservationPolicy(policies)
        self._manager = ocp.CheckpointManager(
            self.directory, options=ocp.CheckpointManagerOptions(**options)
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the best metric so far; the newest one if none competed."""
        return self._manager.best_step() if self.best_metric else self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, manifest: dict, metrics: dict[str, float] | None
    ) -> None:
        """Starts to save; returns when the arrays are copied off the devices.

        `metrics` are those of the evaluation at this very step (None: the step does not compete for best).
        """
        competes = bool(self.best_metric) and metrics is not None
        if competes and self.best_metric not in metrics:
            raise ValueError(
                f"checkpoint.best_metric {self.best_metric!r} is not among the evaluation metrics "
                f"{sorted(metrics)}"
            )
        items = {name: ocp.args.StandardSave(tree) for name, tree in split_state(state).items()}
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(**items, manifest=ocp.args.JsonSave(manifest)),
            metrics={self.best_metric: metrics[self.best_metric]} if competes else None,
        )
        if not saved:
            raise RuntimeError(
                f"Orbax refused to save step {step} into {self.directory}, where the newest step is "
                f"{self.latest_step()}: two runs may be writing to one workdir"
            )

    def wait(self) -> None:
        """Blocks until what was saved is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        self._manager.close()


def split_state(state: TrainState) -> dict[str, PyTree]:
    """The array items of a checkpoint: params, ema and frozen if there are any, and opt_state with all the rest."""
    rest = {
        "step": state.step,
        "opt_state": state.opt_state,
        "plateau": state.plateau,
        "skipped": state.skipped,
    }
    items = {"params": state.params, "opt_state": rest, "ema": state.ema, "frozen": state.frozen}
    return {name: tree for name, tree in items.items() if tree is not None}


def evaluated_item(step_dir: Path) -> str:
    """The parameters that evaluation and use take: 'ema' where the run averaged them, else 'params'."""
    return "ema" if (step_dir / "ema").is_dir() else "params"


def restore_state(step_dir: Path, abstract_state: TrainState) -> TrainState:
    """The whole state of one checkpoint, placed by the shardings of `abstract_state`.

    Raises:
      ValueError: a repair list, if the stored names, shapes or dtypes are others.
    """
    loaded = _load(step_dir, split_state(abstract_state))
    rest = loaded["opt_state"]
    parts = {name: loaded.get(name) for name in ("params", "ema", "frozen")}
    return abstract_state.replace(**parts, **rest)


def load_item(step_dir: Path, abstract_tree: PyTree, item: str = "params") -> PyTree:
    """One item of a checkpoint, with exactly the names, shapes and dtypes of `abstract_tree`.

    What the item lacks because it did not train comes from `frozen`, so the whole model's parameters are loaded in the
    same way whatever part of them was trained.

    Raises:
      ValueError: a repair list, if the stored arrays are others.
    """
    items = {item: abstract_tree}
    if (step_dir / item).is_dir() and (step_dir / "frozen").is_dir():
        own = stored_arrays(step_dir / item)
        items[item], rest = partition.split(abstract_tree, lambda path: path in own)
        items |= {"frozen": rest} if rest else {}
    loaded = _load(step_dir, items)
    return partition.join(loaded.pop(item), loaded.get("frozen"))


def load_tree(step_dir: Path, item: str, like: PyTree) -> PyTree:
    """One item of a checkpoint whole, whatever is in it, together with what did not train.

    like: ShapeDtypeStructs with shardings; an array of the same path and shape gets its sharding, any other array the
    sharding of a scalar on the same devices.
    """
    leaves = {"/".join(path_names(p)): x for p, x in jax.tree_util.tree_leaves_with_path(like)}
    mesh = next(iter(leaves.values())).sharding.mesh
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(path, x):
        twin = leaves.get("/".join(path_names(path)))
        sharding = twin.sharding if twin is not None and twin.shape == x.shape else replicated
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    checkpointer = ocp.StandardCheckpointer()
    trees = []
    for folder in (step_dir / item, step_dir / "frozen"):
        if folder.is_dir():
            stored = checkpointer.metadata(folder).item_metadata
            wanted = jax.tree_util.tree_map_with_path(place, stored)
            trees.append(checkpointer.restore(folder, wanted))
    return partition.join(trees[0], trees[1] if len(trees) > 1 else None)


def read_manifest(step_dir: Path) -> dict:
    """What the run wrote about itself when it saved this checkpoint."""
    return json.loads((step_dir / "manifest" / "metadata").read_text(encoding="utf-8"))


def _load(step_dir: Path, items: dict[str, PyTree]) -> dict[str, PyTree]:
    # Orbax casts dtypes in silence, so they are compared here, too.
    problems = [line for name, tree in items.items() for line in mismatches(step_dir / name, tree)]
    if problems:
        raise ValueError(
            f"{step_dir} does not fit this model and optimizer:\n" + "\n".join(problems)
        )
    checkpointer = ocp.StandardCheckpointer()
    return {name: checkpointer.restore(step_dir / name, tree) for name, tree in items.items()}


def stored_arrays(item: Path) -> dict[str, str]:
    """Path -> 'float32[8, 4]' of every array in the folder of an item."""
    return describe(ocp.StandardCheckpointer().metadata(item).item_metadata)


def describe(tree: PyTree) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(path_names(p)): f"{np.dtype(x.dtype).name}{list(x.shape)}" for p, x in leaves}


def mismatches(item: Path, wanted_tree: PyTree) -> list[str]:
    """Where the arrays stored in `item` differ from `wanted_tree` in name, shape or dtype: a line each."""
    if not item.is_dir():
        return [f"  {item.name}: not in the checkpoint"]
    stored, wanted = stored_arrays(item), describe(wanted_tree)
    return [
        f"  {item.name}/{name}: stored {stored.get(name, 'nothing')}, "
        f"expected {wanted.get(name, 'nothing')}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]


def find_step(path: str | Path, step: int | None = None) -> Path:
    """The folder of one checkpoint: `path` is a workdir, its checkpoints folder, or the step itself."""
    path = as_path(path)
    if (path / "params").is_dir():
        return absolute(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit() and _is_whole(p))
    wanted = step if step is not None else (steps[-1] if steps else None)
    if wanted not in steps:
        raise FileNotFoundError(
            f"no checkpoint {'' if step is None else f'of step {step} '}in {path}: found steps {steps}"
        )
    return absolute(folder / str(wanted))


def _is_whole(step_dir: Path) -> bool:
    """Orbax gives a folder its name when it is whole; on a bucket it puts a file there then."""
    finished = not is_remote(step_dir) or (step_dir / "commit_success.txt").is_file()
    return finished and (step_dir / "params").is_dir()
