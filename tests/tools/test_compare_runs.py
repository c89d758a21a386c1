"""Comparing runs, from config.json and metrics.jsonl alone."""

import json
import math
import statistics

import pytest

from tools import compare_runs


def write_run(workdir, *, seed=0, learning_rate=0.1, losses=(3.0, 2.0, 2.5), **config):
    workdir.mkdir(parents=True)
    config = {"seed": seed, "optimizer": {"name": "adamw", "learning_rate": learning_rate}} | config
    (workdir / "config.json").write_text(json.dumps(config))
    lines = []
    for i, loss in enumerate(losses):
        step = 10 * (i + 1)
        lines.append(
            {
                "step": step,
                "split": "train",
                "loss": loss,
                "tokens_per_second": 100.0 * step,
                "seconds": step,
            }
        )
        lines.append(
            {"step": step, "split": "eval", "params": "raw", "loss": loss, "accuracy": -loss}
        )
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def test_final_is_the_last_and_best_is_the_best(tmp_path):
    run = compare_runs.summarize(write_run(tmp_path / "a"))
    assert run.final["loss"] == (2.5, 30) and run.best["loss"] == (2.0, 20)
    assert run.final["accuracy"] == (-2.5, 30) and run.best["accuracy"] == (-2.0, 20)
    assert run.tokens_per_second == 2000 and run.seconds == 30


def test_a_nan_is_never_best(tmp_path):
    run = compare_runs.summarize(write_run(tmp_path / "a", losses=(math.nan, 2.0, math.nan)))
    assert run.best["loss"] == (2.0, 20) and math.isnan(run.final["loss"][0])


def test_only_differing_fields_are_listed(tmp_path):
    runs = [
        compare_runs.summarize(write_run(tmp_path / "a", learning_rate=0.1)),
        compare_runs.summarize(write_run(tmp_path / "b", learning_rate=0.2, ema_decay=0.9)),
    ]
    assert compare_runs.differing_fields(runs) == {
        "ema_decay": ["absent", 0.9],
        "optimizer.learning_rate": [0.1, 0.2],
    }


def check_grouping(seed_groups, tmp_path):
    """Runs are grouped over seeds, and over nothing else."""
    workdirs = [
        write_run(tmp_path / "a0", seed=0, learning_rate=0.1),
        write_run(tmp_path / "b0", seed=0, learning_rate=0.2),
        write_run(tmp_path / "a1", seed=1, learning_rate=0.1),
    ]
    groups = seed_groups([compare_runs.summarize(w, w.name) for w in workdirs])
    assert [[run.name for run in group] for group in groups] == [["a0", "a1"], ["b0"]]


def test_groups_are_over_seeds_only(tmp_path):
    check_grouping(compare_runs.seed_groups, tmp_path / "right")
    with pytest.raises(AssertionError):
        check_grouping(lambda runs: [list(runs)], tmp_path / "wrong")


def test_mean_and_sd_over_seeds_are_printed(tmp_path, capsys):
    lasts = (2.0, 2.2, 2.7)
    workdirs = [
        write_run(tmp_path / f"s{seed}", seed=seed, losses=(3.0, last))
        for seed, last in enumerate(lasts)
    ]
    assert compare_runs.main([*map(str, workdirs), "--metrics=loss"]) == 0
    out = capsys.readouterr().out
    assert f"{statistics.fmean(lasts):.4f} ± {statistics.stdev(lasts):.4f}" in out
    assert "3 (0,1,2)" in out


def test_the_report_shows_the_diff_and_every_run(tmp_path, capsys):
    workdirs = [
        write_run(tmp_path / "a", learning_rate=0.1),
        write_run(tmp_path / "b", learning_rate=0.2, losses=(3.0, 1.0)),
    ]
    assert compare_runs.main([*map(str, workdirs)]) == 0
    out = capsys.readouterr().out
    assert "optimizer.learning_rate  0.1  0.2" in out
    assert "2.0000 @ 20" in out and "1.0000 @ 20" in out
    assert "over seeds" not in out


def test_one_run_alone_is_reported(tmp_path, capsys):
    assert compare_runs.main([str(write_run(tmp_path / "a"))]) == 0
    assert "2.5000 @ 30" in capsys.readouterr().out


def test_what_is_missing_is_named(tmp_path, capsys):
    assert compare_runs.main([str(tmp_path / "none")]) == 2
    assert "none/metrics.jsonl" in capsys.readouterr().err
    assert compare_runs.main([str(write_run(tmp_path / "a")), "--metrics=lozz"]) == 2
    assert "lozz" in capsys.readouterr().err
