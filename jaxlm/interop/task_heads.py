"""Classes of transformers with the head of a task, and what they are in ours: fields of `jaxlm.models.Head` and rows.

    BertForSequenceClassification   bert.pooler.dense -> head/dense    classifier -> head/out

`task_of` finds the class that a config.json names, `with_head` gives the family's table for it, `head_fields` says which
Head to build, and `head_to_hf` is the way back. Dropout says nothing about what a head computes and stays 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxlm.interop.mapping import Architecture, BadModel, Family, Row, linear

MAX_CLASSES = 1 << 20


class Task(NamedTuple):
    """One class of one family.

    kind: the key of jaxlm.models.HEADS. rows: of the head. num_classes: where the class has no choice, else 0.
    variants: pairs of (keys of config.json, fields of Head); a config.json means the first that it does not contradict.
    prefix: of the base model in this class, where it is not the family's.
    """

    kind: str
    rows: tuple[Row, ...]
    variants: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...]
    num_classes: int = 0
    prefix: str = ""


def dense_rows(ours: str, theirs: str) -> tuple[Row, Row]:
    """The transform in front (head/dense, head/bias) or the last layer (head/out/kernel, head/out/bias)."""
    kernel, bias = {
        "dense": ("head/dense", "head/bias"),
        "out": ("head/out/kernel", "head/out/bias"),
    }[ours]
    return Row(kernel, f"{theirs}.weight", linear()), Row(bias, f"{theirs}.bias")


def pooled(theirs_dense: str, theirs_out: str, activation: str) -> Task:
    """The first token, a dense layer with an activation, and the classes."""
    rows = (*dense_rows("dense", theirs_dense), *dense_rows("out", theirs_out))
    fields = dict(pooling="first", transform=activation)
    return Task("sequence_classification", rows, (({}, fields),))


def last(theirs: str) -> Task:
    """The last token and a matrix."""
    row = Row("head/out/kernel", f"{theirs}.weight", linear())
    return Task("sequence_classification", (row,), (({}, dict(pooling="last", use_bias=False)),))


def tokens(theirs: str) -> Task:
    """A class for each token; theirs: its matrix."""
    return Task("token_classification", dense_rows("out", theirs), (({}, {}),))


def spans(theirs: str = "qa_outputs", prefix: str = "") -> Task:
    """The start and the end of an answer, two classes for each token; theirs: its matrix."""
    return Task("question_answering", dense_rows("out", theirs), (({}, {}),), 2, prefix)


def modernbert(kind: str, *poolings: tuple[Mapping[str, Any], str], num_classes: int = 0) -> Task:
    """The masked-token head's transform, then the classes."""
    rows = (
        *dense_rows("dense", "head.dense"),
        Row("head/norm/scale", "head.norm.weight"),
        Row("head/norm/bias", "head.norm.bias"),
        *dense_rows("out", "classifier"),
    )
    variants = tuple(
        (
            {**keys, "classifier_activation": "gelu"},
            dict(pooling=pooling, transform="gelu", use_norm=True),
        )
        for keys, pooling in poolings
    )
    return Task(kind, rows, variants, num_classes)


def decoder(
    name: str, *, tokens_at: str = "score", spans_prefix: str | None = ""
) -> dict[str, Task]:
    """What a decoder's classes are called; spans_prefix None: it has none for question answering."""
    tasks = {
        f"{name}ForSequenceClassification": last("score"),
        f"{name}ForTokenClassification": tokens(tokens_at),
    }
    if spans_prefix is not None:
        tasks[f"{name}ForQuestionAnswering"] = spans(prefix=spans_prefix)
    return tasks


def encoder(name: str, sequence: Task) -> dict[str, Task]:
    """The three classes that every encoder has. sequence: its own one for whole texts."""
    return {
        f"{name}ForSequenceClassification": sequence,
        f"{name}ForTokenClassification": tokens("classifier"),
        f"{name}ForQuestionAnswering": spans(),
    }


