"""A resumed run is the unbroken one, or it is refused; and the law that says so can fail. Kills are in test_kill.py."""

import re
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxlm.training.checkpoints import find_step
from tests import tiny
from tests.faults.runs import arrays, check_same_run


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
