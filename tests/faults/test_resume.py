"""A run that is killed and started again is, bit by bit, the run that was never killed."""

import random
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxlm import build
from jaxlm.training.checkpoints import find_step
from tests import tiny


def arrays(workdir):
    """Every array of the newest checkpoint by its name."""
    step = find_step(workdir)
    return {
        (item, jax.tree_util.keystr(path)): np.asarray(value)
        for item in ("params", "opt_state")
        for path, value in jax.tree_util.tree_leaves_with_path(
            ocp.StandardCheckpointer().restore(step / item)
        )
    }


def check_same_run(workdir, unbroken):
    """Bitwise equal arrays, equal metrics at equal steps, each step once."""
    assert find_step(workdir).name == find_step(unbroken).name
    a, b = arrays(workdir), arrays(unbroken)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=str(name))
    assert tiny.learned(workdir) == tiny.learned(unbroken)


def write_config(tmp_path, spec, store, **overrides):
    path = tmp_path / "config.json"
    build.write_config(tiny.tiny_config(spec, store, **overrides), path)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny.make_store(tmp_path_factory.mktemp("text") / "store")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, store):
    folder = tmp_path_factory.mktemp("unbroken")
    config = write_config(
        folder,
        "configs/gpt.py:tiny",
        store,
        num_train_steps=60,
        model__dropout_rate=0.1,
        ema_decay=0.9,
    )
    tiny.run(tiny.pretrain_command(config, folder / "run"))
    return config, folder / "run"


def kill_after(command, workdir, lines):
    """Starts the command and kills it, without warning, once it has logged that many lines."""
    process = subprocess.Popen(
        command,
        env=tiny.environment(),
        cwd=tiny.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= lines:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    return process.wait()


def test_a_killed_run_ends_as_the_unbroken_one(tmp_path, unbroken):
    config, whole = unbroken
    lines = random.randint(4, 20)
    command = tiny.pretrain_command(config, tmp_path / "run")
    assert kill_after(command, tmp_path / "run", lines) == -signal.SIGKILL, f"after {lines} lines"
    tiny.run(command)
    check_same_run(tmp_path / "run", whole)


def test_the_resume_law_fails_for_one_changed_bit(tmp_path, unbroken):
    _, whole = unbroken
    shutil.copytree(whole, tmp_path / "run")
    step = find_step(tmp_path / "run")
    stored = ocp.StandardCheckpointer().restore(step / "params")
    scale = np.array(stored["final_norm"]["scale"])
    scale[0] = np.nextafter(scale[0], np.float32(2))
    stored["final_norm"]["scale"] = scale
    shutil.rmtree(step / "params")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(step / "params", stored)
    with pytest.raises(AssertionError, match="final_norm"):
        check_same_run(tmp_path / "run", whole)


def test_the_resume_law_fails_for_a_step_that_is_logged_twice(tmp_path, unbroken):
    _, whole = unbroken
    shutil.copytree(whole, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + metrics.read_text().splitlines(keepends=True)[-1])
    with pytest.raises(AssertionError):
        check_same_run(tmp_path / "run", whole)


def test_a_finished_run_started_again_changes_nothing(unbroken):
    config, whole = unbroken
    before = arrays(whole), tiny.learned(whole)
    tiny.run(tiny.pretrain_command(config, whole))
    assert tiny.learned(whole) == before[1]
    for name, value in arrays(whole).items():
        np.testing.assert_array_equal(value, before[0][name])


def test_a_changed_identity_field_is_refused_with_the_difference(unbroken):
    config, whole = unbroken
    result = tiny.run(
        tiny.pretrain_command(config, whole, "--config.optimizer.learning_rate=0.5"), check=False
    )
    assert result.returncode != 0
    assert re.search(r"optimizer.learning_rate: [\d.]+ -> 0.5", result.stderr)
    assert "--allow_config_change" in result.stderr
