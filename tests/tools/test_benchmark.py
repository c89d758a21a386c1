"""The benchmark's figures: what they are made of, and that each alternation gives each side its turns."""

import json

import jax
import pytest

from jaxlm import build
from tests import tiny
from tools import benchmark


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    store = tiny.make_store(tmp_path_factory.mktemp("text") / "store")
    return tiny.tiny_config("configs/gpt.py:nanogpt", store)


def test_each_side_gets_as_many_steps_in_turn():
    turns = []
    sides = [lambda name=name: turns.append(name) or 0.0 for name in "ab"]
    seconds = benchmark.alternate(sides, 7)
    assert [len(s) for s in seconds] == [7, 7]
    assert "".join(turns) == "aabb" * 2 + "ab" * 3


def test_speed_follows_from_the_median_step():
    speed = benchmark.describe([1.0, 2.0, 100.0], tokens=10, flops=8.0, peak=2.0)
    assert speed["tokens_per_second"] == 5.0
    assert speed["mfu"] == 2.0


def test_a_train_benchmark_reports_every_figure(config, tmp_path):
    report = benchmark.benchmark_train(config, tmp_path, steps=3, peak_sizes=(64,))
    assert report["tokens_per_step"] == 8 * 32
    assert report["tokens_per_second"] * report["step_seconds"] == pytest.approx(8 * 32)
    assert 0 < report["mfu"] and 0 <= report["input_wait"] < 1
    assert report["peak_memory_bytes"] > 1e6 and "matmul" in report["peak_of"]
    assert json.loads(json.dumps(report)) == report


def test_the_masked_head_saves_flops_as_counted_by_xla_and_analytically():
    """BERT-base at 15%: at least 15% fewer FLOPs a step; the analytic count is within 2%."""
    config = build.read_config(
        str(tiny.ROOT / "configs/bert.py:base"), {"batch_size": 8, "seq_len": 128}
    )
    report = benchmark.benchmark_mlm_flops(config)
    assert report["saving"] >= 0.15
    assert abs(report["masked_analytic_error"]) < 0.02
    assert abs(report["all_analytic_error"]) < 0.02


def test_the_chunked_loss_is_measured_beside_the_plain_one():
    report = benchmark.benchmark_cross_entropy(2, tokens=64, width=16, vocab_size=512)
    assert report["chunked_seconds"] > 0 and report["plain_seconds"] > 0
    assert report["plain_temporary_bytes"] > 0


def test_a_peak_is_a_rate_that_this_machine_reached():
    peaks = benchmark.measure_peak((64,), repeats=2)
    assert {name.split()[0] for name in peaks} >= {"jax", "numpy"}
    assert all(1e6 < value < 1e15 for value in peaks.values())
    assert jax.devices()[0].platform == "cpu"
