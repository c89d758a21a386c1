"""The entrypoint's promises: every objective trains, a run starts from another, its own config reruns it."""

import json
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxlm import build, config_files
from jaxlm.evaluate import (
    compare_with_baselines,
    evaluate,
    held_out_documents,
    unigram_baselines,
)
from jaxlm.pretrain import pretrain
from jaxlm.training.checkpoints import find_step, load_item
from jaxlm.training.metrics import read_metrics
from jaxlm.training.plots import PICTURES
from jaxlm.training.stored import read_manifest
from tests import tiny


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny.make_store(tmp_path_factory.mktemp("text") / "store")


@pytest.fixture(scope="module")
def gpt(tmp_path_factory, store):
    """A finished run with averaged parameters, and its config."""
    workdir = tmp_path_factory.mktemp("gpt") / "run"
    config = tiny.tiny_config(
        "configs/gpt.py:tiny,optimizer=adamw",
        store,
        ema_decay=0.9,
        eval__prompts=("def ", "import "),
    )
    pretrain(config, workdir)
    return config, workdir


def lines(workdir, split):
    return [line for line in read_metrics(workdir) if line["split"] == split]


def test_a_run_leaves_everything_that_one_needs(gpt):
    _, workdir = gpt
    names = {p.name for p in workdir.iterdir()}
    assert names >= {
        "config.json",
        "checkpoints",
        "metrics.jsonl",
        "samples.jsonl",
        "tokenizer",
        "environment.json",
        "plots",
    }
    assert {p.name for p in (workdir / "plots").iterdir()} == set(PICTURES)
    assert [line["step"] for line in lines(workdir, "train")] == [4, 8, 12]
    assert [line["step"] for line in lines(workdir, "eval")] == [6, 12]
    train, held_out = lines(workdir, "train")[-1], lines(workdir, "eval")[-1]
    assert train.keys() >= {
        "loss",
        "accuracy",
        "bits_per_byte",
        "learning_rate",
        "grad_norm",
        "param_norm",
        "tokens_per_second",
        "step_seconds",
        "mfu",
        "input_wait",
        "seconds",
        "epochs/store",
    }
    assert held_out["params"] == "ema"
    assert held_out["perplexity"] == pytest.approx(np.exp(held_out["loss"]), rel=1e-5)
    manifest = read_manifest(find_step(workdir))
    assert manifest["step"] == 12 and manifest["tokens_seen"] == 12 * 8 * 32
    samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert [(s["step"], s["prompt"]) for s in samples] == [
        (6, "def "),
        (6, "import "),
        (12, "def "),
        (12, "import "),
    ]


@pytest.mark.parametrize(
    "spec, names",
    [
        ("configs/bert.py:tiny", {"accuracy", "loss"}),
        ("configs/bert.py:tiny,objective=mlm_nsp", {"mlm_loss", "pair_loss", "pair_accuracy"}),
        ("configs/bert.py:tiny,objective=mlm_sop", {"mlm_loss", "pair_loss", "pair_accuracy"}),
    ],
)
def test_bert_trains_on_every_objective(tmp_path, store, spec, names):
    config = tiny.tiny_config(spec, store, num_train_steps=4, eval__prompts=("def [MASK](self):",))
    metrics = pretrain(config, tmp_path / "run")
    assert metrics.keys() >= names
    assert 4.0 < metrics["loss"] < 8.0  # ln 264 = 5.6, plus ln 2 for a pair
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[-1])
    assert len(re.findall(r"\d\.\d\d", sample["text"])) == 5


def test_evaluation_on_all_held_out_text_counts_every_byte(gpt, store):
    _, workdir = gpt
    metrics = evaluate(workdir)
    assert metrics["params"] == "ema" and metrics["step"] == 12
    texts = list(held_out_documents(workdir))
    assert sum(len(t.encode()) for t in texts) == build.TokenStore(store, "validation").num_bytes
    title, rows = compare_with_baselines(workdir, metrics)
    assert "bits per byte" in title and rows["this model"] == metrics["bits_per_byte"]
    assert 1.0 < rows["gzip -9"] < 8.0 and 1.0 < rows["xz -9"] < 8.0


def check_unigram_baselines(baselines):
    """Four labels with a weight, 3 3 3 5: entropy of (3/4, 1/4), commonest 3/4; weight 0 is not counted."""
    labels = [np.array([[3, 3, 9]]), np.array([[3, 5, 9]])]
    batches = [{"labels": x, "weights": np.array([[1.0, 1.0, 0.0]])} for x in labels]
    expected = (-0.75 * np.log(0.75) - 0.25 * np.log(0.25), 0.75)
    np.testing.assert_allclose(baselines(iter(batches)), expected, rtol=1e-6)


