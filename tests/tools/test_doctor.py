"""The doctor, called to machines, workdirs, stores and launches that are really broken, and to healthy ones."""

import collections
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxlm import doctor
from jaxlm.doctor import FAIL, OK, WARN, Patient, machine, workplace
from tests import tiny


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny.make_store(tmp_path_factory.mktemp("text") / "store")


@pytest.fixture(scope="module")
def config(store):
    return tiny.tiny_config("configs/gpt.py:tiny", store)


def found(patient, *checks):
    """check -> its findings; all checks unless some are named."""
    by_check = collections.defaultdict(list)
    for finding in doctor.examine(patient):
        by_check[finding.check].append(finding)
    assert not checks or set(checks) <= by_check.keys()
    return by_check


def check_found(patient, check, verdict, *words):
    """That check comes to that verdict, in these words, with a mend unless all is well."""
    findings = [
        f
        for f in map(lambda said: doctor.Finding(check, *said), doctor.CHECKS[check](patient))
        if f.verdict == verdict
    ]
    assert findings, f"{check} does not say {verdict}"
    text = "\n".join(f"{f.found} {f.mend}" for f in findings)
    assert all(word in text for word in words), f"{words} are not in: {text}"
    assert all(f.mend for f in findings) == (verdict != OK)


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_nothing_fails_where_all_is_well(config, tmp_path):
    tiny.save_untrained(config, tmp_path / "run")
    findings = found(Patient(tmp_path / "run", config))
    assert findings.keys() == doctor.CHECKS.keys()
    failed = [f for fs in findings.values() for f in fs if f.verdict == FAIL]
    assert not failed, failed
    assert "step 0 is whole" in [f.found for f in findings["run"]]
    assert len(findings["data"]) == 1 and "whole" in findings["data"][0].found
    assert not (tmp_path / "run" / doctor.SCRATCH).exists()


def test_without_a_workdir_and_a_config_the_machine_is_examined():
    assert found(Patient()).keys() == doctor.CHECKS.keys() - {
        "config",
        "workdir",
        "room",
        "run",
        "data",
    }


def test_a_damaged_store_is_named_with_its_file(config, tmp_path):
    broken = tiny.make_store(tmp_path / "store")
    flip(broken / "train-00000.tokens.npy", at=-100)
    changed = config.copy_and_resolve_references()
    changed.data.sources = (f"mine={broken}",)
    said = (FAIL, "train-00000.tokens.npy", "prepare it again")
    check_found(Patient(config=changed), "data", *said)
    own = tiny.make_store(tmp_path / "run" / "store" / "text")
    check_found(Patient(tmp_path / "run"), "data", OK, str(own))
    flip(own / "train-00000.tokens.npy", at=-100)
    check_found(Patient(tmp_path / "run"), "data", *said)


def test_a_damaged_checkpoint_and_tokenizer_are_named(config, tmp_path):
    tiny.save_untrained(config, tmp_path)
    flip(tmp_path / "checkpoints" / "0" / "manifest" / "metadata", at=-20)
    check_found(Patient(tmp_path), "run", FAIL, "checkpoints/0", "jaxlm-tool fsck")
    flip(tmp_path / "tokenizer" / "bytes.txt")
    findings = found(Patient(tmp_path))["run"]
    assert any("tokenizer" in f.found and f.verdict == FAIL for f in findings)


def test_a_workdir_where_nobody_may_write_is_found():
    check_found(
        Patient(Path("/proc/self/run")),
        "workdir",
        FAIL,
        "/proc/self/run",
        "--workdir",
    )


def test_a_workdir_that_is_a_file_is_found(tmp_path):
    (tmp_path / "run").touch()
    check_found(Patient(tmp_path / "run"), "workdir", FAIL, "Not a directory")


