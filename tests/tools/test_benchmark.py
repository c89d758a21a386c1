"""The benchmark's numbers fit together, and its comparisons compare what they say."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxlm import config_files
from jaxlm.objectives import losses
from tests import tiny
from tools import benchmark, torch_reference
from tools.checkpoint_cost import checkpoint_cost


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny.make_store(tmp_path_factory.mktemp("text") / "store")


def check_report(report, config, steps):
    """Speed, time, FLOPs and MFU are the same measurement."""
    tokens = config.batch_size * config.seq_len
    seconds = report["step_seconds"]
    assert report["tokens_per_step"] == tokens
    assert report["tokens_per_second"] == pytest.approx(tokens / seconds)
    assert report["mfu"] == pytest.approx(report["flops_per_step"] / seconds / report["peak_flops"])
    assert seconds > 0 and report["step_seconds_spread"] >= 0 and report["compile_seconds"] > 0
    assert 0 <= report["input_wait"] <= 1
    assert report["peak_memory_bytes"] > 4 * report["num_params"]


def test_a_train_report_holds_speed_time_memory_and_mfu_that_agree(store, tmp_path):
    config = tiny.tiny_config("configs/gpt.py:gpt2", store)
    report = benchmark.benchmark_train(config, tmp_path / "run", 3, peak_sizes=(64,))
    check_report(report, config, 3)
    assert "64" in report["peak_of"]
    with pytest.raises(AssertionError):
        check_report(report | {"mfu": 2 * report["mfu"]}, config, 3)


@pytest.mark.oracles
@pytest.mark.parametrize("spec", ["configs/gpt.py:gpt2", "configs/bert.py:tiny"])
def test_against_torch_reports_both_and_the_ratio_of_their_medians(spec, store, tmp_path):
    pytest.importorskip("transformers")
    config = tiny.tiny_config(spec, store)
    report = benchmark.benchmark_train(config, tmp_path / "run", 2, "torch", peak_sizes=(64,))
    theirs = report["torch"]["step_seconds"]
    assert report["ratio"] == pytest.approx(theirs / report["step_seconds"])


def check_decode(found, seconds, rows, prompt_len):
    """By medians: the first token is the prompts', each further one is one of every row."""
    first, rest = seconds[:, 0], seconds[:, 1:]
    assert found["prefill"] == pytest.approx(rows * prompt_len / np.median(first))
    assert found["decode"] == pytest.approx(rows / np.median(rest))
    assert found["late_token"] == pytest.approx(3.0)


def test_tokens_per_second_are_of_the_median_token_and_late_ones_are_told():
    seconds = np.array([[9.0] + [1.0] * 8 + [2.0] * 8 + [3.0] * 8] * 3)
    found = benchmark.describe_decode(seconds, 8, 128)
    check_decode(found, seconds, 8, 128)
    with pytest.raises(AssertionError):
        check_decode(benchmark.describe_decode(seconds[:, 1:], 8, 128), seconds, 8, 128)


DECODE = dict(prompt_len=5, new_tokens=4, batch_sizes=(2,))


def test_a_decode_report_is_of_each_batch(store):
    config = tiny.tiny_config("configs/gpt.py:gpt2", store)
    report = benchmark.benchmark_decode(config, 2, **DECODE)
    assert report["batch_2"]["prefill"] > 0 and report["batch_2"]["decode"] > 0


@pytest.mark.oracles
def test_decoding_against_torch_reports_both_and_their_ratios(store):
    pytest.importorskip("transformers")
    config = tiny.tiny_config("configs/gpt.py:gpt2", store)
    found = benchmark.benchmark_decode(config, 2, "torch", **DECODE)["batch_2"]
    assert found["decode_ratio"] == pytest.approx(found["decode"] / found["torch"]["decode"])
    assert found["prefill_ratio"] == pytest.approx(found["prefill"] / found["torch"]["prefill"])


