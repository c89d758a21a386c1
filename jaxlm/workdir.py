"""What every run writes about itself into its workdir: config.json, environment.json, checkpoint manifests."""

import importlib.metadata
import json
import logging
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from jaxlm import build
from jaxlm.flags import define_config_flag

log = logging.getLogger("jaxlm")


def accept_config(config: ConfigDict, workdir: Path, allow_change: bool) -> None:
    """Writes config.json; on a resume, refuses a config that would make it another run."""
    path = workdir / "config.json"
    if path.exists():
        identity, execution = build.config_changes(build.saved_config(path), config)
        for line in execution:
            log.info("config changed since this run began: %s", line)
        if identity and not allow_change:
            raise ValueError(
                f"{workdir} holds a run with another config:\n"
                + "\n".join(f"  {line}" for line in identity)
                + "\nTake another --workdir, undo the change, or pass --allow_config_change."
            )
    build.write_config(config, path)


def manifest(run: build.Run, step: int) -> dict[str, Any]:
    """What a checkpoint says about itself."""
    return {
        "step": step,
        "tokens_seen": round(step * run.step_tokens),
        "config": json.loads(run.config.to_json()),
        "tokenizer_sha256": run.tokenizer.sha256,
        "data": run.data_fingerprint,
    }


def write_environment(workdir: Path, run: build.Run, peak_says: str) -> None:
    """environment.json: what one needs to know to run this again."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
    )
    content = {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in names},
        "git_revision": git.stdout.strip() or None,
        "devices": [str(d) for d in jax.devices()],
        "mesh": dict(run.mesh.shape),
        "parameters": run.num_params,
        "dtype": run.model.config.dtype,
        "mfu_peak": peak_says,
    }
    (workdir / "environment.json").write_text(
        json.dumps(content, indent=2) + "\n", encoding="utf-8"
    )


def define_flags() -> None:
    define_config_flag()
    flags.DEFINE_string("workdir", None, "Folder of the run: everything it makes lies there.")
    flags.DEFINE_bool(
        "allow_config_change", False, "Resume although fields that define the run have changed."
    )
    flags.mark_flags_as_required(["config", "workdir"])
