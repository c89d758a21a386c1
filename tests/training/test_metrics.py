"""Metrics are sums that are divided once; files hold each step once."""

import json
import math

import jax.numpy as jnp
import pytest

from jaxlm.training.metrics import (
    MetricSums,
    MetricWriter,
    drop_after,
    one_behind,
    read_metrics,
    usual_mode,
    with_perplexity,
)


def pair(total, weight):
    return jnp.float32(total), jnp.float32(weight)


def check_regrouping(make_sums):
    """The mean over all tokens, not the mean of the batches' means."""
    sums = make_sums()
    sums.add({"loss": pair(10.0, 1.0)})
    sums.add({"loss": pair(10.0, 9.0)})
    assert sums.means()["loss"] == 2.0


def test_the_mean_does_not_depend_on_the_grouping():
    check_regrouping(MetricSums)


def test_the_grouping_law_fails_for_a_mean_of_means():
    class MeanOfMeans(MetricSums):
        def add(self, metrics):
            super().add({k: (t / w, jnp.float32(1)) for k, (t, w) in metrics.items()})

    with pytest.raises(AssertionError):
        check_regrouping(MeanOfMeans)


def test_a_metric_without_weight_is_left_out():
    sums = MetricSums()
    sums.add({"loss": pair(0.0, 0.0), "accuracy": pair(1.0, 2.0)})
    assert sums.means() == {"accuracy": 0.5}


def test_the_learning_rate_is_the_last_one():
    sums = MetricSums()
    for rate in (1.0, 3.0):
        sums.add({"learning_rate": pair(rate, 1.0)})
    assert sums.means() == {"learning_rate": 3.0}


def test_sums_survive_json_exactly():
    sums = MetricSums()
    sums.add({"loss": pair(1 / 3, 7.0)})
    again = MetricSums(json.loads(json.dumps(sums.sums)))
    assert again.means() == sums.means()


def test_perplexity_of_a_diverged_model_is_infinite_and_no_error():
    assert with_perplexity({"nll": 0.0})["perplexity"] == 1.0
    assert math.isinf(with_perplexity({"nll": 1e6})["perplexity"])


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    first = MetricWriter(tmp_path, tensorboard=False)
    for step in (10, 20, 30):
        first.write(step, "train", {"loss": float(step)})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 40, "spl')  # cut off by a kill
    resumed = MetricWriter(tmp_path, start_step=20, tensorboard=False)
    resumed.write(30, "train", {"loss": -1.0})
    resumed.close()
    assert [(m["step"], m["loss"]) for m in read_metrics(tmp_path)] == [
        (10, 10),
        (20, 20),
        (30, -1),
    ]


def test_a_line_cut_off_by_a_kill_is_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_line_may_hold_what_python_calls_the_end_of_one(tmp_path):
    samples = tmp_path / "samples.jsonl"
    lines = [{"step": step, "text": "a\u2028b\x85c"} for step in (1, 2)]
    samples.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    drop_after(samples, 1)
    assert [json.loads(x) for x in samples.read_text().split("\n")[:-1]] == lines[:1]


def test_what_is_best_follows_from_a_metrics_name():
    least = ("loss", "nll", "mlm_loss", "books/bits_per_byte", "perplexity", "mse", "dropped_share")
    most = (
        "accuracy",
        "pair_accuracy",
        "entity_f1",
        "bleu",
        "chrf",
        "rouge1",
        "margin",
        "spearman",
    )
    assert {usual_mode(name) for name in least} == {"min"}
    assert {usual_mode(name) for name in most} == {"max"}


def test_dropping_lines_of_a_missing_file_does_nothing(tmp_path):
    drop_after(tmp_path / "nothing.jsonl", 0)
    assert not list(tmp_path.iterdir())


def test_tensorboard_events_are_written(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, "train", {"loss": 1.0, "params": "raw"})
    writer.close()
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_what_was_launched_is_read_one_behind_and_all_of_it():
    events = []

    def launch():
        for number in range(3):
            events.append(f"launch {number}")
            yield number

    for number in one_behind(launch()):
        events.append(f"read {number}")
    assert events == ["launch 0", "launch 1", "read 0", "launch 2", "read 1", "read 2"]
    assert list(one_behind([])) == []
