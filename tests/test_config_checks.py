"""Fields that would do harm in silence are refused before a run begins."""

import jax
import pytest

from jaxlm import config_checks, config_files
from jaxlm.parallel.mesh import make_mesh
from jaxlm.planning.compiling import stand_in_tokenizer
from tests import tiny

HARMFUL = {
    "optimizer.grad_clip_norm": (-1.0, "0 or more"),  # turns every gradient around
    "checkpoint.keep_last": (0, "1 or more"),  # removes the newest, too
    "checkpoint.keep_every": (-1, "0 or more"),
    "guards.watchdog_seconds": (-1, "0 or more"),
    "guards.self_check_every_steps": (-1, "0 or more"),
    "param_dtype": ("auto", "one of float32"),
}


@pytest.mark.parametrize("spec", ["gpt.py:tiny", "finetune/classification.py:train=a.csv"])
def test_what_would_do_harm_is_refused_all_at_once(spec):
    values = {name: value for name, (value, _) in HARMFUL.items()}
    config = config_files.read_config(f"{tiny.ROOT}/configs/{spec}", values)
    lines = config_checks.range_problems(config)
    assert len(lines) == len(HARMFUL)
    for name, (value, repair) in HARMFUL.items():
        assert any(name in line and str(value) in line and repair in line for line in lines), name


def test_an_average_that_would_stand_still_is_refused():
    config = config_files.read_config(f"{tiny.ROOT}/configs/gpt.py:tiny", {"ema_decay": 0.999})
    assert config_checks.range_problems(config) == []
    config.param_dtype = "bfloat16"
    assert "stands still" in config_checks.range_problems(config)[0]


def test_learned_positions_are_asked_for_by_the_decoders_row_too():
    config = config_files.read_config(f"{tiny.ROOT}/configs/bart.py:tiny", {})
    mesh = make_mesh(devices=jax.devices()[:1])
    tokenizer, most = stand_in_tokenizer(config.model.vocab_size), config.model.max_len
    config_checks.check_config(config, mesh, tokenizer, most)
    with pytest.raises(ValueError, match=r"row of 257, which is longer.*max_len=257 or more"):
        config_checks.check_config(config, mesh, tokenizer, most + 1)
