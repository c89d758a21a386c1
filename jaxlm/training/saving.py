"""Orbax's manager of one folder of checkpoints: it writes in the background, and what goes wrong there is told.

Left to itself it may go on as if a step that failed were there, counts an empty folder as the newest step, and removes old
steps file by file.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from jaxlm.exits import Corrupted, NotSaved
from jaxlm.files import is_remote
from jaxlm.parallel import offload, processes
from jaxlm.training.stored import in_short

PyTree = Any
DELETING = "deleting"
FAILURES = (
    OSError,
    ValueError,
    RuntimeError,
)  # of disks and buckets, as Orbax and tensorstore raise them


def retention(keep_last: int, keep_every: int, best_metric: str, best_mode: str) -> dict[str, Any]:
    """The manager's options that say which steps stay; arguments as of `Checkpoints`."""
    policies: list[Any] = [managers.LatestN(keep_last)]
    options: dict[str, Any] = {"preservation_policy": managers.AnyPreservationPolicy(policies)}
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
    return options


class Saver:
    """directory: of the steps. options: of `retention`."""

    def __init__(self, directory: Path, options: Mapping[str, Any]):
        self.directory = directory
        self._options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            # A folder loses its name at once, and not file by file: what has a step's name is whole.
            todelete_subdir=DELETING,
            # Else its threads wait five minutes, also when the program ends, for a folder that could not be made; and a
            # process that has written waits at most ten for one whose disk is slow.
            async_options=ocp.options.AsyncOptions(
                create_directories_asynchronously=False, timeout_secs=3600
            ),
            # Named, they wait for one another without a program on the devices, which only one thread may start.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes=set(range(jax.process_count()))
            ),
            create=False,  # by Orbax, which cannot for named processes
            **options,
        )
        self._manager: ocp.CheckpointManager | None = None
        self._thread = ThreadPoolExecutor(1, "saving")
        self._writing: Future | None = None

    def open(self) -> ocp.CheckpointManager:
        """The manager, made when it is needed first: it reads what steps there are, and trips over damaged ones."""
        if self._manager is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.directory, options=self._options)
            self._delete()
        return self._manager

    def forget(self) -> None:
        """Ends the manager: the next one looks anew at what is there."""
        self.wait()
        if self._manager:
            self._manager.close()
            self._manager = None

    def save(
        self,
        step: int,
        items: Mapping[str, PyTree],
        make_manifest: Callable[[], Mapping[str, Any]],
        metrics: Any,
    ) -> None:
        """Starts to save: the arrays may be donated at once, to a program that then waits until they are copied.

        A thread of ours calls Orbax: its own save, asynchronous or not, keeps its caller waiting until eleven threads run.

        Raises:
          NotSaved, Corrupted: what went wrong with what was saved before; `check` and `wait` say it of this.
        """
        self.wait()
        copies = {name: offload.start_copy(tree) for name, tree in items.items()}
        self._writing = self._thread.submit(self._save, step, copies, make_manifest, metrics)

    def check(self) -> None:
        """Raises NotSaved or Corrupted if what was saved in the background has failed; costs nothing to speak of."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Blocks until what was saved is on disk.

        Raises:
          NotSaved, Corrupted: what went wrong in the background.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except FAILURES as error:
            # It counts the step that failed; another one looks at what is there.
            self._manager = None
            if isinstance(error, Corrupted | NotSaved):
                raise
            raise self._not_saved(error) from error

    def close(self) -> None:
        """Waits for what is being saved, and stops its thread."""
        try:
            self.forget()
        finally:
            self._thread.shutdown()

    def _save(
        self,
        step: int,
        items: Mapping[str, PyTree],
        make_manifest: Callable[[], Mapping[str, Any]],
        metrics: Any,
    ) -> None:
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        manifest = ocp.args.JsonSave(make_manifest())
        arguments = ocp.args.Composite(**arrays, manifest=manifest)
        manager = self.open()
        if not manager.save(step, args=arguments, metrics=metrics):
            raise NotSaved(
                f"Orbax refused to save step {step} into {self.directory}, where the newest step is "
                f"{manager.latest_step()}: two runs may be writing to one workdir"
            )
        manager.wait_until_finished()
        self._delete()

    def _delete(self) -> None:
        """Removes old steps; what cannot be removed is tried again after the next save.

        Their files are emptied first: Google Drive as a folder (Colab) moves what is removed to a trash that counts, for
        thirty days.
        """
        if processes.is_main() and not is_remote(self.directory):
            with contextlib.suppress(OSError):
                for path in (self.directory / DELETING).rglob("*"):
                    if path.is_file():
                        os.truncate(path, 0)
            shutil.rmtree(self.directory / DELETING, ignore_errors=True)

    def _not_saved(self, error: Exception) -> NotSaved:
        free = "" if is_remote(self.directory) else _free_space(self.directory)
        return NotSaved(
            f"the newest step could not be saved into {self.directory}{free}: {in_short(error)}\n"
            "The steps before are there. Make room or mend the disk, and start the same command again."
        )


def _free_space(folder: Path) -> str:
    usage = shutil.disk_usage(folder)
    return f", on whose disk {usage.free / 1e9:.2f} of {usage.total / 1e9:.2f} GB are free"
