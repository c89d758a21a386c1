"""tools/baselines.py and its other side: data, scores, results that are kept, and what the Trainer is fed.

What needs torch and transformers is marked `oracles` and runs on a random model of two tiny layers.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from jaxlm import config_files
from jaxlm.tasks import scores
from tools import baseline_data, baseline_speed, baselines, trainer_baseline
from tools.baseline_data import DATASETS, SPLITS
from tools.trainer_baseline import Settings

ROOT = Path(__file__).resolve().parents[2]

# --- data -------------------------------------------------------------------------------------------------------------


def write_raw(folder):
    """The four data sets' raw files, a few rows each."""
    intents = {
        name: [[f"{name} {i}", "ab"[i % 2]] for i in range(4)] for name in ("train", "val", "test")
    }
    tree = intents | {"oos_train": [["nothing known", "oos"]], "oos_val": [], "oos_test": []}
    (folder / "clinc150").mkdir()
    (folder / "clinc150" / "data_full.json").write_text(json.dumps(tree))
    (folder / "wnut17").mkdir()
    for name in ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated"):
        sentence = f"{name}\tO\nNew\tB-location\nYork\tI-location\n\t\n#tag\tO\n!\tO\n"
        (folder / "wnut17" / name).write_text(sentence)
    (folder / "semeval2010_task8").mkdir()
    for name, count in (("TRAIN_FILE.TXT", 40), ("TEST_FILE_FULL.TXT", 3)):
        rows = [
            f'{i}\t"The <e1>{name}</e1> makes <e2>{i}</e2>."\n{"AB"[i % 2]}-X(e1,e2)\nComment:\n\n'
            for i in range(count)
        ]
        (folder / "semeval2010_task8" / name).write_text("".join(rows))
    (folder / "xquad").mkdir()
    (folder / "xquad" / "xquad.en.json").write_text(
        json.dumps({"version": "1.1", "data": [make_article(i) for i in range(48)]})
    )


def make_article(number):
    context = f"The answer of {number} is here."
    answer = {"text": str(number), "answer_start": context.index(str(number))}
    question = {"id": f"q{number}", "question": "Which?", "answers": [answer]}
    return {"title": f"A{number}", "paragraphs": [{"context": context, "qas": [question]}]}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """data set -> split -> rows, through the files that both sides read."""
    data, work = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("work")
    write_raw(data)
    written = {name: baseline_data.write_splits(name, data, work) for name in DATASETS}
    return {
        name: {split: baseline_data.read_rows(file) for split, file in files.items()}
        for name, files in written.items()
    }


def test_every_row_of_the_raw_files_arrives(rows):
    sizes = {name: tuple(len(splits[s]) for s in SPLITS) for name, splits in rows.items()}
    assert sizes == {
        "clinc150": (4, 4, 4),
        "wnut17": (2, 2, 2),
        "semeval": (36, 4, 3),
        "xquad": (34, 4, 10),
    }
    assert rows["clinc150"]["dev"][1] == {"text": "val 1", "label": "b"}
    assert rows["wnut17"]["test"][0]["labels"] == ["O", "B-location", "I-location"]
    assert rows["semeval"]["test"][1] == {
        "text": "The <e1>TEST_FILE_FULL.TXT</e1> makes <e2>1</e2>.",
        "label": "B-X(e1,e2)",
    }


def test_answers_stand_where_the_rows_say(rows):
    for split in SPLITS:
        for row in rows["xquad"][split]:
            (answer,) = row["answers"]
            end = answer["start"] + len(answer["text"])
            assert row["context"][answer["start"] : end] == answer["text"]


def check_disjoint(splits):
    seen = [row["text"] if "text" in row else row["context"] for s in SPLITS for row in splits[s]]
    assert len(seen) == len(set(seen)), "a text is in two splits"


@pytest.mark.parametrize("name", ["semeval", "xquad"])
def test_splits_of_our_own_share_no_text(name, rows):
    check_disjoint(rows[name])


def test_the_check_of_the_splits_fails_for_rows_in_two_of_them(rows):
    splits = rows["xquad"]
    with pytest.raises(AssertionError, match="two splits"):
        check_disjoint(splits | {"dev": splits["dev"] + splits["train"][:1]})