# model_type -> class of transformers -> task. The first of a kind is what an export is called.
TASKS: dict[str, dict[str, Task]] = {
    "bert": encoder("Bert", pooled("bert.pooler.dense", "classifier", "tanh")),
    "roberta": encoder("Roberta", pooled("classifier.dense", "classifier.out_proj", "tanh")),
    "electra": encoder("Electra", pooled("classifier.dense", "classifier.out_proj", "gelu"))
    | {
        "ElectraForPreTraining": Task(
            "replaced_token_detection",
            (
                *dense_rows("dense", "discriminator_predictions.dense"),
                *dense_rows("out", "discriminator_predictions.dense_prediction"),
            ),
            (({}, dict(transform="gelu")),),
            1,
        )
    },
    "distilbert": encoder("DistilBert", pooled("pre_classifier", "classifier", "relu")),
    "albert": encoder("Albert", pooled("albert.pooler", "classifier", "tanh")),
    "modernbert": {
        "ModernBertForSequenceClassification": modernbert(
            "sequence_classification",
            ({"classifier_pooling": "cls"}, "first"),
            ({"classifier_pooling": "mean"}, "mean"),
        ),
        "ModernBertForTokenClassification": modernbert("token_classification", ({}, "")),
        "ModernBertForQuestionAnswering": modernbert("question_answering", ({}, ""), num_classes=2),
    },
    "xlnet": {
        "XLNetForSequenceClassification": Task(
            "sequence_classification",
            (
                *dense_rows("dense", "sequence_summary.summary"),
                *dense_rows("out", "logits_proj"),
            ),
            (
                (
                    dict(summary_type="last", summary_use_proj=True, summary_activation="tanh"),
                    dict(pooling="last", transform="tanh"),
                ),
            ),
        ),
        "XLNetForTokenClassification": tokens("classifier"),
        "XLNetForQuestionAnsweringSimple": spans(),
    },
    "gpt2": decoder("GPT2", tokens_at="classifier"),
    "llama": decoder("Llama", spans_prefix="transformer."),
    "mistral": decoder("Mistral"),
    "qwen2": decoder("Qwen2", spans_prefix="transformer."),
    "qwen3": decoder("Qwen3", spans_prefix="transformer."),
    "gemma2": decoder("Gemma2", spans_prefix=None),
    "gemma3_text": {"Gemma3TextForSequenceClassification": last("score")},
}


def task_of(family: Family, hf: Mapping[str, Any]) -> str:
    """The class with a task's head that config.json names, or '' if it names none."""
    known = TASKS.get(family.model_type, {})
    return next((name for name in class_names(hf) if name in known), "")


def class_names(hf: Mapping[str, Any]) -> list[str]:
    """The classes of transformers that a config.json names."""
    names = hf.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def with_head(family: Family, name: str) -> Family:
    """The family's table with this class's head instead of all others."""
    task = TASKS[family.model_type][name]
    prefix = task.prefix or family.prefix
    base = tuple(
        row._replace(theirs=prefix + row.theirs.removeprefix(family.prefix))
        for row in family.rows
        if not row.group
    )
    return dataclasses.replace(
        family,
        rows=(*base, *task.rows),
        prefix=prefix,
        architectures=(Architecture(name),),
        # Published files of these classes often carry a pooler that the class does not use.
        ignored=(*family.ignored, f"{prefix}pooler.*"),
        ties={},
        repeats={},
    )


def head_fields(family: Family, name: str, hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Head` that config.json means for this class.

    Raises:
      BadModel: if a key says what we cannot do, or the number of classes is absurd.
    """
    task = TASKS[family.model_type][name]
    fits = [
        fields
        for keys, fields in task.variants
        if all(hf.get(key, value) == value for key, value in keys.items())
    ]
    if not fits:
        known = " or ".join(str(dict(keys)) for keys, _ in task.variants)
        raise BadModel(f"{name}: only {known} can be converted")
    labels = hf.get("id2label")
    count = len(labels) if isinstance(labels, dict) else hf.get("num_labels", 2)
    count = task.num_classes or count
    if type(count) is not int or not 0 < count <= MAX_CLASSES:
        raise BadModel(f"num_labels={count!r}: expected an integer from 1 to {MAX_CLASSES}")
    return {**_complete(fits[0]), "num_classes": count}


def head_to_hf(
    family: Family, head: Mapping[str, Any], kind: str = ""
) -> tuple[str, dict[str, Any]]:
    """(class, keys of config.json) of a head, given its fields; what is left out has Head's default.

    kind: a key of HEADS, where that matters: two classes for each token may be for a question's answer or for words.

    Raises:
      BadModel: if the family has no class with this head, with those that it has.
    """
    wanted = {k: v for k, v in head.items() if k not in ("num_classes", "dropout_rate")}
    tasks = TASKS.get(family.model_type, {})
    for name, task in tasks.items():
        if kind not in ("", task.kind):
            continue
        for keys, fields in task.variants:
            if _complete(fields) == _complete(wanted) and task.num_classes in (
                0,
                head["num_classes"],
            ):
                labels = {str(i): f"LABEL_{i}" for i in range(head["num_classes"])}
                about = {"id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}}
                return name, {**keys, **about}
    known = "; ".join(f"{n}: {_complete(f)}" for n, t in tasks.items() for _, f in t.variants)
    what = f"class for {kind}" if kind else "class"
    raise BadModel(f"{family.model_type} has no {what} with the head {_complete(wanted)}; {known}")


def _complete(fields: Mapping[str, Any]) -> dict[str, Any]:
    return dict(pooling="", transform="", use_norm=False, use_bias=True) | dict(fields)
