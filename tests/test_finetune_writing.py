"""Fine-tuning models that write, end to end on tiny ones: dialogues, translations, and what a tuned run then does."""

import json
import math
import random

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxlm import config_files, evaluate, tuning
from jaxlm.finetune import finetune
from jaxlm.language_model import load
from jaxlm.tokenizers import make_tokenizer
from tests import tiny

SMALL = {
    "batch_size": 8,
    "seq_len": 64,
    "num_epochs": 1.0,
    "optimizer.learning_rate": 1e-2,
    "dropout_rate": 0.0,
    "data.dev_fraction": 0.25,
    "task.target_len": 9,
    "eval.batch_size": 8,
    "log_every_steps": 1,
    "log.progress": False,
    "log.tensorboard": False,
}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    store = tiny.make_store(folder / "store")
    config = tiny.tiny_config("configs/gpt.py:tiny,optimizer=adamw", store, model__num_layers=1)
    return tiny.save_untrained(config, folder / "gpt")


def write_dialogues(path, size=32):
    rng = random.Random(0)
    rows = []
    for number in range(size):
        said = [f"{number} {rng.choice(['a', 'bb', 'ccc'])}" for _ in range(rng.randint(1, 2))]
        turns = [(("user", text), ("assistant", text[-1])) for text in said]
        messages = [{"role": role, "content": c} for turn in turns for role, c in turn]
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_config(name, source, data, **changes):
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    overrides = SMALL | {"init_from": str(source), "data.train": str(data)} | changes
    return config_files.read_config(f"{tiny.ROOT}/configs/finetune/{name}.py", overrides)


