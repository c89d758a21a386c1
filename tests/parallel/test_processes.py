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

from jaxlm import build, config_files
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel import processes
from jaxlm.pretrain import pretrain
from jaxlm.training.checkpoints import find_step
from tests import tiny
from tests.training.test_profile import traced_steps

SPEC = "configs/gpt.py:tiny"
WORDS = {"aa": "fruit", "zz": "tool"}
HEARTBEAT = 10  # seconds
# Of eval lines and train lines; float32 sums of other shards in another order.
TOLERANCE = dict(rtol=2e-4, atol=1e-6)


def start(command, count, devices=1, own_flags=(), heartbeat=HEARTBEAT):
    """The processes of one run, on a free port of this machine. own_flags: of each process, besides its number."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
    flags += [f"--heartbeat_timeout={heartbeat}"]
    own_flags = own_flags or [[f"--process_id={i}"] for i in range(count)]
    return [
        subprocess.Popen(
            command + (flags + own_flags[i] if count > 1 else []),
            env=tiny.environment(devices),
            cwd=tiny.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(children, timeout=900):
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
    """Until the run has logged that many lines and has a checkpoint; a run that does not get there is ended."""
    deadline, metrics = time.monotonic() + 900, workdir / "metrics.jsonl"
    while time.monotonic() < deadline and all(child.poll() is None for child in children):
        if metrics.exists() and metrics.read_text().count("\n") >= lines:
            if any((workdir / "checkpoints").glob("[0-9]*/manifest")):
                return
        time.sleep(0.01)
    for child in children:
        child.kill()
    raise AssertionError([child.communicate() for child in children])


def check_same_curve(workdir, whole, lines=None):
    """Equal steps in an equal order, each once, and equal numbers. lines: how many have to be there; None: all."""
    found, wanted = tiny.learned(workdir)[:lines], tiny.learned(whole)[:lines]
    where = lambda lines: [(line["step"], line["split"]) for line in lines]
    assert where(found) == where(wanted)
    for line, reference in zip(found, wanted, strict=True):
        assert line.keys() == reference.keys()
        for name, value in reference.items():
            if isinstance(value, float):
                np.testing.assert_allclose(line[name], value, err_msg=name, **TOLERANCE)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(config.json on a prepared store, the workdir of the unbroken run by this process)."""
    root = tmp_path_factory.mktemp("processes")
    config = tiny.tiny_config(
        SPEC,
        tiny.make_store(root / "store"),
        num_train_steps=40,
        log_every_steps=2,
        eval_every_steps=20,
        checkpoint_every_steps=8,
        mesh__fsdp=2,
        eval__prompts=(),
        eval__num_batches=1,
        optimizer__learning_rate=1e-3,
        # So low that steps are left out: by all processes, the same ones.
        guards__spike_factor=1.1,
        guards__spike_window=8,
    )
    path = root / "config.json"
    build.write_config(config, path)
    pretrain(config, root / "whole")
    return path, root / "whole"


def test_the_curves_check_fails_for_another_curve_and_for_a_step_twice(setting, tmp_path):
    _, whole = setting
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    first = json.loads(lines[0])
    changed = json.dumps(first | {"loss": first["loss"] * 1.01}) + "\n"
    for wrong in ([changed, *lines[1:]], [*lines, lines[-1]]):
        (tmp_path / "metrics.jsonl").write_text("".join(wrong))
        with pytest.raises(AssertionError):
            check_same_curve(tmp_path, whole)


XLA_ABORT = -signal.SIGABRT  # a shell's 134


def check_survivors(children, victim):
    """All but the victim say what happened and end with a status for it, in time: theirs, or XLA's if it was faster."""
    started = time.monotonic()
    survivors = [child for i, child in enumerate(children) if i != victim]
    results = finish(survivors, timeout=3 * HEARTBEAT + 30)
    assert time.monotonic() - started < 3 * HEARTBEAT
    for _, err, status in results:
        if status == XLA_ABORT:
            assert "This most likely indicates that another task died" in err, err
            continue
        assert status == processes.PEER_LOST, (status, err)
        (line,) = [x for x in err.splitlines() if "another process has ended" in x]
        assert f"status {processes.PEER_LOST}" in line
        assert "Traceback" not in err, err[-3000:]
    children[victim].kill()
    children[victim].communicate()


