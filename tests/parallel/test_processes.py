"""Two real processes of two devices each train as one process of four does: rows, losses and evaluation."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests import tiny

STEPS = 4
SPEC = "configs/gpt.py:tiny"

# argv: workdir, config file, process, processes, port, wrong
TRAIN = """
import json, sys
import jax

workdir, config, process, processes, port, wrong = sys.argv[1:]
if int(processes) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
from jaxlm import build
from jaxlm.parallel import mesh as meshes

if int(wrong):  # every process reads the first rows, as if it were alone
    meshes.local_rows = lambda mesh, size: __import__("numpy").arange(size // int(processes))
run = build.make_run(build.saved_config(config), workdir)
state, losses = run.init_state(), []
batches = run.device_batches(0)
for _ in range(run.config.num_train_steps):
    state, metrics = run.train_step(state, next(batches))
    total, weight = metrics["loss"]
    losses.append(float(total) / float(weight))
rows = run.train_batches[0]["tokens"].shape[0]
print("RESULT", json.dumps({"losses": losses, "rows": rows, "eval": run.evaluate(state.params)}))
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train(tmp_path, config_path, processes, wrong=False):
    """What each process printed."""
    port = str(free_port())
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(tmp_path / "run"), str(config_path)]
            + [str(i), str(processes), port, str(int(wrong))],
            env=tiny.environment(4 // processes),
            cwd=tiny.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    results = []
    try:
        for child in children:
            out, err = child.communicate(timeout=300)
            assert child.returncode == 0, err[-4000:]
            (line,) = [x for x in out.splitlines() if x.startswith("RESULT ")]
            results.append(json.loads(line.removeprefix("RESULT ")))
    finally:
        for child in children:
            child.kill()  # one that waits for another that failed
    return results


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A config on a prepared store, saved as a run saves it, and what one process of four devices gives."""
    root = tmp_path_factory.mktemp("processes")
    store = tiny.make_store(root / "store")
    mesh = dict(mesh__data=2, mesh__fsdp=2)
    config = tiny.tiny_config(SPEC, store, num_train_steps=STEPS, **mesh)
    path = root / "config.json"
    path.write_text(config.to_json_best_effort(), encoding="utf-8")
    return root, path, train(root / "alone", path, 1)[0]


def check_two_processes(setting, name, wrong=False):
    root, path, alone = setting
    for result in train(root / name, path, 2, wrong):
        assert result["rows"] == 4 and alone["rows"] == 8
        np.testing.assert_allclose(result["losses"], alone["losses"], rtol=1e-5)
        for metric, value in alone["eval"].items():
            np.testing.assert_allclose(result["eval"][metric], value, rtol=1e-5)


def test_two_processes_train_as_one(setting):
    check_two_processes(setting, "two")


def test_the_check_fails_if_every_process_reads_the_first_rows(setting):
    with pytest.raises(AssertionError):
        check_two_processes(setting, "wrong", wrong=True)