def test_a_missing_data_set_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="found: no .*xquad; change: .* --data=FOLDER that has xquad"
    ):
        baseline_data.write_splits("xquad", tmp_path, tmp_path)


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_tasks():
    classes = [{"label": "x"}, {"label": "y"}, {"label": "y"}]
    found = baseline_data.score("sequence_classification", classes, ["x", "y", "z"])
    assert found == scores.classification_scores([0, 1, 1], [0, 1, 2], ["x", "y", "z"])
    relations = [{"label": "R(e1,e2)"}, {"label": "Other"}]
    found = baseline_data.score("relation_classification", relations, ["R(e2,e1)", "Other"])
    assert found == scores.semeval_scores(["R(e1,e2)", "Other"], ["R(e2,e1)", "Other"])
    found = baseline_data.score(
        "token_classification", [{"labels": ["B-A", "O"]}], [["B-A", "B-A"]]
    )
    assert found["entity_precision"] == 0.5 and found["entity_recall"] == 1.0
    answers = [{"answers": [{"text": "the cat"}, {"text": "a dog"}]}]
    assert baseline_data.score("question_answering", answers, ["Dog!"])["exact_match"] == 1.0


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=list(DATASETS))
def test_every_metric_is_among_its_tasks_scores(dataset):
    row = {"label": "A(e1,e2)", "labels": ["B-A"], "answers": [{"text": "a"}]}
    said = row["labels"] if dataset.task == "token_classification" else row["label"]
    assert baseline_data.METRICS[dataset.task] in baseline_data.score(dataset.task, [row], [said])


def test_a_missing_prediction_is_an_error():
    with pytest.raises(ValueError, match="found 1 predictions for 2 rows"):
        baseline_data.score("sequence_classification", [{"label": "x"}] * 2, ["x"])


# --- our side ---------------------------------------------------------------------------------------------------------


FILES = {split: Path(f"/data/{split}.jsonl") for split in SPLITS}


@pytest.mark.parametrize("name", DATASETS)
def test_our_config_has_every_field_that_a_run_sets(name):
    (run,) = baselines.make_runs([name], ["ours"], [7], {"ours": {"batch_size": 5}})
    fields = baselines.our_fields(run, FILES, "/model")
    config = config_files.read_config(str(ROOT / DATASETS[name].config), fields)
    assert config.task.name == DATASETS[name].task
    assert (config.batch_size, config.seed, config.init_from) == (5, 7, "hf:/model")
    assert config.optimizer.learning_rate == run.settings["learning_rate"]
    assert config.data.test == "/data/test.jsonl"


def test_a_setting_that_our_config_does_not_have_is_an_error():
    (run,) = baselines.make_runs(["wnut17"], ["ours"], [0], {"ours": {"batchsize": 5}})
    fields = baselines.our_fields(run, FILES, "/model")
    with pytest.raises((AttributeError, KeyError), match="batchsize"):
        config_files.read_config(str(ROOT / DATASETS["wnut17"].config), fields)


def write_workdir(folder, accuracy):
    folder.mkdir(exist_ok=True)
    report = {"dev": {"accuracy": 0.5}, "test": {"accuracy": accuracy}}
    (folder / "report.json").write_text(json.dumps(report))
    test = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    said = [{**row, "prediction": {"label": "x"}} for row in test]
    goodput = dict(life=0, began=0.0, ended=40.0, steps=15, bad=0, again=0)
    goodput["seconds"] = {"compile": 3.0, "step": 25.0}
    for name, lines in (
        ("test.jsonl", test),
        ("predictions.jsonl", said),
        (
            "metrics.jsonl",
            [
                {"step": 10, "split": "train", "step_seconds": 2.0, "tokens_per_second": 50.0},
                {"step": 12, "split": "eval", "accuracy": 0.5, "seconds": 99.0},
                {"step": 15, "split": "train", "step_seconds": 1.0, "tokens_per_second": 100.0},
            ],
        ),
        ("goodput.jsonl", [goodput]),
    ):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_workdir_says_scores_tokens_and_the_seconds_of_training_alone(tmp_path):
    write_workdir(tmp_path, 0.5)
    result = baselines.read_ours(tmp_path, "sequence_classification", tmp_path / "test.jsonl")
    assert result["test"]["accuracy"] == result["dev"]["accuracy"] == 0.5
    assert (result["steps"], result["train_seconds"], result["tokens"]) == (15, 28.0, 1500)