def test_baselines_of_masked_tokens_are_their_own_frequencies():
    check_unigram_baselines(unigram_baselines)


def test_the_baseline_check_fails_if_weightless_labels_count():
    def wrong(batches):
        return unigram_baselines(b | {"weights": np.ones_like(b["weights"])} for b in batches)

    with pytest.raises(AssertionError):
        check_unigram_baselines(wrong)


@pytest.mark.parametrize("init", ["params", "ema"])
def test_a_run_starts_from_another_runs_parameters(tmp_path, gpt, store, init):
    config, source = gpt
    fork = config.copy_and_resolve_references()
    fork.update(init_from=f"{source}@12", init=init, num_train_steps=12)
    run = build.make_run(fork, tmp_path / "fork")
    state = build.initial_state(run)
    stored = load_item(find_step(source, 12), run.state_shape.params, init)
    assert int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, stored)


def test_a_forked_run_goes_on_from_the_others_step_and_optimizer(tmp_path, gpt):
    config, source = gpt
    fork = config.copy_and_resolve_references()
    fork.update(init_from=str(source), init="state", num_train_steps=16)
    pretrain(fork, tmp_path / "fork")
    assert [line["step"] for line in lines(tmp_path / "fork", "train")] == [16]


def test_an_unknown_init_lists_the_known_ones(tmp_path, gpt):
    config, source = gpt
    fork = config.copy_and_resolve_references()
    fork.update(init_from=str(source), init="weights")
    run = build.make_run(fork, tmp_path / "fork")
    with pytest.raises(ValueError, match="'params', 'ema' or 'state'"):
        build.initial_state(run)


def test_a_runs_own_config_reruns_it(tmp_path, gpt):
    _, workdir = gpt
    config = config_files.read_config(str(workdir / "config.json"))
    pretrain(config, tmp_path / "again")
    assert tiny.learned(tmp_path / "again") == tiny.learned(workdir)


def test_a_plateau_lowers_the_rate_and_survives_a_resume(tmp_path, store):
    config = tiny.tiny_config(
        "configs/gpt.py:tiny,optimizer=adamw,schedule=plateau",
        store,
        eval_every_steps=2,
        checkpoint_every_steps=4,
        log_every_steps=2,
        optimizer__plateau__patience=1,
        optimizer__plateau__rtol=0.9,  # no evaluation is that much better than the best one
    )
    pretrain(config, tmp_path / "run")
    rates = [line["learning_rate"] for line in lines(tmp_path / "run", "train")]
    assert rates[-1] < rates[1]
    first = config.copy_and_resolve_references()
    first.num_train_steps = 4
    pretrain(first, tmp_path / "resumed")
    pretrain(config, tmp_path / "resumed")
    assert [line["learning_rate"] for line in lines(tmp_path / "resumed", "train")] == rates


def test_several_sources_are_mixed_and_evaluated_apart(tmp_path, store):
    other = tiny.make_store(tmp_path / "other", num_documents=8)
    config = tiny.tiny_config(
        "configs/gpt.py:tiny,optimizer=adamw",
        store,
        data__sources=(f"a={store}", f"b={other}"),
        data__weights=("0:0.75,0.25", "6:0.25,0.75"),
    )
    metrics = pretrain(config, tmp_path / "run")
    assert metrics.keys() >= {"loss", "a/loss", "b/loss", "a/bits_per_byte"}
    last = lines(tmp_path / "run", "train")[-1]
    assert last["epochs/a"] > 0 and last["epochs/b"] > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model__vocab_size=200), "model.vocab_size 200 is smaller than the tokenizer's"),
        (dict(batch_size=9, accumulation_steps=2), "batch_size 9 is not divisible"),
        (dict(family="bart"), "unknown family 'bart': known are bert, electra"),
        (dict(data__weights=("0:0.5,0.5",)), "2 weights for the sources"),
    ],
)
def test_a_config_that_cannot_run_says_what_to_change(tmp_path, store, changes, message):
    config = tiny.tiny_config("configs/gpt.py:tiny,optimizer=adamw", store, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        build.make_run(
            config, tmp_path / "run", mesh=build.meshes.make_mesh(devices=jax.devices()[:1])
        )


def test_weights_that_are_no_schedule_are_shown_one():
    with pytest.raises(ValueError, match=r"set \"--config\.data\.weights=\('0:0\.7,0\.3',\)\""):
        build.mixture_weights((0.7, 0.3), ["a", "b"], [1, 1])


def test_tuples_survive_config_json(tmp_path):
    config = ConfigDict(dict(a=(1, 2), b=dict(c=("x",), d=())))
    build.write_config(config, tmp_path / "config.json")
    saved = config_files.saved_config(tmp_path / "config.json").to_dict()
    assert {key: saved[key] for key in config} == config.to_dict()
