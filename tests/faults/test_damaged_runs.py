"""Real runs over damaged checkpoints: they go on from what is whole to the same end, or say why not, and leave all as it was."""

import shutil
import subprocess

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxlm import build, exits
from jaxlm.training.checkpoints import find_step
from tests import tiny
from tests.parallel import test_processes as processes

STEPS = 12  # checkpoints at 5, 10 and 12, of which the newest two are kept


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny.tiny_config(
        "configs/gpt.py:tiny",
        tiny.make_store(folder / "store"),
        eval__num_batches=1,
        eval__prompts=(),
    )
    build.write_config(config, folder / "config.json")
    return folder / "config.json"


@pytest.fixture(scope="module")
def whole(config):
    workdir = config.parent / "whole"
    tiny.run(tiny.pretrain_command(config, workdir))
    return workdir


def start(config, workdir, *before):
    return subprocess.run(
        [*before, *tiny.pretrain_command(config, workdir)],
        env=tiny.environment(),
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def zero_parameters(step_dir):
    for path in (step_dir / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def parameters(workdir):
    tree = ocp.StandardCheckpointer().restore(find_step(workdir) / "params")
    return {str(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_a_run_goes_on_from_the_step_before_a_damaged_one_to_the_same_end(config, whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    zero_parameters(workdir / "checkpoints" / "12")
    left = [workdir / "config.json.7.partial", workdir / "plots" / "loss.png.7.partial"]
    for path in left:
        path.write_text("{")  # as by a run that was killed
    done = start(config, workdir)
    assert not any(path.exists() for path in left)
    assert done.returncode == exits.DONE, done.stderr[-3000:]
    assert "checkpoint 12 is damaged" in done.stderr and "resumed from step 10" in done.stderr
    assert (workdir / "checkpoints.damaged" / "12-1" / "params").is_dir()
    found, expected = parameters(workdir), parameters(whole)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert tiny.learned(workdir) == tiny.learned(whole)


def test_a_run_without_a_whole_step_ends_with_its_status_and_changes_nothing(
    config, whole, tmp_path
):
    workdir = shutil.copytree(whole, tmp_path / "run")
    for step in ("10", "12"):
        zero_parameters(workdir / "checkpoints" / step)
    before = contents(workdir / "checkpoints")
    done = start(config, workdir)
    assert done.returncode == exits.DAMAGED, done.stderr[-3000:]
    assert "none of them can be restored" in done.stderr and "Traceback" not in done.stderr
    assert contents(workdir / "checkpoints") == before
    assert tiny.learned(workdir) == tiny.learned(whole)


def test_a_run_that_cannot_save_ends_with_its_status(config, whole, tmp_path):
    """No file may be larger than 8 KB, so checkpoints fail, and metrics do not."""
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "12")
    done = start(config, workdir, "bash", "-c", 'ulimit -f 8; exec "$@"', "with small files")
    assert done.returncode == exits.NOT_SAVED, done.stderr[-3000:]
    assert "File too large" in done.stderr and "start the same command again" in done.stderr
    assert int(find_step(workdir).name) == 10


@pytest.mark.slow
def test_what_one_of_two_processes_cannot_read_both_leave_aside(config, tmp_path):
    """The newest step lacks what process 1 reads, and process 0 reads all of its own."""
    flags = ["--config.mesh.fsdp=2", "--config.checkpoint_every_steps=4"]
    command = [*tiny.pretrain_command(config, tmp_path / "run"), *flags]
    processes.run([*command, "--config.num_train_steps=8"], 2)
    shards = (tmp_path / "run" / "checkpoints" / "8" / "params" / "ocdbt.process_1" / "d").iterdir()
    max(shards, key=lambda path: path.stat().st_size).unlink()
    (_, first), (_, second) = processes.run([*command, f"--config.num_train_steps={STEPS}"], 2)
    assert "checkpoint 8 is damaged" in first and "resumed from step 4" in first
    assert "damaged" not in second  # process 0 says what all have found
    assert (tmp_path / "run" / "checkpoints.damaged" / "8-1").is_dir()
    assert int(find_step(tmp_path / "run").name) == STEPS
    steps = [(line["step"], line["split"]) for line in tiny.learned(tmp_path / "run")]
    assert len(steps) == len(set(steps))