def test_a_report_that_its_predictions_do_not_bear_out_is_refused(tmp_path):
    write_workdir(tmp_path, 1.0)
    with pytest.raises(ValueError, match="accuracy is 1.0 in report.json and 0.5"):
        baselines.read_ours(tmp_path, "sequence_classification", tmp_path / "test.jsonl")


# --- results that are kept --------------------------------------------------------------------------------------------


def make_runs(**ours):
    changes = {"ours": ours, "theirs": {}}
    return baselines.make_runs(["clinc150"], ["ours", "theirs"], [0, 1], changes)


def make_line(run, dev=0.5, test=0.5):
    return {
        **{key: getattr(run, key) for key in ("dataset", "side", "seed", "settings")},
        "dev": {"accuracy": dev},
        "test": {"accuracy": test},
        "tokens_per_second": 100.0,
        "train_seconds": 10.0,
    }


def test_each_result_is_made_once_and_other_settings_are_other_results(tmp_path):
    made, path = [], tmp_path / "results.jsonl"
    make = lambda run: made.append(run) or make_line(run)
    for _ in range(2):
        assert not baselines.run_all(make_runs(), path, make)
    assert made == make_runs()
    baselines.run_all(make_runs(batch_size=128), path, make)
    assert [run.side for run in made[4:]] == ["ours", "ours"]
    assert len({run.folder for run in made}) == len(made)


def test_a_line_that_a_kill_cut_off_is_made_again(tmp_path):
    path = tmp_path / "results.jsonl"
    baselines.run_all(make_runs(), path, make_line)
    whole = path.read_text()
    path.write_text(whole[:-20])
    baselines.run_all(make_runs(), path, make_line)
    assert path.read_text() == whole


def test_a_failed_run_stops_no_other_and_is_tried_again(tmp_path):
    path = tmp_path / "results.jsonl"

    def fails_once(run):
        if run.seed == 0 and run.side == "ours":
            raise RuntimeError("killed")
        return make_line(run)

    failed = baselines.run_all(make_runs(), path, fails_once)
    assert list(failed.values()) == ["killed"]
    assert len(baselines.read_results(path)) == 3
    assert not baselines.run_all(make_runs(), path, make_line)
    assert len(baselines.read_results(path)) == 4


def check_choice(report):
    """Ours has 90 on test where its development score is best; 95 is what looking at test would choose."""
    lines = []
    for batch_size, dev, test in ((32, 0.9, 0.9), (64, 0.8, 0.95)):
        lines += [make_line(run, dev, test) for run in make_runs(batch_size=batch_size)[::2]]
    lines += [make_line(run, 0.7, 0.85) for run in make_runs()[1::2]]
    lines.append({"benchmark": "speed", "dataset": "clinc150"})
    text = report(lines)
    assert text.endswith("clinc150: ours 90.00, theirs 85.00: +5.00"), text
    return text


def test_the_best_settings_are_those_of_the_best_development_score():
    text = check_choice(baselines.report)
    assert text.count("batch_size=64") == 1 and "90.00 ± 0.00" in text


def test_the_check_of_the_choice_fails_where_test_scores_choose():
    def by_test(lines):
        return baselines.report([line | {"dev": line.get("test")} for line in lines])

    with pytest.raises(AssertionError):
        check_choice(by_test)


# --- the command ------------------------------------------------------------------------------------------------------


def test_settings_are_numbers_words_and_tuples():
    found = baselines.parse_settings(
        "batch_size=64,learning_rate=3e-4,tuning.lora_targets=('a','b'),x=y"
    )
    assert found == {
        "batch_size": 64,
        "learning_rate": 3e-4,
        "tuning.lora_targets": ("a", "b"),
        "x": "y",
    }
    with pytest.raises(ValueError, match="'batch_size'.*\n.*'=3'"):
        baselines.parse_settings("batch_size,=3")


