"""Steps that go bad, from data that makes them so: left out, counted, the end of the run, or the way back.

The text is real, and so is what goes wrong: an objective that divides by how much a row's tokens differ, and a source whose
tokens do not; a label in a file that no float can square; a change of the text that makes the gradient fifty times as large.
"""

import json
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import build
from jaxlm.data.positions import Rewind, as_json, position, read_rewinds
from jaxlm.data.store_writer import write_store
from jaxlm.data.token_store import TokenStore
from jaxlm.exits import DIVERGED, Damaged, Diverged
from jaxlm.objectives import OBJECTIVES
from jaxlm.objectives.causal import CausalLM
from jaxlm.parallel.mesh import make_mesh
from jaxlm.pretrain import pretrain
from jaxlm.rewind import until_done
from jaxlm.tokenizers import make_tokenizer
from jaxlm.training.checkpoints import Checkpoints, find_step, find_steps, restore_state
from jaxlm.training.stored import read_manifest
from jaxlm.workdir import manifest, start_or_resume
from tests import tiny


class PerSpread(CausalLM):
    """Next-token prediction, weighted by how much the tokens of a row differ: 0 / 0 for a row of one token."""

    def loss(self, outputs, batch):
        (total, weight), metrics = super().loss(outputs, batch)
        tokens_BT = batch["tokens"]
        spread = (tokens_BT.max(axis=1) - tokens_BT.min(axis=1)).min().astype(jnp.float32)
        total, weight = total / spread, weight / spread
        return (total, weight), {**metrics, "loss": (total, weight)}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Text, and documents of one letter each; both with the same held-out text."""
    folder = tmp_path_factory.mktemp("stores")
    text = tiny.make_store(folder / "text")
    tokenizer = make_tokenizer("bytes", num_sentinels=0)
    documents = [tokenizer.encode(letter * 400) for letter in "abcdefgh"]
    held_out = TokenStore(text, "validation")
    spans = map(held_out.document_span, range(held_out.num_documents))
    validation = [held_out.tokens(start + 1, stop - 1) for start, stop in spans]
    write_store(folder / "letters", {"train": documents, "validation": validation}, tokenizer)
    return text, folder / "letters"


@pytest.fixture
def per_spread(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "per_spread", PerSpread)


def make_config(stores, letters=(), **overrides):
    """A tiny run on text, and on letters in the steps [first, stop) of `letters`, counted from 1."""
    text, other = stores
    weights = ["0:1,0"]
    for first, stop in letters:
        weights += [f"{first - 1}:0,1", f"{stop - 1}:1,0"]
    fields = dict(
        data__sources=(f"text={text}", f"letters={other}"),
        data__weights=tuple(weights),
        objective__name="per_spread",
        eval_every_steps=0,
        eval__num_batches=1,
        checkpoint__keep_last=10,
        log_every_steps=1,
        guards__max_bad_steps=10,
    )
    spec = "configs/gpt.py:tiny,optimizer=adamw,schedule=constant"
    return tiny.tiny_config(spec, text, **fields | overrides)


def kept(state):
    """On the host, all that a bad step must leave as it was."""
    return jax.device_get((state.params, state.opt_state, state.ema))


def same(one, other):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


# --- gradients that are not finite ------------------------------------------------------------------------------------


def check_bad_steps(run, bad):
    """The steps in `bad` leave parameters, moments and averages bit by bit and are counted; all others train."""
    state, count = run.init_state(), 0
    batches = run.device_batches(0)
    for step in range(1, max(bad) + 3):
        before = kept(state)
        state, metrics = run.train_step(state, next(batches))
        count += step in bad
        assert float(metrics["skipped"][0]) == (step in bad), step
        assert same(before, kept(state)) == (step in bad), step
        assert int(state.skipped) == count and int(state.step) == step
        assert np.isfinite(metrics["loss"][0]) == (step not in bad), step
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept(state)))


SPANS = [(3, 4), (6, 9)]  # one bad step, and three in a row
BAD = {3, 6, 7, 8}


@pytest.fixture
def bad_run(stores, per_spread, tmp_path):
    return build.make_run(make_config(stores, SPANS, ema_decay=0.9), tmp_path / "run")


def test_one_bad_step_and_three_in_a_row_leave_the_state_and_training_goes_on(bad_run):
    check_bad_steps(bad_run, BAD)


def test_the_law_of_bad_steps_fails_for_a_step_that_takes_every_gradient(bad_run, monkeypatch):
    monkeypatch.setattr("jaxlm.training.step.jnp.isfinite", lambda x: jnp.ones((), bool))
    with pytest.raises(AssertionError):
        check_bad_steps(bad_run, BAD)


def check_dump(workdir, first, count, source):
    """The folder has the batch of the first bad step, and of each where its rows are from."""
    (folder,) = (workdir / "bad_steps").iterdir()
    assert folder.name == f"{first}-{first - 1}"
    said = json.loads((folder / "documents.json").read_text())
    assert [entry["step"] for entry in said] == list(range(first, first + count))
    batch = np.load(folder / "batch.npz", allow_pickle=False)
    for row in said[0]["rows"]:
        assert row["source"] == source
        start, _ = row["examples"][0]["tokens"]
        store = TokenStore(row["store"], row["split"])
        found = batch["tokens"][row["row"]][: batch["segment_ids"][row["row"]].astype(bool).sum()]
        np.testing.assert_array_equal(found, store.tokens(start, start + len(found)))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [entry["step"] for entry in metrics] == list(range(first, first + count))
    assert {entry["loss"] for entry in metrics} <= {"nan", "inf"}


def test_a_run_ends_at_ten_bad_steps_in_a_row_also_over_a_resume_and_leaves_what_made_them(
    stores, per_spread, tmp_path
):
    config = make_config(stores, [(4, 100)], num_train_steps=8, checkpoint_every_steps=3)
    workdir = tmp_path / "run"
    pretrain(config, workdir)  # ends, and is saved, among the bad steps
    config.num_train_steps = 100
    with pytest.raises(Diverged, match="10 steps in a row, up to step 13.*bad_steps/4-3") as error:
        pretrain(config, workdir)
    assert error.value.status == DIVERGED
    check_dump(workdir, first=4, count=10, source="letters")
    evaluated = restore_state(find_step(workdir, 12), build.make_run(config, workdir).state_shape)
    before = restore_state(find_step(workdir, 3), build.make_run(config, workdir).state_shape)
    assert same(kept(before), kept(evaluated)) and int(evaluated.skipped) == 9
    documents = workdir / "bad_steps" / "4-3" / "documents.json"
    said = json.loads(documents.read_text())
    said[0]["rows"] = said[1]["rows"]  # of the batch after it
    documents.write_text(json.dumps(said))
    with pytest.raises(AssertionError):  # the law, of another step's rows
        check_dump(workdir, first=4, count=10, source="letters")


# --- spikes of the gradient -------------------------------------------------------------------------------------------

SPIKE, WINDOW = 41, 16


def check_spike(run, times=50):
    """A gradient of `times` the median of those before changes nothing and is counted; the steps around it train."""
    state, norms = run.init_state(), []
    batches = run.device_batches(0)
    for step in range(1, SPIKE + 4):
        before = kept(state)
        state, metrics = run.train_step(state, next(batches))
        norms.append(float(metrics["grad_norm"][0]))
        assert same(before, kept(state)) == (step == SPIKE), f"step {step} of norms {norms}"
    assert norms[SPIKE - 1] > times * np.median(norms[SPIKE - 1 - WINDOW : SPIKE - 1])
    assert (int(state.spikes.skipped), int(state.skipped)) == (1, 0)
    assert int(state.spikes.seen) == len(norms)


def spiking_run(stores, folder, devices, **overrides):
    """A model that has learned documents of one letter, and meets one batch of text."""
    config = make_config(
        stores[::-1],  # letters, but for one step
        [(SPIKE, SPIKE + 1)],
        objective__name="causal",
        optimizer__learning_rate=3e-2,
        guards__spike_factor=20.0,
        guards__spike_window=WINDOW,
        num_train_steps=100,
        **overrides,
    )
    mesh = make_mesh(**config.mesh, devices=jax.devices()[:devices])
    return build.make_run(config, folder, mesh=mesh)


@pytest.mark.parametrize(
    "devices, overrides",
    [(1, {}), (8, {"mesh__fsdp": 4}), (2, {"accumulation_steps": 4})],
    ids=["one device", "eight devices, state sharded", "four micro-batches"],
)
def test_a_gradient_of_fifty_times_the_usual_norm_is_left_out(stores, tmp_path, devices, overrides):
    check_spike(spiking_run(stores, tmp_path / "run", devices, **overrides))


def test_the_law_of_spikes_fails_without_the_guards_branch(stores, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.training.spikes.is_spike", lambda *_: jnp.zeros((), bool))
    with pytest.raises(AssertionError, match="step 41"):
        check_spike(spiking_run(stores, tmp_path / "run", 1))


# --- going back -------------------------------------------------------------------------------------------------------


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

    with pytest.raises(Diverged, match="bad after 2 rewinds"):
        until_done(run, attempt)
    rewinds = read_rewinds(tmp_path / "run")
    assert [(rewind.step, rewind.batch) for rewind in rewinds] == [(6, 10), (5, 13)]
    folders = {path.name for path in (tmp_path / "run" / "bad_steps").iterdir()}
    assert folders == {"8-7", "7-10", f"20-{position(19, rewinds)}"}


# --- parameters that are not finite -----------------------------------------------------------------------------------


def with_nan(state, part):
    """The state with one NaN in the last array of one of its parts."""
    tree = {"params": state.params, "moments": state.opt_state, "ema": state.ema}[part]
    leaves, structure = jax.tree.flatten(tree)
    place = max(i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating))
    bad = np.asarray(leaves[place]).copy()
    bad.flat[bad.size // 2] = np.nan
    leaves[place] = jax.device_put(bad, leaves[place].sharding)
    field = {"moments": "opt_state"}.get(part, part)
    return state.replace(**{field: structure.unflatten(leaves)})


def check_nan_is_not_restored(run, part, restore):
    """Of two checkpoints of which the newer was saved with a NaN the older is restored, and the log names the array."""
    state = run.init_state()
    store = Checkpoints(run.workdir)
    for step in (3, 6):
        saved = with_nan(state, part) if step == 6 else state
        store.save(step, saved.replace(step=jnp.int32(step)), manifest(run, step) | OPEN, None)
    store.wait()
    restored = restore(run, store)
    store.close()
    assert int(restored.step) == 3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept(restored)))
    assert find_steps(run.workdir / "checkpoints") == [3]
    (reason,) = (run.workdir / "checkpoints.damaged").glob("6-*.txt")
    assert re.search(
        rf"{'opt_state' if part == 'moments' else part}/.* is not finite", reason.read_text()
    )


OPEN = {"window": {}, "bad_steps": [], "evaluation_left": False}


def resumed(run, store):
    return start_or_resume(run, store, run.init_state)[0]


@pytest.mark.parametrize("part", ["params", "moments", "ema"])
def test_a_checkpoint_with_nan_is_set_aside_and_the_one_before_it_restored(stores, tmp_path, part):
    config = make_config(stores, objective__name="causal", ema_decay=0.9)
    check_nan_is_not_restored(build.make_run(config, tmp_path), part, resumed)


def test_the_law_of_nan_in_checkpoints_fails_for_a_plain_restore(stores, tmp_path):
    config = make_config(stores, objective__name="causal", ema_decay=0.9)
    plain = lambda run, store: restore_state(find_step(run.workdir), run.state_shape)
    with pytest.raises(AssertionError):
        check_nan_is_not_restored(build.make_run(config, tmp_path), "params", plain)


def test_parameters_that_an_update_made_infinite_end_a_run_before_they_are_saved(stores, tmp_path):
    config = make_config(
        stores,
        objective__name="causal",
        optimizer__learning_rate=1e38,
        optimizer__schedule__warmup_steps=0,
        num_train_steps=6,
        checkpoint_every_steps=1,
    )
    with pytest.raises(Diverged, match="parameters are not finite after step 1"):
        pretrain(config, tmp_path / "run")
    assert find_steps(tmp_path / "run" / "checkpoints") == []
    assert (tmp_path / "run" / "bad_steps" / "1-0" / "batch.npz").is_file()


# --- fine-tuning, in a process of its own -----------------------------------------------------------------------------


def test_fine_tuning_on_labels_that_no_float_can_square_ends_with_its_status_and_names_their_lines(
    stores, tmp_path
):
    tiny.save_untrained(tiny.tiny_config("configs/bert.py:tiny", stores[0]), tmp_path / "source")
    files = {"train": 80, "dev": 8}
    for name, size in files.items():
        with open(tmp_path / f"{name}.csv", "w", encoding="utf-8") as file:
            file.write("text,label\n")
            for row in range(size):  # the second half of the training rows is bad
                file.write(
                    f"the {row}th text,{1e30 if row >= 40 and name == 'train' else row / 10}\n"
                )
    result = tiny.run(
        [
            sys.executable,
            "-m",
            "jaxlm.finetune",
            f"--config={tiny.ROOT}/configs/finetune/classification.py:train={tmp_path}/train.csv,"
            f"dev={tmp_path}/dev.csv,problem=regression",
            f"--workdir={tmp_path}/run",
            f"--config.init_from={tmp_path}/source",
            "--config.batch_size=8",
            "--config.seq_len=32",
            "--config.guards.max_bad_steps=4",
            "--config.log.tensorboard=False",
        ],
        check=False,
    )
    assert result.returncode == DIVERGED, result.stderr[-4000:]
    assert "4 steps in a row" in result.stderr and "Traceback" not in result.stderr
    (folder,) = (tmp_path / "run" / "bad_steps").iterdir()
    said = json.loads((folder / "documents.json").read_text())
    batch = np.load(folder / "batch.npz", allow_pickle=False)
    assert len(said) == 4
    for entry in said:
        lines = [row["line"] for row in entry["rows"]]
        assert len(lines) == 8 and max(lines) >= 42  # the header is line 1
        assert {row["file"] for row in entry["rows"]} == {f"{tmp_path}/train.csv"}
    labels = sorted(x for x in batch["example_labels"][batch["example_ids"] >= 0].tolist())
    expected = [1e30 if row["line"] >= 42 else (row["line"] - 2) / 10 for row in said[0]["rows"]]
    np.testing.assert_allclose(labels, sorted(expected), rtol=1e-6)
