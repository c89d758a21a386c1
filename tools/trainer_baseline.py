"""The other side of tools/baselines.py: `transformers.Trainer`, as its own examples use it, on the CPU in float32.

    python tools/trainer_baseline.py --task=sequence_classification --data=FOLDER --model=HF_FOLDER --workdir=OUT \\
        --settings='{"batch_size": 32, "seq_len": 64, "num_epochs": 5, "learning_rate": 3e-4}'

FOLDER has train, dev and test.jsonl (tools/baseline_data.py). After each epoch the development rows are scored, and the
test rows are predicted with the best epoch's weights; OUT gets result.json and predictions.jsonl. Batches are padded to
their longest row (DataCollatorWithPadding). Needs torch, transformers and accelerate.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.baseline_data import METRICS, SPLITS, Row, read_rows, score

MARKERS = ("<e1>", "</e1>", "<e2>", "</e2>")
MAX_ANSWER_TOKENS = 30
NUM_BEST = 20  # starts and ends that are tried together, as in transformers' run_qa.py
IGNORED = -100

Features = list[dict[str, Any]]  # what a model takes, unpadded


@dataclasses.dataclass(frozen=True)
class Settings:
    """stride: question answering's, tokens that two windows share. The schedule is linear, to 0."""

    batch_size: int = 32
    seq_len: int = 128
    num_epochs: float = 3.0
    learning_rate: float = 5e-5
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    stride: int = 128


# --- tasks: rows to features, and a model's outputs to predictions ----------------------------------------------------


class Classes:
    """A text to one of the labels.

    features: what the model trains on, or predicts from. decode: its outputs, as numpy arrays, to a prediction a row.
    """

    auto_model = "AutoModelForSequenceClassification"
    collator = "DataCollatorWithPadding"

    def __init__(self, tokenizer: Any, train: Sequence[Row], settings: Settings):
        self.tokenizer, self.settings = tokenizer, settings
        self.labels = self.labels_of(train)

    def labels_of(self, train: Sequence[Row]) -> list[str]:
        return sorted({row["label"] for row in train})

    def encode(self, rows: Sequence[Row]) -> Any:
        """transformers' encoding of all rows, with at most `seq_len` tokens each."""
        return self.tokenizer(
            [row["text"] for row in rows], truncation=True, max_length=self.settings.seq_len
        )

    def features(self, rows: Sequence[Row], labelled: bool) -> Features:
        features = unbatched(self.encode(rows))
        if labelled:
            for feature, row in zip(features, rows, strict=True):
                feature["labels"] = self.labels.index(row["label"])
        return features

    def decode(self, rows: Sequence[Row], logits_NC: Any) -> list[Any]:
        return [self.labels[i] for i in logits_NC.argmax(-1)]


class Relations(Classes):
    """A text with entity markers, each of which is one new token, to one of the labels."""

    def __init__(self, tokenizer: Any, train: Sequence[Row], settings: Settings):
        tokenizer.add_tokens(list(MARKERS), special_tokens=True)
        super().__init__(tokenizer, train, settings)


class Words(Classes):
    """Words to labels, learned and read at a word's first token; words that are cut off are said to be O."""

    auto_model = "AutoModelForTokenClassification"
    collator = "DataCollatorForTokenClassification"

    def labels_of(self, train: Sequence[Row]) -> list[str]:
        return sorted({label for row in train for label in row["labels"]})

    def encode(self, rows: Sequence[Row]) -> Any:
        return self.tokenizer(
            [row["words"] for row in rows],
            is_split_into_words=True,
            truncation=True,
            max_length=self.settings.seq_len,
        )

    def features(self, rows: Sequence[Row], labelled: bool) -> Features:
        encoded = self.encode(rows)
        features = unbatched(encoded)
        if labelled:
            for number, (feature, row) in enumerate(zip(features, rows, strict=True)):
                labels = [IGNORED] * len(feature["input_ids"])
                for word, position in first_tokens(encoded.word_ids(number)).items():
                    labels[position] = self.labels.index(row["labels"][word])
                feature["labels"] = labels
        return features

    def decode(self, rows: Sequence[Row], logits_NTC: Any) -> list[Any]:
        encoded, said = self.encode(rows), []
        for number, row in enumerate(rows):
            best = ["O"] * len(row["words"])
            for word, position in first_tokens(encoded.word_ids(number)).items():
                best[word] = self.labels[logits_NTC[number, position].argmax()]
            said.append(best)
        return said


