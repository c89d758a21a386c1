"""Orbax checkpoints of a run: `checkpoints/<step>/` with the items params, ema, frozen, opt_state and manifest.

`params` (and `ema`, where the run averages) stand alone, so that fine-tuning, evaluation and export read them without
knowing which optimizer made them; where a part of the parameters did not train, it is in `frozen`, and together they
are the model's. `opt_state` holds every other array of the state. `manifest` is JSON (see `stored`).

    checkpoints/300.orbax-checkpoint-tmp-0/   being written; an unfinished one is removed when a run opens the folder
    checkpoints/deleting/                     old ones, removed after each save
    checkpoints.damaged/300-1/                set aside, for people to look at, with 300-1.txt, which says why
"""

import functools
import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.exits import Damaged
from jaxlm.files import absolute, as_path, is_remote, write_text
from jaxlm.near import meant_path
from jaxlm.parallel import processes
from jaxlm.parallel.mesh import path_names
from jaxlm.training import partition, stored
from jaxlm.training.guards import finite_problems
from jaxlm.training.metrics import usual_mode
from jaxlm.training.saving import Saver, retention
from jaxlm.training.state import TrainState

PyTree = Any
log = logging.getLogger("jaxlm")
FOLDER, DAMAGED = "checkpoints", "checkpoints.damaged"


