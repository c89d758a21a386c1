"""Flags that this machine's compilers do not know, as the compilers themselves say it."""

import os
import subprocess
import sys

import pytest

from jaxlm.parallel.xla_flags import leave_out_unknown_flags


@pytest.mark.core
def test_unknown_flags_are_left_out_and_known_ones_stay():
    known = "--xla_force_host_platform_device_count=2"
    flags = f"--xla_of_no_release=true {known} --xla_nor_this"
    environment = os.environ | {"XLA_FLAGS": flags}
    assert leave_out_unknown_flags(environment) == ["xla_nor_this", "xla_of_no_release"]
    assert environment == os.environ | {"XLA_FLAGS": known}
    # What is left is what jax starts with; all of it would have ended the process.
    look = [sys.executable, "-c", "import jax; print(len(jax.devices()))"]
    assert subprocess.run(look, env=environment, capture_output=True).stdout.strip() == b"2"


def test_a_single_unknown_flag_is_left_out():
    """XLA has another sentence for one than for several."""
    environment = os.environ | {"XLA_FLAGS": "--xla_of_no_release=true"}
    assert leave_out_unknown_flags(environment) == ["xla_of_no_release"]


def test_without_flags_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert leave_out_unknown_flags({"XLA_FLAGS": "", "HOME": "/"}) == []


@pytest.mark.plans
def test_flags_that_libtpu_does_not_know_are_left_out(monkeypatch):
    """No TPU is needed for it: libtpu reads its flags before it looks for chips."""
    known = "--xla_tpu_enable_async_collective_fusion=true"
    environment = os.environ | {
        "JAX_PLATFORMS": "tpu",
        "LIBTPU_INIT_ARGS": f"--xla_tpu_of_no_release=1 {known}",
    }
    assert leave_out_unknown_flags(environment) == ["xla_tpu_of_no_release"]
    assert environment["LIBTPU_INIT_ARGS"] == known
