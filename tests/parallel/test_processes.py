"""Several real processes, started as a user starts them, are one run: its curve, its files, its end if one of them dies."""

import hashlib
import json
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxlm import build
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel import processes
from jaxlm.training.checkpoints import find_step
from jaxlm.training.metrics import read_metrics
from tests import tiny

SPEC = "configs/gpt.py:tiny"
HEARTBEAT = 10  # seconds
# Of eval lines and train lines; float32 sums of other shards in another order.
TOLERANCE = dict(rtol=2e-4, atol=1e-6)


def start(command, count, devices=1):
    """The processes of one run, on free ports of this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
    flags += [f"--heartbeat_timeout={HEARTBEAT}"]
    return [
        subprocess.Popen(
            command + (flags + [f"--process_id={i}"] if count > 1 else []),
            env=tiny.environment(devices),
            cwd=tiny.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(children, timeout=300):
    """(exit status, stdout, stderr) of each, none of which is left behind."""
    try:
        return [(*child.communicate(timeout=timeout), child.returncode) for child in children]
    finally:
        for child in children:
            child.kill()


def run(command, count, devices=1):
    """What each process printed; all must succeed."""
    results = finish(start(command, count, devices))
    for _, err, status in results:
        assert status == 0, err[-4000:]
    return [(out, err) for out, err, _ in results]


def wait_for(workdir, children, lines):
    """Until the run has logged that many lines and has a checkpoint."""
    deadline, metrics = time.monotonic() + 300, workdir / "metrics.jsonl"
    while time.monotonic() < deadline and all(child.poll() is None for child in children):
        if metrics.exists() and metrics.read_text().count("\n") >= lines:
            if any((workdir / "checkpoints").glob("[0-9]*/manifest")):
                return
        time.sleep(0.01)
    raise AssertionError([child.communicate() for child in children if child.poll() is not None])


def command_of(config_path, workdir, *flags):
    return tiny.pretrain_command(config_path, workdir, *flags)


def check_same_curve(workdir, whole):
    """Equal steps in an equal order, each once, and equal numbers."""
    found, wanted = tiny.learned(workdir), tiny.learned(whole)
    where = lambda lines: [(line["step"], line["split"]) for line in lines]
    assert where(found) == where(wanted)
    for line, reference in zip(found, wanted, strict=True):
        assert line.keys() == reference.keys()
        for name, value in reference.items():
            if isinstance(value, float):
                np.testing.assert_allclose(line[name], value, err_msg=name, **TOLERANCE)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(config.json on a prepared store, the workdir of the unbroken run by one process of four devices)."""
    root = tmp_path_factory.mktemp("processes")
    config = tiny.tiny_config(
        SPEC,
        tiny.make_store(root / "store"),
        num_train_steps=40,
        log_every_steps=2,
        eval_every_steps=20,
        checkpoint_every_steps=8,
        mesh__fsdp=2,
        eval__prompts=("a", "bc"),
        eval__num_batches=1,
        optimizer__learning_rate=1e-3,
    )
    path = root / "config.json"
    build.write_config(config, path)
    run(command_of(path, root / "whole"), 1, devices=4)
    return path, root / "whole"