class Checkpoints:
    """The checkpoints of one workdir: saved in the background, restored exactly, from the newest that is whole.

    Args:
      workdir: the run's folder.
      keep_last: how many of the newest to keep.
      keep_every: also keep each multiple of this step; 0 keeps none for that reason.
      best_metric: also keep the best by this evaluation metric; '' keeps none for that reason.
      best_mode: 'min', 'max', or '' for what the metric's name says (`metrics.usual_mode`).
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        best_metric: str = "",
        best_mode: str = "",
    ):
        self.directory = absolute(workdir) / FOLDER
        self.best_metric = best_metric
        mode = best_mode or usual_mode(best_metric)
        options = retention(keep_last, keep_every, best_metric, mode)
        self._saver = Saver(self.directory, options)

    def steps(self) -> list[int]:
        """The steps that are there, whole or damaged."""
        return find_steps(self.directory)

    def latest_step(self) -> int | None:
        """The newest step, once what is being saved is on disk; None without one."""
        self.wait()
        return self._saver.open().latest_step()

    def best_step(self) -> int | None:
        """The step with the best metric so far, likewise; the newest one if none competed."""
        self.wait()
        manager = self._saver.open()
        return manager.best_step() if self.best_metric else manager.latest_step()

    def save(
        self, step: int, state: TrainState, manifest: dict, metrics: dict[str, float] | None
    ) -> None:
        """Starts to save; the arrays may be donated at once, as a program that they are donated to waits for the copy.

        `metrics` are those of the evaluation at this very step (None: the step does not compete for best, as it does not
        where the metric is not finite: Orbax would take that for the best of all).

        Raises:
          NotSaved: if what was saved before could not be. Corrupted: if devices held different copies of one array of it.
            `check` and `wait` say both of this.
        """
        competes = bool(self.best_metric) and metrics is not None
        if competes and self.best_metric not in metrics:
            raise ValueError(
                f"checkpoint.best_metric {self.best_metric!r} is not among the evaluation metrics "
                f"{sorted(metrics)}"
            )
        competes = competes and math.isfinite(metrics[self.best_metric])
        best = {self.best_metric: metrics[self.best_metric]} if competes else None
        items = split_state(state)
        started = stored.start_manifest(manifest | {"metrics": best}, items)
        self._saver.save(step, items, started, best)

    def check(self) -> None:
        """Raises NotSaved or Corrupted if what was saved in the background has failed; costs nothing to speak of."""
        self._saver.check()

    def wait(self) -> None:
        """Blocks until what was saved is on disk; raises NotSaved or Corrupted if it could not be."""
        self._saver.wait()

    def close(self) -> None:
        """Waits for what is being saved, and stops."""
        self._saver.close()

    def restore(self, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """(state, manifest) of the newest step that is whole, placed by the shardings of `abstract_state`.

        Damaged steps are named and, once a whole one is found, set aside. None if there are no steps at all. All processes
        must call, and restore the same step.

        Raises:
          Damaged: if no step is whole; nothing is changed then.
          ValueError: a repair list, if the newest whole step has other names, shapes or dtypes.
        """
        damage: dict[int, str] = {}
        steps = json.loads(processes.gather("steps", json.dumps(self.steps()))[0])
        for step in reversed(steps):
            step_dir = self.directory / str(step)
            try:
                state = restore_state(step_dir, abstract_state)
                manifest = stored.read_manifest(step_dir)
                refuse_not_finite(step_dir, state)
            except Damaged as error:
                if processes.is_main():
                    log.error("checkpoint %d is damaged: %s", step, error)
                damage[step] = str(error)
                continue
            if not stored.has_checksums(manifest):
                log.warning("checkpoint %d is of an older version, which kept no checksums", step)
            self._set_aside(damage | self._damaged_manifests(steps[: steps.index(step)]))
            self._saver.open()
            return state, manifest
        if damage:
            raise Damaged(
                f"{self.directory} has steps {steps}, and none of them can be restored:\n"
                + "\n".join(damage.values())
                + "\nNothing was changed. Bring the folder back from a copy, or start anew in another --workdir."
            )
        return None

    def set_aside(self, steps: Iterable[int], reason: str) -> None:
        """Moves steps out of the way, to `checkpoints.damaged`; all processes must call."""
        self._saver.forget()
        self._set_aside(dict.fromkeys(steps, reason))

    def _damaged_manifests(self, steps: list[int]) -> dict[int, str]:
        """The steps whose manifest does not hold; Orbax would trip over those that have nothing else, either."""
        found = {}
        for step in steps:
            step_dir = self.directory / str(step)
            try:
                stored.together(step_dir, functools.partial(stored.read_manifest, step_dir))
            except Damaged as error:
                found[step] = str(error)
        return found

    def _set_aside(self, reasons: Mapping[int, str]) -> None:
        for step, reason in reasons.items() if processes.is_main() else ():
            folder = self.directory.parent / DAMAGED
            folder.mkdir(exist_ok=True)
            number = 1 + sum(path.name.startswith(f"{step}-") for path in folder.glob("*.txt"))
            target = folder / f"{step}-{number}"
            write_text(target.with_name(f"{target.name}.txt"), reason + "\n")
            (self.directory / str(step)).rename(target)  # of a bucket: a copy of each object
            log.error("checkpoint %d is set aside, as %s", step, target)
        processes.barrier("damaged checkpoints are set aside")


def split_state(state: TrainState) -> dict[str, PyTree]:
    """The array items of a checkpoint: params; ema, frozen and spikes if there are any; and opt_state with all the rest."""
    rest = {
        "step": state.step,
        "opt_state": state.opt_state,
        "plateau": state.plateau,
        "skipped": state.skipped,
    }
    items = {"params": state.params, "opt_state": rest, "ema": state.ema, "frozen": state.frozen}
    items["spikes"] = state.spikes
    return {name: tree for name, tree in items.items() if tree is not None}


def refuse_not_finite(step_dir: Path, state: TrainState) -> None:
    """Raises Damaged, naming the arrays from which no step would recover. What plateau keeps may be infinite."""
    if lines := finite_problems(split_state(state.replace(plateau=None))):
        raise Damaged(f"{step_dir} was saved with numbers that are none:\n  " + "\n  ".join(lines))


def restore_state(step_dir: Path, abstract_state: TrainState) -> TrainState:
    """The whole state of one checkpoint, placed by the shardings of `abstract_state`.

    The guard against spikes may be turned on or off where a run goes on: without `spikes` in the checkpoint it has seen none.

    Raises:
      Damaged: if it is not what was saved.
      ValueError: a repair list, if the stored names, shapes or dtypes are others.
    """

    def choose(there: dict[str, PyTree]) -> dict[str, PyTree]:
        items = split_state(abstract_state)
        if "spikes" not in there:
            items.pop("spikes", None)
        return fitting(step_dir, items, there)

    none_yet = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), abstract_state.spikes
    )
    loaded = {"spikes": none_yet} | stored.read(step_dir, choose)
    rest = loaded["opt_state"]
    parts = {name: loaded.get(name) for name in ("params", "ema", "frozen", "spikes")}
    return abstract_state.replace(**parts, **rest)


def load_item(step_dir: Path, abstract_tree: PyTree, item: str = "params") -> PyTree:
    """One item of a checkpoint, with exactly the names, shapes and dtypes of `abstract_tree`.

    What the item lacks because it did not train comes from `frozen`, so the whole model's parameters are loaded in the
    same way whatever part of them was trained.

    Raises:
      Damaged: if it is not what was saved.
      ValueError: a repair list, if the stored arrays are others.
    """

    def choose(there: dict[str, PyTree]) -> dict[str, PyTree]:
        items = {item: abstract_tree}
        if item in there and "frozen" in there:
            own = stored.describe(there[item])
            items[item], rest = partition.split(abstract_tree, lambda path: path in own)
            items |= {"frozen": rest} if rest else {}
        return fitting(step_dir, items, there)

    loaded = stored.read(step_dir, choose)
    return partition.join(loaded.pop(item), loaded.get("frozen"))


def load_tree(step_dir: Path, item: str, like: PyTree) -> PyTree:
    """One item of a checkpoint whole, whatever is in it, together with what did not train.

    like: ShapeDtypeStructs with shardings; an array of the same path and shape gets its sharding, any other array the
    sharding of a scalar on the same devices.

    Raises:
      Damaged: if it is not what was saved.
    """
    leaves = {"/".join(path_names(p)): x for p, x in jax.tree_util.tree_leaves_with_path(like)}
    mesh = next(iter(leaves.values())).sharding.mesh
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(path, x):
        twin = leaves.get("/".join(path_names(path)))
        sharding = twin.sharding if twin is not None and twin.shape == x.shape else replicated
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    loaded = stored.read(
        step_dir,
        lambda there: {
            name: jax.tree_util.tree_map_with_path(place, there[name])
            for name in (item, "frozen")
            if name in there
        },
    )
    return partition.join(loaded.pop(item), loaded.get("frozen"))


def fitting(
    step_dir: Path, wanted: dict[str, PyTree], there: dict[str, PyTree]
) -> dict[str, PyTree]:
    """`wanted`, if the stored arrays of these items have its names, shapes and dtypes; a ValueError with a list if not."""
    lines = []
    for item, tree in wanted.items():
        if item not in there:
            lines.append(f"  {item}: not in the checkpoint")
            continue
        found, expected = stored.describe(there[item]), stored.describe(tree)
        lines += [
            f"  {item}/{name}: stored {found.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
            for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)
        ]
    if lines:
        raise ValueError(f"{step_dir} does not fit this model and optimizer:\n" + "\n".join(lines))
    return wanted


def evaluated_item(step_dir: Path) -> str:
    """The parameters that evaluation and use take: 'ema' where the run averaged them, else 'params'."""
    return "ema" if (step_dir / "ema").is_dir() else "params"


def split_step(checkpoint: str) -> tuple[str, int | None]:
    """'W@7' -> ('W', 7), 'W' -> ('W', None); a path may have other @s."""
    path, _, step = checkpoint.rpartition("@")
    return (path, int(step)) if path and step.isdecimal() else (checkpoint, None)


def find_step(path: str | Path, step: int | None = None) -> Path:
    """The folder of one checkpoint, whole or damaged: `path` is a workdir, its checkpoints folder, or the step itself."""
    path = as_path(path)
    if (path / "params").is_dir() or (path / "manifest").is_dir():
        return absolute(path)
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    steps = find_steps(folder)
    wanted = step if step is not None else (steps[-1] if steps else None)
    if wanted not in steps:
        if steps:
            found = f"no checkpoint of step {step} in {path}: found steps {steps}"
        elif path.is_dir():
            found = f"no checkpoint in {path}: no run has saved one there"
        else:
            found = f"no checkpoint in {path}: there is no such folder{meant_path(path)}"
        raise FileNotFoundError(f"{found}; expected a run's workdir, or hf:FOLDER_OR_HUB_ID")
    return absolute(folder / str(wanted))


def find_steps(folder: Path) -> list[int]:
    """The steps in a folder of checkpoints, in order.

    Orbax gives a folder its name when it is complete; on a bucket it puts a file there then.
    """
    return sorted(
        int(path.name)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.name.isdigit()
        and path.is_dir()
        and (not is_remote(path) or (path / "commit_success.txt").is_file())
    )
