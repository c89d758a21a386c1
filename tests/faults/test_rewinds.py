"""Too many bad steps in a row: the run goes back, and on without the batches that led there."""

import shutil

import pytest

from jaxlm import build
from jaxlm.data.examples import draw
from jaxlm.data.positions import Rewind, as_json, position, read_rewinds
from jaxlm.exits import Damaged, Diverged
from jaxlm.objectives import OBJECTIVES
from jaxlm.pretrain import pretrain
from jaxlm.rewind import until_done
from jaxlm.training.checkpoints import find_step, find_steps, restore_state
from jaxlm.training.stored import read_manifest
from tests import tiny
from tests.faults.bad_data import PerSpread, check_dump, kept, make_config, same
from tests.faults.bad_labels import check_lines, tuning_command
from tests.parallel.test_processes import finish, start


def rewinding_config(stores, **overrides):
    """Steps 8 to 10 are bad; checkpoints at 3, 6 and 9. Four batches are left out: 6 to 9, counted from 0."""
    return make_config(
        stores,
        [(8, 11)],
        num_train_steps=14,
        checkpoint_every_steps=3,
        guards__max_bad_steps=3,
        guards__skip_batches=4,
        **overrides,
    )


def check_trained_on(run, numbers):
    """The newest checkpoint is bit by bit what the steps over the batches of these numbers make."""
    state = run.init_state()
    for number in numbers:
        state, _ = run.train_step(state, run.put_batch(run.train_batches[number]))
    found = restore_state(find_step(run.workdir), run.state_shape)
    assert int(found.step) == len(numbers)
    assert same(kept(state), kept(found))


@pytest.fixture(scope="module")
def rewound(stores, tmp_path_factory):
    """A run that went back, was stopped after three more steps, and resumed."""
    workdir = tmp_path_factory.mktemp("rewound") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OBJECTIVES, "per_spread", PerSpread)
        config = rewinding_config(stores)
        config.num_train_steps = 11
        pretrain(config, workdir)
        config.num_train_steps = 14
        pretrain(config, workdir)
    return config, workdir


def test_a_run_goes_back_and_leaves_batches_out_and_is_then_a_run_over_the_others(
    rewound, per_spread
):
    config, workdir = rewound
    run = build.make_run(config, workdir)
    check_trained_on(run, [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 16, 17])
    with pytest.raises(AssertionError):  # the law, of a run that goes on as if nothing had been
        check_trained_on(run, list(range(14)))
    assert read_rewinds(workdir) == [Rewind(step=6, batch=10, bad_steps=(8, 10))]
    assert read_manifest(find_step(workdir))["rewinds"] == as_json(run.rewinds)
    train = [line for line in tiny.learned(workdir) if line["split"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 15))
    assert not any(line["skipped"] for line in train)
    check_dump(workdir, first=8, count=3, source="letters")
    assert [path.name for path in (workdir / "checkpoints.damaged").glob("*.txt")] == ["9-1.txt"]


def test_a_run_that_lost_its_list_of_rewinds_is_refused(rewound, per_spread, tmp_path):
    config, workdir = rewound
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "rewinds.json").unlink()
    with pytest.raises(Damaged, match="batches that were left out would come again"):
        pretrain(config, tmp_path / "run")


def test_a_kill_before_the_rewind_is_written_down_changes_nothing(rewound, per_spread, tmp_path):
    """The newer checkpoints are set aside by then; the run meets its bad steps again, and goes back again."""
    config, workdir = rewound
    again = tmp_path / "run"
    shutil.copytree(workdir, again)
    (again / "rewinds.json").unlink()
    for step in find_steps(again / "checkpoints"):
        if step > 6:
            shutil.rmtree(again / "checkpoints" / str(step))
    pretrain(config, again)
    assert read_rewinds(again) == read_rewinds(workdir)
    states = (
        restore_state(find_step(w), build.make_run(config, w).state_shape) for w in (again, workdir)
    )
    assert same(*map(kept, states))


def test_a_run_goes_back_no_more_often_than_its_config_allows(stores, per_spread, tmp_path):
    run = build.make_run(rewinding_config(stores, guards__max_rewinds=2), tmp_path / "run")
    attempts = iter([(8, 9, 10), (7, 8, 9), (20, 21, 22)])

    def attempt():
        steps = next(attempts)
        raise Diverged("bad", [{"step": step, "loss": "nan"} for step in steps])

    with pytest.raises(
        Diverged, match=r"bad\. Batch and documents: .*20-\d+ \(2 rewinds did not help\)"
    ):
        until_done(run, attempt)
    rewinds = read_rewinds(tmp_path / "run")
    assert [(rewind.step, rewind.batch) for rewind in rewinds] == [(6, 10), (5, 13)]
    folders = {path.name for path in (tmp_path / "run" / "bad_steps").iterdir()}
    assert folders == {"8-7", "7-10", f"20-{position(19, rewinds)}"}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_all_processes_of_a_run_go_back_to_the_same_step(stores, tmp_path, count):
    bad_rows = {draw(80, 8, seed=0, k=k)[0] for k in (13, 14, 15)}
    flags = ["--config.guards.skip_batches=5", "--config.num_epochs=3", "--config.mesh.fsdp=2"]
    command = tuning_command(stores[0], tmp_path, bad_rows, *flags)
    results = finish(start(command, count, devices=2 // count), timeout=300)
    assert [status for _, _, status in results] == [0] * count, results
    assert read_rewinds(tmp_path / "run") == [Rewind(step=11, batch=16, bad_steps=(14, 16))]
    (folder,) = (tmp_path / "run" / "bad_steps").iterdir()
    check_lines(folder, bad_rows, count=3)
    train = [line for line in tiny.learned(tmp_path / "run") if line["split"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 31))
    # Alone in other batches, in the epochs before and after, the rows end no run.
    batches = [position(step, read_rewinds(tmp_path / "run")) for step in range(30)]
    expected = [not bad_rows.isdisjoint(draw(80, 8, seed=0, k=k)) for k in batches]
    assert [line["skipped"] for line in train] == expected
    assert (tmp_path / "run" / "report.json").is_file()