def test_two_processes_run_as_one_until_one_is_killed(setting, tmp_path):
    """Guards included: steps that are computed twice give the same bits, and spikes are the same steps."""
    config, whole = setting
    workdir = tmp_path / "run"
    flags = ["--profile_steps=3:5", "--config.guards.self_check_every_steps=4"]
    children = start(tiny.pretrain_command(config, workdir, *flags), 2, devices=2)
    wait_for(workdir, children, lines=6)
    children[1].send_signal(signal.SIGKILL)
    check_survivors(children, victim=1)
    assert 0 < int(find_step(workdir).name) < 40
    check_same_curve(workdir, whole, lines=6)
    assert any(line["spikes"] for line in tiny.learned(workdir)[:6])
    assert json.loads((workdir / "environment.json").read_text())["processes"] == 2
    assert traced_steps(workdir / "profile") == {3, 4, 5}


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
        from jaxlm import build, config_files
        if int(wrong):
            meshes.local_rows = lambda mesh, size: np.arange(size // jax.process_count())
        with processes.main_first("data"):
            run = build.make_run(config_files.saved_config(config), workdir)
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
        config_files.saved_config(config_path),
        workdir,
        mesh=meshes.make_mesh(devices=jax.devices()[:1]),
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


@pytest.mark.slow
def test_the_streams_check_fails_if_every_process_reads_the_first_rows(setting, tmp_path):
    with pytest.raises(AssertionError):
        check_stream(setting, tmp_path, 2, 2, first=5, wrong=True)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices", "first"), [(1, 4, 0), (4, 1, 0), (4, 2, 7)])
def test_the_devices_of_four_processes_hold_the_batches_of_one(
    setting, tmp_path, count, devices, first
):
    check_stream(setting, tmp_path, count, devices, first)


# ---------------------------------------------------------------- ends


@pytest.mark.slow
@pytest.mark.smoke
def test_four_are_two_are_one(setting, tmp_path):
    """Four processes, of which one is killed; two, which are all killed; one, which ends as the unbroken run does."""
    config, whole = setting
    workdir = tmp_path / "run"
    four = start(tiny.pretrain_command(config, workdir), 4)
    wait_for(workdir, four, lines=5)
    four[2].send_signal(signal.SIGKILL)
    check_survivors(four, victim=2)
    steps = [int(find_step(workdir).name)]

    two = start(tiny.pretrain_command(config, workdir), 2)
    wait_for(workdir, two, lines=12)
    for child in two:
        child.send_signal(signal.SIGKILL)
    finish(two)
    steps.append(int(find_step(workdir).name))
    assert 0 < steps[0] <= steps[1] < 40

    run(tiny.pretrain_command(config, workdir, "--config.mesh.fsdp=1"), 1)
    check_same_curve(workdir, whole)


@pytest.mark.slow
def test_layers_on_the_stages_of_two_processes_have_the_curve_of_one(setting, tmp_path):
    config, whole = setting
    flags = ("--config.mesh.data=1", "--config.mesh.stage=2", "--config.mesh.fsdp=2")
    run(tiny.pretrain_command(config, tmp_path / "run", *flags), 2, devices=2)
    check_same_curve(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_survivors_end_when_the_network_is_gone(setting, tmp_path, victim):
    """A stopped process closes no connection: it is missed by its heartbeat alone. Process 0 keeps the list of the living."""
    config, _ = setting
    children = start(
        tiny.pretrain_command(config, tmp_path / "run", "--config.num_train_steps=4000"), 4
    )
    wait_for(tmp_path / "run", children, lines=5)
    children[victim].send_signal(signal.SIGSTOP)
    check_survivors(children, victim)


@pytest.mark.slow
def test_a_run_with_different_flags_is_refused(setting, tmp_path):
    """Each process says how its config differs from that of process 0, and none is left waiting."""
    config, _ = setting
    rates = "--config.optimizer.learning_rate=0.1", "--config.optimizer.learning_rate=0.2"
    own_flags = [[f"--process_id={i}", rate] for i, rate in enumerate(rates)]
    command = tiny.pretrain_command(config, tmp_path / "run")
    (_, _, first), (_, err, second) = finish(start(command, 2, 2, own_flags))
    assert (first, second) == (processes.PEER_LOST, processes.FAILED)
    assert "optimizer.learning_rate: 0.1 -> 0.2" in err
    assert "another config than process 0" in err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_two_processes_leave_the_files_of_one(setting, tmp_path):
    """Samples, pictures and all else once; what is printed, by process 0."""
    config, _ = setting
    flags = ["--config.eval.prompts=('a','bc')", "--config.num_train_steps=10"]
    flags += ["--config.log.tensorboard=True"]
    run(tiny.pretrain_command(config, tmp_path / "one", *flags), 1, devices=4)
    printed = run(tiny.pretrain_command(config, tmp_path / "two", *flags), 2, devices=2)
    names = [
        sorted(
            str(path.relative_to(workdir)).split("tfevents")[0]
            for path in workdir.rglob("*")
            if path.is_file() and "checkpoints" not in path.parts
        )
        for workdir in (tmp_path / "one", tmp_path / "two")
    ]
    assert names[0] == names[1] and len(set(names[0])) == len(names[0])
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("one", "two")]
    assert samples[0] == samples[1] and len(samples[0].splitlines()) == 2
    main, other = (out + err for out, err in printed)
    assert "parameters on 4 x" in main and "parameters" not in other


# ---------------------------------------------------------------- fine-tuning


@pytest.mark.slow
def test_two_processes_fine_tune_as_one(tmp_path):
    """One report with one score, written once, whatever the number of processes."""
    encoder = tiny.tiny_config("configs/bert.py:tiny", tiny.make_store(tmp_path / "store"))
    tiny.save_untrained(encoder, tmp_path / "encoder")
    rows = [f"the {word * n},{label}" for n in range(1, 7) for word, label in WORDS.items()]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows * 2]) + "\n")
    command = [
        *(sys.executable, "-m", "jaxlm.finetune"),
        f"--config=configs/finetune/classification.py:train={tmp_path}/rows.csv",
        f"--config.init_from={tmp_path}/encoder",
        *("--config.seq_len=32", "--config.batch_size=8", "--config.num_epochs=4.0"),
        *("--config.optimizer.learning_rate=0.01", "--config.data.dev_fraction=0.25"),
        *("--config.log.progress=False", "--config.log.tensorboard=False"),
        *("--config.dropout_rate=0.0", "--config.mesh.fsdp=2"),
    ]
    run([*command, f"--workdir={tmp_path}/one"], 1, devices=4)
    (main, _), (other, _) = run([*command, f"--workdir={tmp_path}/two"], 2, devices=2)
    one, two = (json.loads((tmp_path / x / "report.json").read_text()) for x in ("one", "two"))
    assert two["step"] == one["step"] and two["records"] == one["records"]
    for name, value in one["dev"].items():
        np.testing.assert_allclose(two["dev"][name], value, rtol=1e-3, err_msg=name)
    check_same_curve(tmp_path / "two", tmp_path / "one")
    predictions = [
        [json.loads(x)["prediction"]["label"] for x in path.read_text().splitlines()]
        for path in (tmp_path / "one/predictions.jsonl", tmp_path / "two/predictions.jsonl")
    ]
    assert predictions[0] == predictions[1]
    assert "accuracy" in main and "accuracy" not in other