@pytest.mark.oracles
@pytest.mark.parametrize("spec", ["configs/gpt.py:gpt2", "configs/bert.py:base"])
def test_torchs_model_has_our_number_of_parameters(spec):
    transformers = pytest.importorskip("transformers")
    sizes = config_files.read_config(str(tiny.ROOT / spec)).model
    sizes.num_layers = 1
    make = torch_reference.make_gpt2 if "gpt" in spec else torch_reference.make_bert
    theirs = sum(p.numel() for p in make(transformers, sizes).parameters())
    layer = 12 * sizes.emb_dim**2 + 13 * sizes.emb_dim
    rest = (sizes.vocab_size + sizes.max_len) * sizes.emb_dim + 2 * sizes.emb_dim
    if "bert" in spec:  # token types, the masked-token head and its output bias
        rest += 2 * sizes.emb_dim + sizes.emb_dim**2 + 3 * sizes.emb_dim + sizes.vocab_size
    assert theirs == layer + rest


def test_a_model_that_transformers_has_not_is_refused_with_all_reasons():
    with pytest.raises(ValueError) as error:
        torch_reference.check_has_twin(
            config_files.read_config(str(tiny.ROOT / "configs/gpt.py:tiny"))
        )
    for field in ("position", "norm", "activation", "num_kv_heads", "qk_norm"):
        assert f"model.{field}: found" in str(error.value)


def test_each_side_gets_as_many_steps_in_turn():
    calls = []
    steppers = [lambda: calls.append("a") or 1.0, lambda: calls.append("b") or 2.0]
    seconds = benchmark.alternate(steppers, 10)
    assert "".join(calls) == "aabb" * 5
    assert seconds == [[1.0] * 10, [2.0] * 10]
    assert [len(times) for times in benchmark.alternate(steppers, 7)] == [7, 7]


def test_the_peak_is_measured_with_each_library_at_each_size():
    peaks = benchmark.measure_peak((32, 64), repeats=1)
    assert {"jax 32", "jax 64", "numpy 32", "numpy 64"} <= set(peaks)
    assert all(value > 0 for value in peaks.values())


def test_chunked_cross_entropy_holds_fewer_temporaries_than_the_plain_one(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_PER_DEVICE", 64 * 500)
    report = benchmark.benchmark_cross_entropy(1, tokens=1024, width=8, vocab_size=500)
    assert report["memory_ratio"] > 3
    assert report["time_ratio"] == report["chunked_seconds"] / report["plain_seconds"]
    monkeypatch.setattr(benchmark, "cross_entropy", losses.plain_cross_entropy)
    same = benchmark.benchmark_cross_entropy(1, tokens=1024, width=8, vocab_size=500)
    assert same["memory_ratio"] == 1


def check_mlm_flops(report):
    """What XLA counts and the analytic count agree within 2%; masked positions save at least 15%."""
    assert abs(report["masked_analytic_error"]) < 0.02
    assert abs(report["all_analytic_error"]) < 0.02
    assert report["saving"] >= 0.15


def test_bert_base_saves_15_percent_of_its_step_at_the_masked_positions(monkeypatch):
    config = config_files.read_config(
        str(tiny.ROOT / "configs/bert.py:base"), {"batch_size": 2, "seq_len": 128}
    )
    check_mlm_flops(benchmark.benchmark_mlm_flops(config))
    with pytest.raises(AssertionError):  # a head at nearly all positions saves little
        check_mlm_flops(benchmark.benchmark_mlm_flops(rate_of(config, 0.9)))


def rate_of(config, rate):
    config = config.copy_and_resolve_references()
    config.objective.rate = rate
    return config


def test_a_checkpoint_report_is_of_one_measurement(tmp_path):
    report = checkpoint_cost(tmp_path, 1, benchmark.alternate, megabytes=8)
    assert report["bytes"] == 8 << 20
    assert report["checksums_gb_per_second"] == pytest.approx(
        report["bytes"] / 1e9 / report["checksums_seconds"]
    )
    assert 0 < report["save_blocks_seconds"] and 0 < report["save_writes_seconds"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_the_command_prints_and_writes_its_report(tmp_path):
    command = [
        *(
            sys.executable,
            "tools/benchmark.py",
            "--mode=mlm_flops",
            "--config=configs/bert.py:tiny",
        ),
        *("--config.batch_size=2", f"--json={tmp_path / 'report.json'}"),
    ]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert "saving" in done.stdout and 0 < report["saving"] < 1