class Answers(Classes):
    """A question and its context, in windows that overlap, to the answer's first and last token."""

    auto_model = "AutoModelForQuestionAnswering"

    def labels_of(self, train: Sequence[Row]) -> list[str]:
        return []

    def encode(self, rows: Sequence[Row]) -> Any:
        return self.tokenizer(
            [row["question"] for row in rows],
            [row["context"] for row in rows],
            truncation="only_second",
            max_length=self.settings.seq_len,
            stride=self.settings.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )

    def features(self, rows: Sequence[Row], labelled: bool) -> Features:
        encoded = self.encode(rows)
        features = unbatched(encoded)
        for window, feature in enumerate(features):
            row = rows[feature.pop("overflow_to_sample_mapping")]
            offsets = feature.pop("offset_mapping")
            if labelled:
                answer = row["answers"][0]
                begin, end = answer["start"], answer["start"] + len(answer["text"])
                inside = [t for t, part in enumerate(encoded.sequence_ids(window)) if part == 1]
                starts = [t for t in inside if offsets[t][0] <= begin < offsets[t][1]]
                ends = [t for t in inside if offsets[t][0] < end <= offsets[t][1]]
                found = bool(starts and ends)  # else the answer is [CLS]
                feature["start_positions"] = starts[0] if found else 0
                feature["end_positions"] = ends[-1] if found else 0
        return features

    def decode(self, rows: Sequence[Row], logits: Any) -> list[Any]:
        encoded = self.encode(rows)
        best = [(-np.inf, "")] * len(rows)
        for window, number in enumerate(encoded["overflow_to_sample_mapping"]):
            inside = [t for t, part in enumerate(encoded.sequence_ids(window)) if part == 1]
            total, first, last = best_span(logits[0][window], logits[1][window], inside)
            offsets = encoded["offset_mapping"][window]
            text = rows[number]["context"][offsets[first][0] : offsets[last][1]]
            best[number] = max(best[number], (total, text), key=lambda pair: pair[0])
        return [text for _, text in best]


TASKS: dict[str, type[Classes]] = {
    "sequence_classification": Classes,
    "relation_classification": Relations,
    "token_classification": Words,
    "question_answering": Answers,
}


def unbatched(encoded: Mapping[str, Sequence[Any]]) -> Features:
    """{'input_ids': [a, b]} -> [{'input_ids': a}, {'input_ids': b}]."""
    return [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]


def first_tokens(word_ids: Sequence[int | None]) -> dict[int, int]:
    """[None, 0, 0, 1, None] -> {0: 1, 1: 3}: each word's first token."""
    first: dict[int, int] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            first.setdefault(word, position)
    return first


def best_span(
    start_T: np.ndarray, end_T: np.ndarray, inside: Sequence[int]
) -> tuple[float, int, int]:
    """(score, first, last) of the best span of at most MAX_ANSWER_TOKENS among the likeliest starts and ends inside."""
    starts, ends = (sorted(inside, key=lambda t: -x[t])[:NUM_BEST] for x in (start_T, end_T))
    spans = [
        (float(start_T[first] + end_T[last]), first, last)
        for first in starts
        for last in ends
        if 0 <= last - first < MAX_ANSWER_TOKENS
    ]
    return max(spans, default=(-np.inf, inside[0], inside[0]))


# --- training ---------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of training without what lies between `stop` and `start`."""

    def __init__(self):
        self.seconds = 0.0
        self.since: float | None = None

    def start(self) -> None:
        self.since = time.perf_counter()

    def stop(self) -> None:
        if self.since is not None:
            self.seconds += time.perf_counter() - self.since
        self.since = None


