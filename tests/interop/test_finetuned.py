"""Fine-tuned runs on their way out: adapters merged, frozen parameters along, labels by their names."""

import json

import numpy as np
import pytest

from jaxlm.interop import finetuned
from jaxlm.interop.mapping import BadModel
from jaxlm.interop.source import open_source
from jaxlm.models import lora
from tests.interop.finetuned_run import LABELS, FineTuned
from tools import inspect_checkpoint


def merged(run):
    """The parameters with the adapters in the matrices, in numpy."""
    scale = run.model_config.lora_alpha / run.model_config.lora_rank
    layers = {part: dict(arrays) for part, arrays in run.params["layers"].items()}
    for part in layers.values():
        for name in [n.removesuffix(lora.A) for n in part if n.endswith(lora.A)]:
            a_L, b_L = part.pop(name + lora.A), part.pop(name + lora.B)
            products = [np.tensordot(a, b, axes=1) for a, b in zip(a_L, b_L, strict=True)]
            part[name] = part[name] + scale * np.stack(products)
    return run.params | {"layers": layers}


def check_export(run, tmp_path):
    """Every tensor is that of the merged model, and there is none besides."""
    certificate, folder = run.export(tmp_path)
    assert certificate["passed"]
    found, expected = open_source(folder), run.twin.back(merged(run))
    assert set(found.tensors) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_allclose(found.tensors[name].read(), tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert_sequence", "albert_sequence", "distilbert_sequence"])
def test_the_exported_tensors_are_the_merged_ones(name, tmp_path):
    check_export(FineTuned(name), tmp_path)


WRONG = {
    "dropped": lambda kernel, a, b, scale: kernel,
    "not scaled": lambda kernel, a, b, scale: kernel + np.tensordot(a, b, axes=1),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_that_check_fails_where_adapters_are(wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "merge_kernel", WRONG[wrong])
    with pytest.raises(AssertionError, match="Not equal"):
        check_export(FineTuned("bert_sequence"), tmp_path)


def test_the_exported_config_names_the_labels_and_the_kind_of_problem(tmp_path):
    _, folder = FineTuned("bert_sequence").export(tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {str(i): label for i, label in enumerate(LABELS)}
    assert config["label2id"] == {label: i for i, label in enumerate(LABELS)}
    assert config["problem_type"] == "multi_label_classification"
    assert "AutoModelForSequenceClassification" in (folder / "README.md").read_text()


def test_two_classes_at_every_token_are_spans_or_words_as_the_task_says(tmp_path):
    for task, labels in (("question_answering", []), ("token_classification", ["O", "B"])):
        run = FineTuned("bert_tokens", num_classes=2, task=task, labels=labels)
        if task == "question_answering":
            run.twin = FineTuned("bert_spans").twin
        _, folder = run.export(tmp_path / task)
        (name,) = json.loads((folder / "config.json").read_text())["architectures"]
        assert name == {"q": "BertForQuestionAnswering", "t": "BertForTokenClassification"}[task[0]]


def test_a_model_of_vectors_is_exported_as_its_body(tmp_path):
    vectors = dict(num_classes=0, pooling="mean", transform="")
    run = FineTuned("bert_sequence", train="all", task="embedding", labels=[], **vectors)
    certificate, folder = run.export(tmp_path)
    assert certificate["passed"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["BertModel"] and "problem_type" not in config


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "b"], "found 2 labels, expected 3"),
        (["a", "b", "a"], "a: more than one class"),
        (["a", "b", 3], r"\[3\]: expected words"),
    ],
)
def test_labels_that_do_not_name_the_classes_are_refused(labels, message, tmp_path):
    with pytest.raises(BadModel, match=message):
        FineTuned("bert_sequence", labels=labels).export(tmp_path)
    assert not (tmp_path / "out").exists()


def test_adapters_of_which_nobody_knows_the_scale_are_refused(tmp_path):
    workdir = FineTuned("bert_sequence").write(tmp_path / "run")
    manifest = workdir / "checkpoints" / "0" / "manifest" / "metadata"
    manifest.write_text("{}")
    with pytest.raises(BadModel, match="lora_rank=0"):
        finetuned.open_parameters(workdir / "checkpoints" / "0", "params")


def test_a_fine_tuned_checkpoint_can_be_looked_into_and_compared_with_its_export(tmp_path):
    run = FineTuned("bert_sequence")
    _, folder = run.export(tmp_path)
    assert inspect_checkpoint.differences(folder, tmp_path / "run") == []
    text, bad = inspect_checkpoint.describe(tmp_path / "run")
    assert bad == 0 and "params/layers/attention/query_lora_a" in text
    assert "frozen/layers/attention/query " in text and "parameters in" in text