@pytest.mark.slow
def test_two_processes_write_by_beams_as_one(tmp_path):
    """The same translations in predictions.jsonl, though each process has the probabilities of its own rows."""
    spec = "configs/t5.py:tiny,objective=seq2seq_prefix_lm,optimizer=adamw"
    pretrained = tiny.tiny_config(spec, tiny.make_store(tmp_path / "store"), model__num_layers=1)
    tiny.save_untrained(pretrained, tmp_path / "t5")
    lines = [f"{a} {b}" for a in WORDS for b in ("cc", "dd", "ee", "ff")]
    (tmp_path / "x.en").write_text("\n".join(lines) + "\n")
    (tmp_path / "x.de").write_text("\n".join(line.upper() for line in lines) + "\n")
    command = [
        *(sys.executable, "-m", "jaxlm.finetune", "--config=configs/finetune/translation.py"),
        f"--config.data.train={tmp_path}/x.en+{tmp_path}/x.de",
        f"--config.init_from={tmp_path}/t5",
        *("--config.seq_len=32", "--config.task.target_len=8", "--config.batch_size=4"),
        *("--config.num_epochs=1.0", "--config.data.dev_fraction=0.5", "--config.eval.num_beams=2"),
        *("--config.eval.batch_size=4", "--config.dropout_rate=0.0", "--config.mesh.fsdp=2"),
        *("--config.log.progress=False", "--config.log.tensorboard=False"),
    ]
    run([*command, f"--workdir={tmp_path}/one"], 1, devices=2)
    run([*command, f"--workdir={tmp_path}/two"], 2, devices=1)
    one, two = (
        [json.loads(x)["prediction"] for x in path.read_text().splitlines()]
        for path in (tmp_path / "one/predictions.jsonl", tmp_path / "two/predictions.jsonl")
    )
    assert one == two and len(one) == len(lines) // 2