def test_the_command_lists_all_that_is_wrong_at_once(tmp_path, capsys):
    command = ["--datasets=glue", "--sides=mine", "--theirs=packed=True", "--model="]
    assert baselines.main([f"--work={tmp_path}", *command]) == 2
    said = capsys.readouterr().err
    for found in ("--datasets=glue", "--sides=mine", "--theirs=packed", "no model"):
        assert f"found: {found}" in said
    assert not list(tmp_path.iterdir())


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command for one run of ours, in a second folder, whose training is a stub: model -> exit status."""
    result = {
        "dev": {"accuracy": 0.5},
        "test": {"accuracy": 0.5},
        "tokens": 1,
        "train_seconds": 1.0,
    }
    done = subprocess.CompletedProcess([], 0)
    for name, stub in (("missing", []), ("environment", {}), ("read_ours", result)):
        monkeypatch.setattr(baselines, name, lambda *_, stub=stub: stub)
    monkeypatch.setattr(baselines.subprocess, "run", lambda *_, **__: done)
    (tmp_path / "data").mkdir()
    write_raw(tmp_path / "data")
    flags = [f"--work={tmp_path / 'work'}", f"--data={tmp_path / 'data'}", "--datasets=clinc150"]
    return lambda model: baselines.main([*flags, "--sides=ours", "--seeds=0", f"--model={model}"])


def test_results_of_another_model_are_not_taken_for_these(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(baselines, "find_model", lambda: "/packages/usual")
    results = tmp_path / "work" / "results.jsonl"
    assert command("/models/other") == 0 == command("/models/other")
    (line,) = baselines.read_results(results)
    assert command("/packages/usual") == 2
    assert "found: results of /models/other in" in capsys.readouterr().err
    del line["model"]  # as the first results were written
    results.write_text(json.dumps(line) + "\n")
    assert command("/packages/usual") == 0 and command("/models/other") == 2
    assert baselines.read_results(results) == [line]


def test_results_of_other_rows_are_not_taken_for_these(command, tmp_path, capsys):
    assert command("/model") == 0 == command("/model")
    raw = tmp_path / "data" / "clinc150" / "data_full.json"
    raw.write_text(raw.read_text().replace("train 1", "another text"))
    assert command("/model") == 2
    said = capsys.readouterr().err
    assert "found: rows in" in said and "train.jsonl" in said and "another --work" in said


# --- the Trainer's side -----------------------------------------------------------------------------------------------


def test_spans_are_the_best_of_all_that_are_short_enough_and_inside():
    rng = np.random.default_rng(0)
    limit = trainer_baseline.MAX_ANSWER_TOKENS
    for _ in range(20):
        start, end = rng.standard_normal((2, 18))  # fewer than NUM_BEST: nothing is left out
        inside = sorted(rng.choice(18, 12, replace=False).tolist())
        found = trainer_baseline.best_span(start, end, inside)
        pairs = [(i, j) for i in inside for j in inside if 0 <= j - i < limit]
        assert found == max((start[i] + end[j], i, j) for i, j in pairs)


def test_a_words_first_token_is_read():
    assert trainer_baseline.first_tokens([None, 0, 0, 1, 2, 2, None]) == {0: 1, 1: 3, 2: 4}


def test_the_clock_counts_only_between_start_and_stop(monkeypatch):
    times = iter([1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(trainer_baseline.time, "perf_counter", lambda: next(times))
    clock = trainer_baseline.Clock()
    for _ in range(2):
        clock.start()
        clock.stop()
    clock.stop()
    assert clock.seconds == 6.0


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A folder with a random BERT of two layers and a vocabulary of letters."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?#"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=128, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


SETTINGS = Settings(batch_size=4, seq_len=64, num_epochs=2, learning_rate=1e-2, stride=8)


def make_kind(name, rows, tiny_model, seq_len=64):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    settings = Settings(seq_len=seq_len, stride=8)
    return trainer_baseline.TASKS[DATASETS[name].task](tokenizer, rows[name]["train"], settings)


def sure_outputs(features, num_labels):
    """What a model gives that is sure of every feature's labels, padded as Trainer.predict pads."""
    length = max(len(f["input_ids"]) for f in features)

    def hot(key):
        return np.stack([np.eye(length)[f[key]] for f in features])

    if "start_positions" in features[0]:
        return hot("start_positions"), hot("end_positions")
    if np.ndim(features[0]["labels"]) == 0:
        return np.stack([np.eye(num_labels)[f["labels"]] for f in features])
    logits = np.full((len(features), length, num_labels), -100.0)
    for row, feature in zip(logits, features, strict=True):
        for position, label in enumerate(feature["labels"]):
            row[position] = np.eye(num_labels)[label] if label >= 0 else 0
    return logits