def traced_steps(workdir):
    """The step numbers in the one xplane file of a run's profile."""
    (path,) = (workdir / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    stats = (
        dict(event.stats)
        for plane in planes
        for line in plane.lines
        for event in line.events
        if event.name.startswith("train")
    )
    return {int(found["step_num"]) for found in stats if "step_num" in found}


def test_two_processes_are_one_run(setting, tmp_path):
    config, whole = setting
    workdir = tmp_path / "run"
    printed = run(command_of(config, workdir, "--profile_steps=3:5"), 2, devices=2)
    check_same_curve(workdir, whole)
    assert (workdir / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert json.loads((workdir / "environment.json").read_text())["processes"] == 2
    assert sorted(p.name for p in workdir.iterdir()) == sorted(
        [p.name for p in whole.iterdir()] + ["profile"]
    )
    assert traced_steps(workdir) == {3, 4, 5}
    main, other = (out + err for out, err in printed)
    assert "parameters on 4 devices" in main and "parameters" not in other


def test_the_curves_check_fails_for_another_curve_and_for_a_step_twice(setting, tmp_path):
    _, whole = setting
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    first = json.loads(lines[0])
    changed = json.dumps(first | {"loss": first["loss"] * 1.01}) + "\n"
    for wrong in ([changed, *lines[1:]], [*lines, lines[-1]]):
        (tmp_path / "metrics.jsonl").write_text("".join(wrong))
        with pytest.raises(AssertionError):
            check_same_curve(tmp_path, whole)


def check_survivors(children, victim):
    """All but the victim say in one line what happened and end with their own status, in time."""
    started = time.monotonic()
    survivors = [child for i, child in enumerate(children) if i != victim]
    results = finish(survivors, timeout=3 * HEARTBEAT + 30)
    assert time.monotonic() - started < 3 * HEARTBEAT
    for _, err, status in results:
        assert status == processes.PEER_LOST, (status, err[-3000:])
        (line,) = [x for x in err.splitlines() if "another process has ended" in x]
        assert f"status {processes.PEER_LOST}" in line
        assert "Traceback" not in err, err[-3000:]
    children[victim].kill()
    children[victim].communicate()


def test_survivors_end_when_one_is_killed_and_fewer_go_on(setting, tmp_path):
    config, whole = setting
    command = command_of(config, tmp_path / "run")
    children = start(command, 2, devices=2)
    wait_for(tmp_path / "run", children, lines=6)
    children[1].send_signal(signal.SIGKILL)
    check_survivors(children, victim=1)
    assert 0 < int(find_step(tmp_path / "run").name) < 40
    run(command, 1, devices=4)
    check_same_curve(tmp_path / "run", whole)


# ---------------------------------------------------------------- batches

# argv: config file, workdir, first step, steps, and 1 if every process is to read the first rows, as if it were alone
HASHES = """
import hashlib, json, sys
from absl import app, flags
from jaxlm.flags import define_process_flags, process_options
from jaxlm.parallel import mesh as meshes, processes
import numpy as np

def main(argv):
    config, workdir, first, steps, wrong = argv[1:]
    with processes.joined(**process_options(flags.FLAGS)):
        import jax
        from jaxlm import build
        if int(wrong):
            meshes.local_rows = lambda mesh, size: np.arange(size // jax.process_count())
        with processes.main_first("data"):
            run = build.make_run(build.saved_config(config), workdir)
        batches, hashes = run.device_batches(int(first)), []
        for _ in range(int(steps)):
            batch = processes.fetch(next(batches))
            digest = hashlib.sha256()
            for key in sorted(batch):
                digest.update(key.encode() + np.ascontiguousarray(batch[key]).tobytes())
            hashes.append(digest.hexdigest())
        print("RESULT", json.dumps(hashes), flush=True)

define_process_flags()
app.run(main)
"""
NUM_BATCHES = 3


def whole_hashes(config_path, workdir, steps):
    """The hashes of the batches of these steps by one process alone, before any device."""
    run = build.make_run(
        build.saved_config(config_path), workdir, mesh=meshes.make_mesh(devices=jax.devices()[:1])
    )
    hashes = []
    for step in steps:
        batch, digest = run.train_batches[step], hashlib.sha256()
        for key in sorted(batch):
            digest.update(key.encode() + np.ascontiguousarray(batch[key]).tobytes())
        hashes.append(digest.hexdigest())
    return hashes


def check_stream(setting, tmp_path, count, devices, first, wrong=False):
    """What all devices hold of batches `first`, … is what one process alone would read, whatever ran before."""
    config, _ = setting
    arguments = [str(config), str(tmp_path / "run"), str(first), str(NUM_BATCHES), str(int(wrong))]
    printed = run([sys.executable, "-c", HASHES, *arguments], count, devices)
    wanted = whole_hashes(config, tmp_path / "alone", range(first, first + NUM_BATCHES))
    assert len(set(wanted)) == NUM_BATCHES
    for out, _ in printed:
        (line,) = [x for x in out.splitlines() if x.startswith("RESULT ")]
        assert json.loads(line.removeprefix("RESULT ")) == wanted


def test_the_devices_of_two_processes_hold_the_batches_of_one(setting, tmp_path):
    check_stream(setting, tmp_path, 2, 2, first=5)


def test_the_streams_check_fails_if_every_process_reads_the_first_rows(setting, tmp_path):
    with pytest.raises(AssertionError):
        check_stream(setting, tmp_path, 2, 2, first=5, wrong=True)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices", "first"), [(1, 4, 0), (4, 1, 0), (4, 2, 7)])
def test_the_devices_of_four_processes_hold_the_batches_of_one(setting, tmp_path, count, devices, first):
    check_stream(setting, tmp_path, count, devices, first)


# ---------------------------------------------------------------- ends


@pytest.mark.slow
@pytest.mark.smoke
def test_four_are_two_are_one(setting, tmp_path):
    """Four processes, of which one is killed; two, which are all killed; one, which ends as the unbroken run does."""
    config, whole = setting
    workdir = tmp_path / "run"
    four = start(command_of(config, workdir), 4)
    wait_for(workdir, four, lines=5)
    four[2].send_signal(signal.SIGKILL)
    check_survivors(four, victim=2)
    steps = [int(find_step(workdir).name)]

    two = start(command_of(config, workdir), 2)
    wait_for(workdir, two, lines=12)
    for child in two:
        child.send_signal(signal.SIGKILL)
    finish(two)
    steps.append(int(find_step(workdir).name))
    assert 0 < steps[0] <= steps[1] < 40

    run(command_of(config, workdir, "--config.mesh.fsdp=1"), 1)
    check_same_curve(workdir, whole)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_survivors_end_when_the_network_is_gone(setting, tmp_path, victim):
    """A stopped process closes no connection: it is missed by its heartbeat alone. Process 0 keeps the list of the living."""
    config, _ = setting
    children = start(command_of(config, tmp_path / "run", "--config.num_train_steps=4000"), 3)
    wait_for(tmp_path / "run", children, lines=5)
    children[victim].send_signal(signal.SIGSTOP)
    check_survivors(children, victim)


@pytest.mark.slow
def test_a_run_with_different_flags_is_refused(setting, tmp_path):
    """Each process says how its config differs from that of process 0, and none is left waiting."""
    config, _ = setting
    children = start(command_of(config, tmp_path / "run"), 1) * 0
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for i, rate in enumerate(("0.1", "0.2")):
        flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}"]
        flags += [f"--config.optimizer.learning_rate={rate}"]
        children.append(
            subprocess.Popen(
                command_of(config, tmp_path / "run", *flags),
                env=tiny.environment(2),
                cwd=tiny.ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    (_, _, first), (_, err, second) = finish(children)
    assert (first, second) == (processes.PEER_LOST, processes.FAILED)
    assert "optimizer.learning_rate: 0.1 -> 0.2" in err
    assert "another config than process 0" in err
    assert read_metrics  # the run never began
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
