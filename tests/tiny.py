"""The smallest real runs: a few kilobytes of this interpreter's own source, and models that compile in seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax

from jaxlm import build, config_files
from jaxlm.data.store_writer import write_store
from jaxlm.tokenizers import make_tokenizer
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.workdir import manifest

ROOT = Path(__file__).resolve().parents[1]

OVERRIDES = {
    "tokenizer.kind": "bytes",
    "tokenizer.num_sentinels": 0,
    "model.vocab_size": 264,
    "model.emb_dim": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.mlp_dim": 32,
    "model.max_len": 64,
    "seq_len": 32,
    "batch_size": 8,
    "eval.batch_size": 8,
    "eval.num_batches": 2,
    "eval.sample_tokens": 4,
    "num_train_steps": 12,
    "log_every_steps": 4,
    "eval_every_steps": 6,
    "checkpoint_every_steps": 5,
    "optimizer.schedule.warmup_steps": 2,
    "log.tensorboard": False,
    "log.progress": False,
}

# Fields of metrics.jsonl that say how fast the machine was, not what the model learned.
TIMING = ("tokens_per_second", "step_seconds", "mfu", "input_wait", "seconds")


def make_store(
    path: Path, *, num_documents: int = 12, size: int = 600, num_sentinels: int = 0
) -> Path:
    """A token store of byte ids: the first lines of standard-library modules."""
    tokenizer = make_tokenizer("bytes", num_sentinels=num_sentinels)
    library = sorted(Path(os.__file__).parent.glob("*.py"))[: num_documents + 4]
    documents = [tokenizer.encode(p.read_text(encoding="utf-8")[:size]) for p in library]
    write_store(path, {"train": documents[4:], "validation": documents[:4]}, tokenizer)
    return path


def tiny_config(spec: str, store: Path, **overrides):
    """The config `spec` shrunk to seconds, on a prepared store; dots in names are written as __."""
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return config_files.read_config(
        str(ROOT / spec), OVERRIDES | {"data.sources": (str(store),)} | changes
    )


def save_untrained(config, workdir: Path) -> Path:
    """A workdir with a checkpoint of step 0, as `pretrain` writes it, but without a step."""
    run = build.make_run(config, workdir)
    build.write_config(config, workdir / "config.json")
    store = Checkpoints(workdir)
    store.save(0, run.init_state(), manifest(run, 0), None)
    store.wait()
    store.close()
    return workdir


def pretrain_command(config_path: Path, workdir: Path, *flags: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "jaxlm.pretrain",
        f"--config={config_path}",
        f"--workdir={workdir}",
        *flags,
    ]


def environment(devices: int = 1) -> dict[str, str]:
    """Of a subprocess with that many simulated devices; the visible cores are fixed, so sums are, too."""
    cache = jax.config.jax_compilation_cache_dir
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "NPROC": "2",
        "PYTHONPATH": str(ROOT),
        **({"JAX_COMPILATION_CACHE_DIR": cache} if cache else {}),
    }


def run(command: list[str], *, devices: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    result = subprocess.run(
        command, env=environment(devices), cwd=ROOT, capture_output=True, text=True
    )
    assert not check or result.returncode == 0, result.stderr[-4000:]
    return result


def learned(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without the fields that say how fast the machine was."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]