def make_trainer(
    task: str,
    model: str,
    train: Sequence[Row],
    settings: Settings,
    workdir: Path,
    *,
    seed: int = 0,
    max_steps: int = -1,
) -> tuple[Any, Classes]:
    """(a `transformers.Trainer` over the training rows, how to make features and read predictions)."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.set_seed(seed)  # the new head is drawn before Trainer sets it
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    kind = TASKS[task](tokenizer, train, settings)
    sizes = {"num_labels": len(kind.labels)} if kind.labels else {}
    network = getattr(transformers, kind.auto_model).from_pretrained(
        model, dtype=torch.float32, **sizes
    )
    if len(tokenizer) > network.get_input_embeddings().num_embeddings:
        network.resize_token_embeddings(len(tokenizer))
    features = kind.features(train, labelled=True)
    num_steps = -(-len(features) // settings.batch_size) * settings.num_epochs
    arguments = transformers.TrainingArguments(
        output_dir=str(workdir),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=64,
        num_train_epochs=settings.num_epochs,
        max_steps=max_steps,
        learning_rate=settings.learning_rate,
        warmup_steps=round(settings.warmup_ratio * num_steps),
        weight_decay=settings.weight_decay,
        lr_scheduler_type="linear",
        include_num_input_tokens_seen="non_padding",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    trainer = transformers.Trainer(
        model=network,
        args=arguments,
        train_dataset=features,
        processing_class=tokenizer,
        data_collator=getattr(transformers, kind.collator)(tokenizer),
    )
    return trainer, kind


def predict(trainer: Any, kind: Classes, rows: Sequence[Row]) -> list[Any]:
    return kind.decode(rows, trainer.predict(kind.features(rows, labelled=False)).predictions)


def train_best(
    trainer: Any, kind: Classes, task: str, dev: Sequence[Row]
) -> tuple[Clock, list[dict[str, float]]]:
    """Trains, scores `dev` after each epoch, and leaves the best epoch's weights in the model.

    Returns the clock of the training alone, and each epoch's scores.
    """
    import transformers

    clock, history, best = Clock(), [], {}

    class EachEpoch(transformers.TrainerCallback):
        def on_epoch_begin(self, args, state, control, **other):
            clock.start()

        def on_epoch_end(self, args, state, control, **other):
            clock.stop()
            scores = score(task, dev, predict(trainer, kind, dev))
            print(f"epoch {state.epoch:g}: {METRICS[task]} {scores[METRICS[task]]:.4f}", flush=True)
            if not best or scores[METRICS[task]] > max(s[METRICS[task]] for s in history):
                best.update({k: v.clone() for k, v in trainer.model.state_dict().items()})
            history.append(scores)

    trainer.add_callback(EachEpoch())
    trainer.train()
    trainer.model.load_state_dict(best)
    return clock, history


def run(
    task: str, data: Path, model: str, settings: Settings, workdir: Path, seed: int
) -> dict[str, Any]:
    """Trains and predicts; returns, and writes as result.json, scores, tokens and seconds."""
    rows = {split: read_rows(data / f"{split}.jsonl") for split in SPLITS}
    workdir.mkdir(parents=True, exist_ok=True)
    trainer, kind = make_trainer(task, model, rows["train"], settings, workdir, seed=seed)
    clock, history = train_best(trainer, kind, task, rows["dev"])
    tokens = trainer.state.num_input_tokens_seen
    said = predict(trainer, kind, rows["test"])
    result = {
        "dev": max(history, key=lambda scores: scores[METRICS[task]]),
        "test": score(task, rows["test"], said),
        "tokens": tokens,
        "train_seconds": clock.seconds,
        "steps": trainer.state.global_step,
        "history": history,
    }
    lines = [json.dumps({"prediction": one}, ensure_ascii=False) + "\n" for one in said]
    (workdir / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    (workdir / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, choices=list(TASKS))
    parser.add_argument("--data", required=True, type=Path, help="train, dev and test.jsonl")
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--settings", default="{}", help="fields of Settings, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    fields = json.loads(args.settings)
    known = [field.name for field in dataclasses.fields(Settings)]
    if unknown := sorted(set(fields) - set(known)):
        parser.error(f"found: settings {', '.join(unknown)}; expected: of {', '.join(known)}")
    result = run(args.task, args.data, args.model, Settings(**fields), args.workdir, args.seed)
    print(json.dumps({key: result[key] for key in ("dev", "test", "tokens", "train_seconds")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
