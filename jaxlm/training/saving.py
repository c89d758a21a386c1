"""Orbax's manager of one folder of checkpoints: it writes in the background, and what goes wrong there is told.

Left to itself it may go on as if a step that failed were there, counts an empty folder as the newest step, and removes old
steps file by file.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from jaxlm.exits import Corrupted, NotSaved
from jaxlm.files import is_remote
from jaxlm.parallel import processes
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


class ManifestHandler(ocp.JsonCheckpointHandler):
    """Writes the JSON object that a function gives, and asks for it in the background: checksums take their time."""

    async def async_save(
        self, directory: Path, item: Any = None, args: "ManifestSave | None" = None
    ) -> list[ocp.future.Future]:
        del item
        assert args is not None

        async def write() -> None:
            content = args.make()  # in every process: each learns of copies that differ
            if processes.is_main():
                (directory / "metadata").write_text(json.dumps(content))

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="manifest")]


@ocp.args.register_with_handler(ManifestHandler, for_save=True, for_restore=True)
@dataclass
class ManifestSave(ocp.args.CheckpointArgs):
    """Orbax wants arguments of restoring, too; the manifest is read without it (`stored.read_manifest`)."""

    make: Callable[[], Mapping[str, Any]]


class Saver:
    """directory: of the steps. options: of `retention`."""

    def __init__(self, directory: Path, options: Mapping[str, Any]):
        self.directory = directory
        self._options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            # A folder loses its name at once, and not file by file: what has a step's name is whole.
            todelete_subdir=DELETING,
            # Else its threads wait five minutes, also when the program ends, for a folder that could not be made.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
            **options,
        )
        self._manager: ocp.CheckpointManager | None = None
        self._thread = ThreadPoolExecutor(1, "after_save")
        self._writing: Future | None = None

    def open(self) -> ocp.CheckpointManager:
        """The manager, made when it is needed first: it reads what steps there are, and trips over damaged ones."""
        if self._manager is None:
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
        """Starts to save; returns when the arrays are copied off the devices.

        Raises:
          Corrupted: of the manifest that was saved before.
          NotSaved: if this cannot be saved, or what was saved before could not.
        """
        self.wait()
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        arguments = ocp.args.Composite(**arrays, manifest=ManifestSave(make_manifest))
        manager = self.open()
        try:
            saved = manager.save(step, args=arguments, metrics=metrics)
        except FAILURES as error:
            raise self._not_saved(f"step {step}", error) from error
        if not saved:
            raise NotSaved(
                f"Orbax refused to save step {step} into {self.directory}, where the newest step is "
                f"{manager.latest_step()}: two runs may be writing to one workdir"
            )
        self._writing = self._thread.submit(self._after_save, manager)

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
            if isinstance(error, Corrupted):
                raise
            raise self._not_saved("the newest step", error) from error

    def close(self) -> None:
        """Waits for what is being saved, and stops its thread."""
        try:
            self.forget()
        finally:
            self._thread.shutdown()

    def _after_save(self, manager: ocp.CheckpointManager) -> None:
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

    def _not_saved(self, what: str, error: Exception) -> NotSaved:
        free = "" if is_remote(self.directory) else _free_space(self.directory)
        return NotSaved(
            f"{what} could not be saved into {self.directory}{free}: {in_short(error)}\n"
            "The steps before are there. Make room or mend the disk, and start the same command again."
        )


def _free_space(folder: Path) -> str:
    usage = shutil.disk_usage(folder)
    return f", on whose disk {usage.free / 1e9:.2f} of {usage.total / 1e9:.2f} GB are free"
