"""Fine-tuning end to end on tiny models: it learns, resumes, stops, leaves a report, and says what it did with weights."""

import csv
import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import build, config_files, evaluate, tuning
from jaxlm import program as programs
from jaxlm.finetune import EarlyStopping, finetune
from jaxlm.interop import hub
from jaxlm.parallel import mesh as meshes
from jaxlm.training.checkpoints import find_step
from tests import tiny
from tests.tools.test_convert_checkpoint import make_source

# Letters tell the kinds apart, so that a model of bytes learns them in a few steps.
WORDS = {"fruit": ["aaaa", "aaa"], "tool": ["zzz", "zzzz"], "pet": ["mmm", "mmmm"]}


def write_rows(path, size=48, seed=0):
    """Sentences whose label is the kind of the thing in them."""
    rng = random.Random(seed)
    rows = []
    for _ in range(size):
        label = rng.choice(sorted(WORDS))
        rows.append((f"{rng.choice(['a', 'the', 'my'])} {rng.choice(WORDS[label])}", label))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Checkpoints of pretraining: an encoder with a pair head, and a decoder."""
    folder = tmp_path_factory.mktemp("pretrained")
    store = tiny.make_store(folder / "store")
    for family, arg in (("bert", "tiny,objective=mlm_nsp"), ("gpt", "tiny")):
        config = tiny.tiny_config(f"configs/{family}.py:{arg}", store)
        tiny.save_untrained(config, folder / family)
    return folder


def make_config(sources, tmp_path, family="bert", **overrides):
    data = tmp_path / "rows.csv"
    if not data.exists():
        write_rows(data)
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return config_files.read_config(
        f"{tiny.ROOT}/configs/finetune/classification.py:train={data}",
        {
            "init_from": str(sources / family),
            "batch_size": 8,
            "seq_len": 32,
            "num_epochs": 2.0,
            "optimizer.learning_rate": 1e-2,
            "dropout_rate": 0.0,
            "data.dev_fraction": 0.25,
            "eval.batch_size": 16,
            "log_every_steps": 1,
            "log.progress": False,
            "log.tensorboard": False,
        }
        | changes,
    )


@pytest.fixture(scope="module")
def tuned(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    config = make_config(
        sources,
        folder,
        num_epochs=20.0,
        evals_per_epoch=0.2,
        warmup_ratio=0.02,
        data__test=str(write_rows(folder / "test.csv", seed=1)),
    )
    return finetune(config, folder / "run"), folder / "run"


def test_it_learns_the_labels_and_leaves_a_report(tuned):
    report, workdir = tuned
    assert report["dev"]["accuracy"] > 0.9 and report["test"]["accuracy"] > 0.9
    assert json.loads((workdir / "report.json").read_text()) == json.loads(json.dumps(report))
    lines = [json.loads(x) for x in (workdir / "predictions.jsonl").read_text().splitlines()]
    right = sum(line["label"] == line["prediction"]["label"] for line in lines)
    assert right / len(lines) == pytest.approx(report["test"]["accuracy"])
    assert (workdir / "plots" / "confusion.png").stat().st_size > 1000
    assert json.loads((workdir / "task.json").read_text())["labels"] == ["fruit", "pet", "tool"]


def test_the_report_is_of_the_best_step(tuned):
    report, workdir = tuned
    evals = [line for line in tiny.learned(workdir) if line["split"] == "eval"]
    best = max(line["accuracy"] for line in evals)
    assert report["dev"]["accuracy"] == pytest.approx(best)
    assert report["step"] in [line["step"] for line in evals if line["accuracy"] == best]


def test_what_is_tuned_again_starts_from_the_best_step(tuned, tmp_path):
    report, workdir = tuned
    copy, best = tmp_path / "run", report["step"]
    shutil.copytree(workdir, copy)
    newer = best + 1000
    shutil.copytree(copy / "checkpoints" / str(best), copy / "checkpoints" / str(newer))
    assert tuning.open_source(str(copy)).step_dir.name == str(best)
    assert tuning.open_source(f"{copy}@{newer}").step_dir.name == str(newer)


def test_rows_that_lack_what_the_task_reads_are_refused(tuned):
    model = tuning.load_finetuned(tuned[1])
    with pytest.raises(ValueError, match="row:2: found words; sequence_classification needs text"):
        model.predict(["my zzzz", {"words": ["a"]}])


def test_a_test_file_of_which_a_row_has_no_label_is_said_not_to_be_scored(tuned, tmp_path, caplog):
    (tmp_path / "new.csv").write_text("text,label\na aaaa,fruit\nthe mmm,\n")
    assert not tuning.load_finetuned(tuned[1]).read(str(tmp_path / "new.csv")).is_labelled
    assert "1 of 2 records have no label" in caplog.text


def test_the_best_is_what_the_metric_says(sources, tmp_path):
    def mode(**changes):
        changes = {f"checkpoint__{name}": value for name, value in changes.items()}
        return tuning.prepare(
            make_config(sources, tmp_path, **changes), tmp_path / "run"
        ).config.checkpoint.best_mode

    assert mode() == "max"
    assert mode(best_metric="loss") == "min"
    assert mode(best_metric="loss", best_mode="max") == "max"


def test_weights_are_accounted_for(tuned, sources):
    _, workdir = tuned
    origin = json.loads((workdir / "origin.json").read_text())
    assert {"head/dense", "head/bias", "embed/embedding"} <= set(origin["restored"])
    assert set(origin["new"]) == {"head/out/kernel", "head/out/bias"}
    assert any(name.startswith("mlm_head/") for name in origin["dropped"])
    config = config_files.saved_config(workdir / "config.json")
    source = tuning.open_source(str(sources / "bert"))
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    model = programs.make_model(config, mesh)
    shapes = programs.sharded_shapes(
        mesh, programs.abstract_params(model, {"tokens": np.zeros((1, 1), np.int32)})
    )
    found, _, _ = tuning.read_weights(source, shapes)
    stored = build.load_checkpoint(sources / "bert").params
    np.testing.assert_array_equal(found["head/dense"], stored["pooler"]["kernel"])
    np.testing.assert_array_equal(found["layers/mlp/up"], stored["layers"]["mlp"]["up"])


def test_a_tuned_run_predicts_files_with_and_without_labels_and_from_python(
    tuned, tmp_path, capsys
):
    report, workdir = tuned
    scores = evaluate.evaluate_task(workdir)
    assert scores["accuracy"] == pytest.approx(report["test"]["accuracy"])
    assert "fruit" in capsys.readouterr().out
    (tmp_path / "new.txt.csv").write_text("text\na aaaa\nthe mmm\n")
    result = evaluate.evaluate_task(
        workdir, str(tmp_path / "new.txt.csv"), output=str(tmp_path / "out.csv")
    )
    with open(result["predictions"], newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["predicted_label"] for row in rows] == ["fruit", "pet"]
    assert sum(float(rows[0][f"p({label})"]) for label in WORDS) == pytest.approx(1, abs=1e-5)
    said = tuning.load_finetuned(workdir).predict(["my zzzz", {"text": "a aaa"}])
    assert [one["label"] for one in said] == ["tool", "fruit"]


def losses(workdir):
    return [line["loss"] for line in tiny.learned(workdir) if line["split"] == "train"]


@pytest.mark.parametrize("pooling", ["", "mean"])
def test_packed_and_padded_runs_have_the_same_losses(sources, tmp_path, pooling):
    for packed in (True, False):
        changes = dict(packed=packed, num_epochs=1.0, task__pooling=pooling)
        finetune(make_config(sources, tmp_path, **changes), tmp_path / str(packed))
    packed, padded = losses(tmp_path / "True"), losses(tmp_path / "False")
    np.testing.assert_allclose(packed, padded, rtol=2e-4)
    with pytest.raises(AssertionError):  # other examples would show
        np.testing.assert_allclose(packed[1:], padded[:-1], rtol=2e-4)


def test_an_interrupted_run_ends_like_an_unbroken_one(sources, tmp_path, monkeypatch):
    config = make_config(sources, tmp_path, family="gpt", num_epochs=2.0, dropout_rate=0.1)
    finetune(config, tmp_path / "unbroken")
    evaluations = iter([False, True])
    whole = tuning.TaskRun.evaluate

    def cut(self, *arguments):
        if next(evaluations):
            raise KeyboardInterrupt
        return whole(self, *arguments)

    monkeypatch.setattr(tuning.TaskRun, "evaluate", cut)
    with pytest.raises(KeyboardInterrupt):
        finetune(config, tmp_path / "broken")
    monkeypatch.setattr(tuning.TaskRun, "evaluate", whole)
    finetune(config, tmp_path / "broken")
    assert tiny.learned(tmp_path / "broken") == tiny.learned(tmp_path / "unbroken")
    one, other = (tuning.load_finetuned(tmp_path / name).params for name in ("broken", "unbroken"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_adapters_are_all_that_trains(sources, tmp_path):
    config = make_config(
        sources, tmp_path, num_epochs=1.0, tuning__train="lora", tuning__lora_rank=2
    )
    finetune(config, tmp_path / "run")
    step_dir = find_step(tmp_path / "run")
    tuned = tuning.load_finetuned(tmp_path / "run").params
    source = build.load_checkpoint(sources / "bert").params
    np.testing.assert_array_equal(tuned["layers"]["mlp"]["up"], source["layers"]["mlp"]["up"])
    assert np.any(tuned["layers"]["attention"]["query_lora_b"])
    sizes = {
        item: sum(p.stat().st_size for p in (step_dir / item).rglob("*") if p.is_file())
        for item in ("params", "frozen")
    }
    assert sizes["params"] < sizes["frozen"]
    again = make_config(sources, tmp_path, init_from=str(tmp_path / "run"), num_epochs=1.0)
    assert (
        finetune(again, tmp_path / "again")["dev"]["loss"] > 0
    )  # adapters merged, labels' head kept


def test_a_run_stops_when_the_metric_stands_still_and_stays_stopped(sources, tmp_path):
    config = make_config(
        sources, tmp_path, num_epochs=50.0, patience=2, optimizer__learning_rate=0.0
    )
    finetune(config, tmp_path / "run")
    lines = tiny.learned(tmp_path / "run")
    assert len([line for line in lines if line["split"] == "eval"]) == 3
    finetune(config, tmp_path / "run")
    assert tiny.learned(tmp_path / "run") == lines


def test_patience_counts_evaluations_without_a_better_value():
    stopping = EarlyStopping(2, "loss", "min")
    for value, over in (
        (3.0, False),
        (2.0, False),
        (2.0, False),
        (1.0, False),
        (1.5, False),
        (1.0, True),
    ):
        stopping.see({"loss": value})
        assert stopping.is_over is over
    with pytest.raises(ValueError, match=r"'loss' is not among .*\['f1'\]"):
        stopping.see({"f1": 1.0})


def test_other_labels_for_a_run_that_began_are_refused(tuned, sources):
    _, workdir = tuned
    with pytest.raises(ValueError, match="other labels"):
        tuning.write_task(workdir, "sequence_classification", {"labels": ["a", "b"]})


def test_a_source_that_would_give_only_embeddings_is_refused():
    repair = tuning.Repair(["embed/embedding", "embed/positions"], ["layers/mlp/up"], [], [])
    source = tuning.Source("bert", {}, None, folder=Path("somewhere"))
    with pytest.raises(ValueError, match="nothing but embeddings"):
        tuning.refuse_strangers(source, repair)


def test_what_is_missing_is_said_before_anything_is_read(sources, tmp_path):
    with pytest.raises(ValueError, match="init_from is empty"):
        finetune(make_config(sources, tmp_path, init_from=""), tmp_path / "run")
    with pytest.raises(ValueError, match="data.train is empty"):
        finetune(make_config(sources, tmp_path, data__train=""), tmp_path / "run")
    with pytest.raises(ValueError, match="evals_per_epoch 0.0: set it above 0"):
        finetune(make_config(sources, tmp_path, evals_per_epoch=0.0), tmp_path / "run")
    with pytest.raises(ValueError, match="seq_len 65: the model has 64 positions"):
        finetune(make_config(sources, tmp_path, seq_len=65), tmp_path / "run")


def test_text_whose_places_are_marked_is_not_augmented(sources, tmp_path):
    path = tmp_path / "rows.jsonl"
    rng = random.Random(0)
    path.write_text("".join(json.dumps(relation_rows(rng)) + "\n" for _ in range(8)))
    config = config_files.read_config(
        f"{tiny.ROOT}/configs/finetune/relations.py:train={path}",
        {"init_from": str(sources / "bert"), "seq_len": 48, "data.augment_swap": 0.1},
    )
    with pytest.raises(ValueError, match="marks in its text would be lost"):
        tuning.prepare(config, tmp_path / "run")


def test_an_id_of_the_hub_is_resolved_once(tmp_path, monkeypatch):
    folder, _ = make_source(tmp_path / "hf", "bert_base")
    fetch, asked = hub.fetch, []

    def fetch_id(spec):
        if spec != "someone/tiny@main":
            return fetch(spec)
        asked.append(spec)
        return folder, "0123abcd"

    monkeypatch.setattr(hub, "fetch", fetch_id)
    source = tuning.open_source("hf:someone/tiny@main")
    assert asked == ["someone/tiny@main"]
    assert (source.folder, source.commit) == (folder, "0123abcd")


def test_bad_rows_are_listed_and_too_many_are_refused(sources, tmp_path):
    data = write_rows(tmp_path / "rows.csv")
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:5], '"  ",pet', *lines[5:]]) + "\n")
    prepared = tuning.prepare(make_config(sources, tmp_path), tmp_path / "run")
    listed = [json.loads(x) for x in (tmp_path / "run" / "problems.jsonl").read_text().splitlines()]
    assert [(x["line"], x["text"]) for x in listed] == [(6, "the text is empty")]
    assert len(prepared.splits["train"].records) + len(prepared.splits["dev"].records) == 48
    data.write_text("\n".join([*lines, *['"  ",pet'] * 20]) + "\n")
    with pytest.raises(ValueError, match="cannot be used"):
        tuning.prepare(make_config(sources, tmp_path), tmp_path / "other")


# --- every task -------------------------------------------------------------------------------------------------------

ANSWER = "zzz"


def tagging_rows(rng):
    words = [rng.choice(["aa", "zz", "mm"]) for _ in range(rng.randint(2, 4))]
    return {"words": words, "labels": ["B-X" if word == "zz" else "O" for word in words]}


def question_rows(rng):
    before = " ".join(rng.choice(["aa", "mm"]) for _ in range(rng.randint(1, 3)))
    answer = {"text": ANSWER, "answer_start": len(before) + 1}
    return {"question": "where?", "context": f"{before} {ANSWER} bb", "answers": [answer]}


def relation_rows(rng):
    one, other = rng.choice([("aa", "zz"), ("zz", "aa")])
    label = "Next(e1,e2)" if one == "aa" else "Next(e2,e1)"
    return {"text": f"<e1>{one}</e1> and <e2>{other}</e2>", "label": label}


def choice_rows(rng):
    right = rng.randrange(2)
    return {
        "question": "q",
        "choices": ["zz" if i == right else "aa" for i in range(2)],
        "label": right,
    }


def pair_rows(rng):
    letter = rng.choice("abcdefgh")
    return {"text": letter * 3, "text_pair": letter * rng.randint(2, 5)}


TASK_ROWS = {
    "tagging": (tagging_rows, "entity_f1"),
    "question_answering": (question_rows, "f1"),
    "relations": (relation_rows, "semeval_f1"),
    "multiple_choice": (choice_rows, "accuracy"),
    "embedding": (pair_rows, "mrr"),
}


@pytest.mark.parametrize("name", TASK_ROWS)
def test_every_task_trains_reports_and_predicts(sources, tmp_path, name):
    make, metric = TASK_ROWS[name]
    rng = random.Random(0)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(make(rng)) + "\n" for _ in range(32)), encoding="utf-8")
    config = config_files.read_config(
        f"{tiny.ROOT}/configs/finetune/{name}.py:train={path},batch_size=8,num_epochs=1,learning_rate=1e-2",
        {
            "init_from": str(sources / "bert"),
            "seq_len": 48,
            "dropout_rate": 0.0,
            "data.dev_fraction": 0.25,
            "log.progress": False,
            "log.tensorboard": False,
        },
    )
    report = finetune(config, tmp_path / "run")
    assert 0 <= report["dev"][metric] <= 1 and np.isfinite(report["dev"]["loss"])
    again = evaluate.evaluate_task(tmp_path / "run", str(path))
    assert again["records"] == 32 and 0 <= again[metric] <= 1
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == report["records"]["dev"] and "prediction" in json.loads(lines[0])
