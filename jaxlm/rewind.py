"""Where too many steps in a row were bad: their batches are written down, and the run goes back and leaves them out.

    attempt ──Diverged──▶ W/bad_steps/<step>-<batch>/ ──▶ W/rewinds.json ──▶ attempt: a resume, with other batches
                            batch.npz documents.json metrics.json

A rewind is a resume from an older checkpoint: the newer ones are set aside first, then the list of rewinds gets one more, so a
kill in between leaves a run that goes on before the bad steps, and meets them again. The idea of going back and leaving
batches out is PaLM's (arXiv:2204.02311, 5.1).
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.build import Run
from jaxlm.data.positions import (
    FILE,
    as_json,
    plan_rewind,
    position,
    read_rewinds,
    write_rewinds,
)
from jaxlm.exits import Damaged, Diverged
from jaxlm.files import write_text, write_whole
from jaxlm.parallel import processes
from jaxlm.training.checkpoints import Checkpoints

log = logging.getLogger("jaxlm")


def until_done(run: Run, attempt: Callable[[], Any]) -> Any:
    """Calls `attempt` again after each rewind, and returns what it returns; all processes must call.

    attempt: goes on from the newest checkpoint; what it opened is closed when it raises.

    Raises:
      Diverged: if the config has no rewinds, or as many were made as it allows.
    """
    guards = run.config.guards
    while True:
        try:
            return attempt()
        except Diverged as error:
            folder = write_bad_steps(run, error)
            if not guards.skip_batches or len(run.rewinds) >= guards.max_rewinds:
                so_far = f" ({len(run.rewinds)} rewinds did not help)" if run.rewinds else ""
                text = f"{error}. Batch and documents: {folder}{so_far}"
                raise Diverged(text, error.bad_steps) from None
            log.warning("%s", error)
            go_back(run, error)


def write_bad_steps(run: Run, error: Diverged) -> Path:
    """The folder with the first bad step's batch, made again, and the documents and metrics of all of them in a row.

    batch.npz: plain arrays, as the objective makes them, of the rows of all processes.
    documents.json: for each step the number of its batch, and where each row is from (`Run.documents`).
    metrics.json: for each step its metrics.
    """
    steps = [record["step"] for record in error.bad_steps]
    batches = {step: position(step - 1, run.rewinds) for step in steps}
    folder = run.workdir / "bad_steps" / f"{steps[0]}-{batches[steps[0]]}"
    if processes.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        batch = run.train_batches.whole(batches[steps[0]])
        write_whole(folder / "batch.npz", lambda file: np.savez_compressed(file, **batch))
        documents = [
            {"step": step, "batch": k, "rows": run.documents(k)} for step, k in batches.items()
        ]
        write_text(folder / "documents.json", json.dumps(documents, indent=1) + "\n")
        write_text(folder / "metrics.json", json.dumps(list(error.bad_steps), indent=1) + "\n")
    processes.barrier("bad steps are written")  # the others may end now
    return folder


def go_back(run: Run, error: Diverged) -> None:
    """Sets the checkpoints aside that are not to be gone on from, and writes the rewind down."""
    bad_steps = error.bad_steps[0]["step"], error.bad_steps[-1]["step"]
    store = Checkpoints(run.workdir, **run.config.checkpoint)
    steps, skip = store.steps(), run.config.guards.skip_batches
    rewind = plan_rewind(bad_steps, skip, run.rewinds, oldest=min(steps, default=0))
    later = [step for step in steps if step > rewind.step]
    store.set_aside(later, f"the run went back to step {rewind.step}")
    store.close()
    if processes.is_main():
        write_rewinds(run.workdir, [*run.rewinds, rewind])
    processes.barrier("rewinds.json is written")
    run.rewinds[:] = read_rewinds(run.workdir)
    log.warning("from step %d on the run goes on with batch %d", rewind.step, rewind.batch)


def check_rewinds(run: Run, manifest: Mapping[str, Any]) -> None:
    """Raises Damaged if rewinds.json lacks a rewind that was there when the checkpoint of this manifest was saved."""
    saved = manifest.get("rewinds", [])  # the older ones have none
    if as_json(run.rewinds)[: len(saved)] != saved:
        raise Damaged(
            f"{run.workdir / FILE}: found {as_json(run.rewinds)}, expected it to begin as the manifest of step "
            f"{manifest['step']} says, {saved}: without it batches that were left out would come again. Write that list there."
        )
