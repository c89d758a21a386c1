"""Sweeps, with a stand-in for the entrypoint: a module that reads --config.x flags and writes a run."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import sweep

ENTRYPOINT = """
import json, pathlib, sys, time
flags = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
count = workdir / "starts"
count.write_text(str(int(count.read_text()) + 1) if count.exists() else "1")
if flags.get("config.fail_seed") == flags["config.seed"]:
    sys.exit(3)
if flags.get("config.slow"):
    (workdir / "started").write_text("")
    time.sleep(float(flags["config.slow"]))
    (workdir / "ended").write_text("")
config = {"seed": int(flags["config.seed"]), "lr": float(flags["config.lr"])}
(workdir / "config.json").write_text(json.dumps(config))
line = {"step": 1, "split": "eval", "loss": config["lr"] + config["seed"]}
(workdir / "metrics.jsonl").write_text(json.dumps(line) + "\\n")
"""


@pytest.fixture
def entrypoint(tmp_path, monkeypatch):
    (tmp_path / "stand_in_entrypoint.py").write_text(ENTRYPOINT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "stand_in_entrypoint"


def arguments(entrypoint, root, *more):
    return [
        f"--entrypoint={entrypoint}",
        "--config=configs/x.py:tiny",
        f"--workdir={root}",
        *("--grid", "lr=0.5,0.25", "--grid", "seed=0,1"),
        *more,
    ]


def test_every_point_of_the_grid_gets_its_own_workdir(entrypoint, tmp_path, capsys):
    assert sweep.main(arguments(entrypoint, tmp_path / "s")) == 0
    names = sorted(p.name for p in (tmp_path / "s").iterdir())
    assert names == ["lr=0.25,seed=0", "lr=0.25,seed=1", "lr=0.5,seed=0", "lr=0.5,seed=1"]
    config = json.loads((tmp_path / "s" / "lr=0.25,seed=1" / "config.json").read_text())
    assert config == {"seed": 1, "lr": 0.25}
    out = capsys.readouterr().out
    assert "mean ± sd over seeds" in out and "2 (0,1)" in out
    assert f"{1.0:.4f} ± {0.7071:.4f}" in out  # lr 0.5: losses 0.5 and 1.5


def starts(root):
    return {p.parent.name: int(p.read_text()) for p in root.glob("*/starts")}


def test_the_same_command_again_runs_nothing_twice(entrypoint, tmp_path):
    root = tmp_path / "s"
    assert sweep.main(arguments(entrypoint, root)) == 0
    assert sweep.main(arguments(entrypoint, root)) == 0
    assert set(starts(root).values()) == {1}


def test_a_larger_grid_runs_only_what_is_new(entrypoint, tmp_path):
    root = tmp_path / "s"
    assert sweep.main(arguments(entrypoint, root)) == 0
    larger = [a.replace("seed=0,1", "seed=0,1,2") for a in arguments(entrypoint, root)]
    assert sweep.main(larger) == 0
    assert len(starts(root)) == 6 and set(starts(root).values()) == {1}


def test_other_extra_flags_run_again(entrypoint, tmp_path):
    root = tmp_path / "s"
    assert sweep.main(arguments(entrypoint, root)) == 0
    assert sweep.main(arguments(entrypoint, root, "--", "--config.more=1")) == 0
    assert set(starts(root).values()) == {2}


def test_a_failed_run_stops_no_other_is_named_and_is_tried_again(entrypoint, tmp_path, capsys):
    root = tmp_path / "s"
    failing = arguments(entrypoint, root, "--", "--config.fail_seed=0")
    assert sweep.main(failing) == 1
    out = capsys.readouterr().out
    assert "2 of 4 runs failed" in out and "exit code 3" in out and "lr=0.5,seed=0/sweep.log" in out
    assert (root / "lr=0.25,seed=1" / "metrics.jsonl").is_file()
    assert sweep.main(failing) == 1
    assert starts(root)["lr=0.5,seed=0"] == 2 and starts(root)["lr=0.5,seed=1"] == 1


def test_a_killed_sweep_ends_its_run_and_goes_on_when_started_again(entrypoint, tmp_path):
    root = tmp_path / "s"
    slow = arguments(entrypoint, root, "--", "--config.slow=60")
    process = subprocess.Popen(
        [sys.executable, str(Path(sweep.__file__)), *slow],
        cwd=Path(sweep.__file__).parents[1],
        stdout=subprocess.DEVNULL,
    )
    first = root / "lr=0.5,seed=0"
    wait_until((first / "started").exists)
    process.terminate()
    assert process.wait(timeout=20) == 143
    assert not (first / sweep.STATUS).exists() and not (first / "ended").exists()
    assert sweep.main([a.replace("slow=60", "slow=0.01") for a in slow]) == 0
    assert starts(root) == {
        "lr=0.5,seed=0": 2,
        "lr=0.5,seed=1": 1,
        "lr=0.25,seed=0": 1,
        "lr=0.25,seed=1": 1,
    }


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_a_dry_run_prints_the_commands_and_starts_nothing(tmp_path, capsys):
    assert (
        sweep.main(arguments("jaxlm.pretrain", tmp_path / "s", "--dry_run", "--", "--extra=1")) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and not (tmp_path / "s").exists()
    assert lines[1].split()[1:] == [
        "-m",
        "jaxlm.pretrain",
        "--config=configs/x.py:tiny",
        f"--workdir={tmp_path / 's' / 'lr=0.5,seed=1'}",
        "--config.lr=0.5",
        "--config.seed=1",
        "--extra=1",
    ]


@pytest.mark.parametrize(
    "text,values",
    [
        ("1,2", ["1", "2"]),
        ("(1,2),(3,)", ["(1,2)", "(3,)"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("x", ["x"]),
    ],
)
def test_commas_in_brackets_and_quotes_separate_nothing(text, values):
    assert sweep.split_values(text) == values


@pytest.mark.parametrize("entry", ["seed", "=1", "seed=", "seed=1,,2", "seed=1,1"])
def test_a_bad_grid_is_refused_before_anything_runs(entry, tmp_path, capsys):
    assert sweep.main(["--config=c", f"--workdir={tmp_path / 's'}", "--grid", entry]) == 2
    assert entry in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_names_keep_apart_what_ends_alike():
    point = {"optimizer.name": "lion", "objective.name": "mlm", "tokenizer.path": "a/b"}
    assert sweep.run_name(point) == "optimizer.name=lion,objective.name=mlm,path=a_b"