def test_a_full_disk_is_found(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a disk of its own")
    try:
        check_found(Patient(tmp_path / "run"), "workdir", FAIL, "No space left", "free some room")
        assert not (tmp_path / "run" / doctor.SCRATCH).exists()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_checkpoints_that_would_not_fit_are_found_before_they_are_written(store, tmp_path):
    large = tiny.tiny_config(
        "configs/gpt.py:tiny", store, model__emb_dim=1 << 16, model__mlp_dim=1 << 22
    )
    check_found(Patient(tmp_path, large), "room", FAIL, "3 more checkpoints take", "--workdir")


@pytest.mark.parametrize(
    "kept, saved, more",
    [
        (dict(), 0, 3),
        (dict(checkpoint__best_metric="loss"), 0, 4),
        (dict(checkpoint__keep_every=400), 0, 13),
        (
            dict(checkpoint__keep_every=300),
            0,
            9,
        ),  # only what is saved, every 200 steps, can be kept
        (dict(checkpoint__keep_every=400), 7, 6),
        (dict(), 7, 1),
    ],
)
def test_room_is_asked_for_all_checkpoints_that_a_run_keeps_and_not_for_those_that_are_there(
    kept, saved, more, store, tmp_path
):
    changes = dict(num_train_steps=4000, checkpoint_every_steps=200) | kept
    config = tiny.tiny_config("configs/gpt.py:tiny", store, **changes)
    for step in range(saved):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    (finding,) = workplace.check_room(Patient(tmp_path, config))
    assert f" {more} more checkpoints take" in finding[1], finding


def test_a_mesh_that_the_devices_do_not_make_is_found(config):
    changed = config.copy_and_resolve_references()
    changed.mesh.fsdp = 3
    findings = found(Patient(config=changed))["config"]
    assert [f.verdict for f in findings] == [FAIL] and "8 devices" in findings[0].found


def test_a_cache_that_cannot_be_written_is_a_warning(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self")
    check_found(Patient(), "cache", WARN, "/proc/self/jaxlm", "XDG_CACHE_HOME")


def install(folder, name, version, *requires):
    """What pip leaves of a package for others to see, and nothing of the package."""
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir()
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    (about / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("packages", "verdict", "words"),
    [
        ([("jax", "0.11.1"), ("flax", "0.12.8")], FAIL, ["flax 0.12.8 uses what jax", "<0.11"]),
        ([("jinja2", "3.1.2")], FAIL, ["sandbox", "CVE-2025-27516"]),
        ([("sentencepiece", "0.2.0")], FAIL, ["CVE-2026-1260"]),
        ([("grain", "0.1.0")], FAIL, ["grain 0.1.0", "requirements.txt asks for grain"]),
        (
            [("orbax-checkpoint", "0.12.8", "jax>=99")],
            FAIL,
            ["orbax-checkpoint 0.12.8 asks for jax>=99"],
        ),
        ([("jaxlib", "0.10.2"), ("jax-cuda12-plugin", "0.10.2")], WARN, ["xla#46225"]),
    ],
)
def test_versions_that_break_together_are_found(packages, verdict, words, tmp_path, monkeypatch):
    for package in packages:
        install(tmp_path, *package)
    monkeypatch.syspath_prepend(str(tmp_path))
    check_found(Patient(), "versions", verdict, *words)


def test_a_device_that_computes_wrongly_is_found(monkeypatch):
    right = jnp.matmul
    monkeypatch.setattr(jnp, "matmul", lambda *a, **k: right(*a, **k).at[3, 5].add(2.0**-3))
    check_found(Patient(), "arithmetic", FAIL, "multiply wrongly", "do not use this machine")


def test_a_machine_that_is_slower_than_it_could_be_is_a_warning(monkeypatch):
    check_found(Patient(), "speed", OK, "GFLOP/s")
    monkeypatch.setattr(machine, "SLOW_CPU", 1e15)
    check_found(Patient(), "speed", WARN, "GFLOP/s", "other work")


# ---------------------------------------------------------------- as a program


def call(*flags, **environment):
    return subprocess.Popen(
        [sys.executable, "tools/doctor.py", *flags],
        env=tiny.environment() | environment,
        cwd=tiny.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(child):
    try:
        return child.communicate(timeout=200)[0]
    finally:
        child.kill()


def test_half_of_a_launchers_environment_is_found():
    child = call(SLURM_JOB_ID="7", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="0")
    text = said(child)
    assert child.returncode == 1, text
    assert "fail  processes" in text and "SLURM_STEP_NODELIST is not set" in text


def test_a_device_that_is_not_there_fails(tmp_path):
    child = call(f"--workdir={tmp_path}", JAX_PLATFORMS="cuda")
    text = said(child)
    assert child.returncode == 1, text
    assert "ok    cache" in text and "fail  devices" in text and "unset JAX_PLATFORMS" in text
    assert "Traceback" not in text


def test_two_processes_join_add_up_and_write_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        flags = [f"--coordinator=localhost:{free.getsockname()[1]}", "--num_processes=2"]
    children = [call(*flags, f"--process_id={i}", f"--workdir={tmp_path}") for i in (0, 1)]
    first, second = map(said, children)
    assert [child.returncode for child in children] == [0, 0], first + second
    assert "2 device(s) have added up" in first and "a checkpoint is written at" in first
    assert "ok " not in second