@pytest.fixture(scope="module")
def tuned(decoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    data = write_dialogues(folder / "chats.jsonl")
    config = make_config("instructions", decoder, data, num_epochs=3.0, eval__dev_texts=8)
    return finetune(config, folder / "run"), folder / "run", data


def test_a_score_of_written_texts_decides_only_where_some_are_written(decoder, tmp_path):
    data = write_dialogues(tmp_path / "chats.jsonl")
    best = dict(checkpoint__best_metric="exact_match", task__metrics="exact_match")
    with pytest.raises(ValueError, match="set --config.eval.dev_texts=100"):
        tuning.prepare(make_config("instructions", decoder, data, **best), tmp_path / "run")
    config = make_config("instructions", decoder, data, **best, eval__dev_texts=8)
    assert tuning.prepare(config, tmp_path / "run").config.checkpoint.best_mode == "max"


def test_the_loss_of_held_out_answers_falls_and_answers_are_written(tuned):
    report, workdir, _ = tuned
    evals = [line for line in tiny.learned(workdir) if line["split"] == "eval"]
    assert len(evals) == 3 and evals[-1]["nll"] < evals[0]["nll"] - 0.1
    assert all(0 <= line["exact_match"] <= 1 for line in evals)
    assert report["dev"]["nll"] == min(line["nll"] for line in evals)
    assert report["dev"]["perplexity"] == pytest.approx(np.exp(report["dev"]["nll"]))
    lines = [json.loads(x) for x in (workdir / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and all(isinstance(line["prediction"]["text"], str) for line in lines)


def test_a_tuned_dialogue_answers_from_python_from_files_and_as_a_language_model(tuned, tmp_path):
    report, workdir, data = tuned
    model = tuning.load_finetuned(workdir)
    one, other = model.predict(["3 a", {"messages": [{"role": "user", "content": "3 a"}]}])
    assert one == other and set(one) == {"text"}
    scores = evaluate.evaluate_task(workdir, str(data), output=str(tmp_path / "out.csv"))
    assert scores["records"] == 32 and scores["nll"] > 0
    assert "predicted_text" in (tmp_path / "out.csv").read_text().splitlines()[0]
    assert load(workdir).no_lm == ""
    (tmp_path / "asked.jsonl").write_text('{"messages": [{"role": "user", "content": "3 a"}]}\n')
    asked = evaluate.evaluate_task(
        workdir, str(tmp_path / "asked.jsonl"), output=str(tmp_path / "answers.csv")
    )
    assert asked["records"] == 1 and (tmp_path / "answers.csv").is_file()


@pytest.fixture(scope="module")
def encoder_decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    spec = "configs/t5.py:tiny,objective=seq2seq_prefix_lm,optimizer=adamw"
    config = tiny.tiny_config(spec, tiny.make_store(folder / "store"), model__num_layers=1)
    return tiny.save_untrained(config, folder / "t5")


def test_parallel_texts_are_translated_by_beams_and_scored(encoder_decoder, tmp_path):
    words = ["aa", "bb", "cc", "dd"]
    lines = [f"{a} {b} {c}" for a in words for b in words for c in words[:2]]
    (tmp_path / "x.en").write_text("\n".join(lines) + "\n")
    (tmp_path / "x.de").write_text("\n".join(line.upper() for line in lines) + "\n")
    data = f"{tmp_path}/x.en+{tmp_path}/x.de"
    config = make_config("translation", encoder_decoder, data, eval__num_beams=2)
    report = finetune(config, tmp_path / "run")
    assert 0 <= report["dev"]["bleu"] <= 100 and 0 <= report["dev"]["chrf"] <= 100
    assert report["dev"]["loss"] > report["dev"]["nll"]  # smoothed
    [said] = tuning.load_finetuned(tmp_path / "run").predict(["aa bb cc"])
    assert set(said) == {"text"}


def test_preferences_start_from_a_tuned_run_and_part_the_answers(tuned, tmp_path):
    _, workdir, _ = tuned
    rows = [{"prompt": f"{n} a", "chosen": "a", "rejected": "zz"} for n in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        "preferences", workdir, tmp_path / "pairs.jsonl", num_epochs=2.0, evals_per_epoch=0.5
    )
    report = finetune(config, tmp_path / "run")
    lines = [line for line in tiny.learned(tmp_path / "run") if line["split"] == "train"]
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)  # it is the reference still
    assert report["dev"]["loss"] < math.log(2) - 0.01 and report["dev"]["accuracy"] > 0.9
    with pytest.raises(ValueError, match="report.json has its scores"):
        evaluate.evaluate_task(tmp_path / "run", str(tmp_path / "pairs.jsonl"))


def test_another_template_for_a_run_that_began_is_refused(tuned):
    _, workdir, _ = tuned
    fitted = json.loads((workdir / "task.json").read_text())
    assert "endgeneration" in fitted["template"]
    with pytest.raises(ValueError, match="other template"):
        tuning.write_task(workdir, "dialogue", fitted | {"template": "{{ eos_token }}"})
    newer = fitted | {"end": "what this run's version did not know"}
    tuning.write_task(workdir, "dialogue", newer)
    assert json.loads((workdir / "task.json").read_text()) == fitted


@pytest.mark.parametrize("end", ["eos", "sep"])
def test_a_run_knows_which_token_its_template_ends_answers_with(end, tmp_path):
    """As ChatML's <|im_end|> does where eos is <|endoftext|>."""
    file, tokenizer = tmp_path / "chat.jinja", make_tokenizer("bytes", num_sentinels=0)
    file.write_text("{% for m in messages %}{{ m.content ~ " + end + "_token }}{% endfor %}")
    config = ConfigDict(dict(task=dict(template=str(file))))
    source = tuning.Source("gpt", {}, tokenizer)
    assert tuning.writing.find_writing(config, source)["end_id"] == tokenizer.roles[end]


TEMPLATE = "{% for m in messages %}{{ m.content ~ eos_token }}{% endfor %}"
FOLDERS = {
    "a file": {"chat_template.jinja": TEMPLATE},
    "settings": {"tokenizer_config.json": json.dumps({"chat_template": TEMPLATE})},
    "several": {
        "tokenizer_config.json": json.dumps(
            {
                "chat_template": [
                    {"name": "tools", "template": "x"},
                    {"name": "default", "template": TEMPLATE},
                ]
            }
        )
    },
}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_template_is_the_tokenizer_folders_own(name, tmp_path):
    for file, text in FOLDERS[name].items():
        (tmp_path / file).write_text(text)
    source = tuning.Source("gpt", {}, None, hf_files=tmp_path)
    assert tuning.writing.find_template("", source) == TEMPLATE
    (tmp_path / "other.jinja").write_text("other")
    assert tuning.writing.find_template(str(tmp_path / "other.jinja"), source) == "other"
    assert "endgeneration" in tuning.writing.find_template("", tuning.Source("gpt", {}, None))