GOLD = {
    "clinc150": lambda row: row["label"],
    "wnut17": lambda row: row["labels"],
    "semeval": lambda row: row["label"],
    "xquad": lambda row: row["answers"][0]["text"],
}


@pytest.mark.oracles
@pytest.mark.parametrize("name", DATASETS)
def test_a_model_that_is_sure_of_the_labels_predicts_them(name, rows, tiny_model):
    # Of questions this is a window that the whole context does not fit into.
    kind = make_kind(name, rows, tiny_model, seq_len=24 if name == "xquad" else 64)
    train = rows[name]["train"]
    features = kind.features(train, labelled=True)
    assert (len(features) > len(train)) == (name == "xquad")
    said = kind.decode(train, sure_outputs(features, len(kind.labels)))
    assert said == [GOLD[name](row) for row in train]


@pytest.mark.oracles
@pytest.mark.parametrize("name", DATASETS)
def test_the_trainer_trains_scores_and_counts_real_tokens(name, rows, tiny_model, tmp_path):
    pytest.importorskip("accelerate")
    folder = tmp_path / "data"
    folder.mkdir()
    for split in SPLITS:
        lines = [json.dumps(row) + "\n" for row in rows[name][split][:8]]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    task = DATASETS[name].task
    result = trainer_baseline.run(task, folder, tiny_model, SETTINGS, tmp_path / "out", 0)
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    said = baseline_data.read_rows(tmp_path / "out" / "predictions.jsonl")
    gold = baseline_data.read_rows(folder / "test.jsonl")
    assert baseline_data.score(task, gold, [line["prediction"] for line in said]) == result["test"]
    metric = baseline_data.METRICS[task]
    assert result["dev"][metric] == max(epoch[metric] for epoch in result["history"])
    kind = make_kind(name, rows, tiny_model)
    features = kind.features(baseline_data.read_rows(folder / "train.jsonl"), labelled=True)
    assert result["tokens"] == 2 * sum(len(f["input_ids"]) for f in features)
    assert result["steps"] == 2 * -(-len(features) // 4) and result["train_seconds"] > 0


# --- speed ------------------------------------------------------------------------------------------------------------


def test_turns_go_round_and_the_first_round_is_not_counted():
    order = []

    def make_turn(name, seconds):
        def turn():
            order.append(name)
            return 10, 99.0 if order.count(name) == 1 else seconds

        return turn

    speeds = baseline_speed.take_turns({"a": make_turn("a", 2.0), "b": make_turn("b", 5.0)}, 2)
    assert order == ["a", "b"] * 3 and speeds == {"a": [5.0, 5.0], "b": [2.0, 2.0]}


@pytest.mark.oracles
def test_both_sides_train_in_processes_that_take_turns(rows, tiny_model, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    files = {split: folder / f"{split}.jsonl" for split in SPLITS}
    for split, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows["clinc150"][split]))
    line = baseline_speed.measure("clinc150", [2], files, tiny_model, tmp_path / "speed", 2, 2)
    assert list(line["tokens_per_second"]) == ["ours-2", "theirs-2"]
    assert all(
        len(speeds) == 2 and min(speeds) > 0 for speeds in line["tokens_per_second"].values()
    )
    assert line["ratio"] == line["medians"]["ours-2"] / line["medians"]["theirs-2"]
    with pytest.raises(RuntimeError, match="no turn came of ours; see .*log"):
        baseline_speed.measure("clinc150", [2], files, "/nowhere", tmp_path / "broken", 2, 2)
