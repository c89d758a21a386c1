"""Pictures of runs, from metrics.jsonl alone."""

import json
import sys

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from jaxlm.training import plots
from tests import tiny
from tools import plot_run


def write_run(workdir, losses=(5.0, 4.0, 3.0), extra=()):
    workdir.mkdir(parents=True)
    lines = [
        {
            "step": 10 * (i + 1),
            "split": "train",
            "loss": loss,
            "tokens_per_second": 1000.0 + i,
            "mfu": 0.5,
            "learning_rate": 1e-3 * (i + 1),
            "grad_norm": 10.0**i,
            "input_wait": 0.01,
        }
        for i, loss in enumerate(losses)
    ]
    lines += [{"step": 30, "split": "eval", "params": "raw", "loss": losses[-1] + 0.1}, *extra]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def ink(path):
    """How many pixels are not white."""
    return int((imread(path)[..., :3].min(axis=-1) < 0.9).sum())


def test_a_run_gives_its_pictures_with_something_in_them(tmp_path, capsys):
    workdir = write_run(tmp_path / "run")
    assert plot_run.main([str(workdir)]) == 0
    names = ("loss.png", "optimization.png", "throughput.png")
    pictures = [workdir / "plots" / name for name in names]
    assert capsys.readouterr().out.split() == [str(p) for p in pictures]
    assert all(ink(p) > 2000 for p in pictures)


def test_train_and_held_out_are_two_curves_each_in_its_own_place(tmp_path):
    figure = plots.draw_loss({"a": plots.read_metrics(write_run(tmp_path / "a"))})
    train, held_out = figure.axes[0].lines
    assert list(train.get_xdata()) == [10, 20, 30] and list(train.get_ydata()) == [5, 4, 3]
    assert list(held_out.get_xdata()) == [30] and list(held_out.get_ydata()) == [3.1]
    assert "best 3.100" in held_out.get_label()


def test_several_runs_share_a_picture(tmp_path):
    workdirs = [write_run(tmp_path / name / "run") for name in ("a", "b")]
    assert plot_run.main([*map(str, workdirs), f"--output={tmp_path / 'both'}"]) == 0
    figure = plots.draw_throughput(
        {name: plots.read_metrics(w) for name, w in zip("ab", workdirs, strict=True)}
    )
    assert [len(axes.lines) for axes in figure.axes] == [2, 2, 2]
    assert (tmp_path / "both" / "loss.png").is_file()


def test_runs_are_named_by_the_shortest_ends_that_differ(tmp_path):
    assert plots.run_names([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
    assert plots.run_names([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]
    assert len(set(plots.run_names([tmp_path / "x", tmp_path / "x"]))) == 2


def test_a_nan_leaves_a_gap_and_not_an_error(tmp_path):
    extra = [
        {"step": 40, "split": "train", "loss": float("nan")},
        {"step": 50, "split": "eval", "loss": float("inf")},
        {"step": 60, "split": "eval", "accuracy": 1.0},
    ]
    workdir = write_run(tmp_path / "run", extra=extra)
    assert plot_run.main([str(workdir)]) == 0
    assert plots.series(plots.read_metrics(workdir), "eval", "loss") == ([30], [3.1])


def test_a_run_of_only_evaluations_is_drawn(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text('{"step": 1, "split": "eval", "loss": 2.0}\n')
    assert plot_run.main([str(workdir)]) == 0


def test_a_run_that_has_not_logged_gives_no_picture(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert plots.plot_run(tmp_path) == []
    assert plot_run.main([str(tmp_path)]) == 1


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    assert plot_run.main([str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err


def test_learning_rate_and_gradient_norm_of_several_runs_share_a_picture(tmp_path):
    workdirs = [write_run(tmp_path / name) for name in "ab"]
    rate, norm = plots.draw_optimization(plots.read_runs(workdirs)).axes
    assert [list(line.get_ydata()) for line in rate.lines] == [[1e-3, 2e-3, 3e-3]] * 2
    assert [list(line.get_ydata()) for line in norm.lines] == [[1, 10, 100]] * 2
    assert norm.get_yscale() == "log" and len(rate.get_legend().get_texts()) == 2


def test_a_long_run_is_thinned_to_means_of_neighbours(tmp_path):
    losses = [*range(1, 11)]
    lines = plots.read_metrics(write_run(tmp_path / "run", losses, NAN), most=4)
    train, held_out = ([x for x in lines if x["split"] == s] for s in ("train", "eval"))
    assert [x["loss"] for x in train] == [
        2,
        5,
        8,
        10,
    ]  # 12 lines: three to one; a NaN counts for nothing
    assert [x["step"] for x in train] == [30, 60, 90, 110]
    assert [x["loss"] for x in held_out] == [10.1]


NAN = [{"step": 110, "split": "train", "loss": float("nan")}]


@pytest.mark.slow
def test_a_run_of_a_million_lines_is_drawn_in_little_memory(tmp_path):
    """In a process of its own, whose peak says what the lines took."""
    line = json.dumps({"step": 7, "split": "train", "loss": 2.0, "grad_norm": 1.0, "mfu": 0.5})
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n" * 1_000_000)
    code = (
        "import resource, sys; from jaxlm.training import plots; plots.plot_run(sys.argv[1]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    done = tiny.run([sys.executable, "-c", code, str(tmp_path)])
    assert int(done.stdout) < 500, f"{done.stdout} MiB"
    assert ink(tmp_path / "plots" / "loss.png") > 1000


@pytest.mark.parametrize("key", ["tokens_per_second", "mfu", "input_wait"])
def test_a_curve_shows_its_own_metric(tmp_path, key):
    lines = plots.read_metrics(write_run(tmp_path / "run"))
    wanted = [line[key] for line in lines if line["split"] == "train"]
    assert plots.series(lines, "train", key)[1] == wanted


def test_a_metric_is_drawn_by_the_value_of_a_field(tmp_path, capsys):
    accuracies = {"params": (0.5, 0.7), "random": (0.2, 0.4)}
    workdirs = []
    for init, values in accuracies.items():
        for seed, value in enumerate(values):
            line = {"step": 30, "split": "eval", "accuracy": value}
            workdir = write_run(tmp_path / f"{init}{seed}", extra=[line])
            (workdir / "config.json").write_text(json.dumps({"init": init, "data": {"x": 1}}))
            workdirs.append(str(workdir))
    arguments = [*workdirs, "--metric=accuracy", f"--output={tmp_path / 'out'}"]
    assert plot_run.main([*arguments, "--by=init"]) == 0
    assert ink(tmp_path / "out" / "accuracy.png") > 1000
    figure = Figure()
    plots._draw_group(
        figure.subplots(), "C0", "a", [([10, 30], [0.1, 0.5]), ([10, 30], [0.3, 0.7])]
    )
    *singles, mean = figure.axes[0].lines
    assert len(singles) == 2 and list(mean.get_ydata()) == pytest.approx([0.2, 0.6])
    assert mean.get_label() == "a: 0.600 ± 0.141, 2 runs"
    assert plots.read_field(workdirs[0], "data.x") == 1
    for wrong in (["--metric=nothing"], ["--metric=accuracy", "--by=seed"]):
        assert plot_run.main([*workdirs, *wrong]) == 2
    assert "accuracy" in capsys.readouterr().err
