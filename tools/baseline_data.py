"""The data sets of tools/baselines.py, as JSON lines with one name for each field, and how predictions are scored.

    DATA/clinc150/data_full.json ──▶ WORK/data/clinc150/{train,dev,test}.jsonl ──▶ jaxlm and transformers

Both sides read the same files, and both sides' predictions go through `score`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlm.data.records import Record, read_records
from jaxlm.data.splits import split_train_dev
from jaxlm.tasks import scores
from jaxlm.tasks.squad_scores import squad_scores

Row = dict[str, Any]
Splits = dict[str, list[Row]]
SPLITS = ("train", "dev", "test")
DEV_FRACTION = 0.1  # of SemEval's training rows
XQUAD_ARTICLES = {"test": 10, "dev": 4}  # of 48; the others are for training


def read_clinc150(folder: Path) -> Splits:
    """Larson et al. 2019 (arXiv:1909.02027), 150 intents in scope: train, val and test of data_full.json."""
    names = {"train": "train", "dev": "val", "test": "test"}
    rows = {
        split: _rows(f"{folder / 'data_full.json'}:{name}", column0="text", column1="label")
        for split, name in names.items()
    }
    return rows


def read_wnut17(folder: Path) -> Splits:
    """Derczynski et al. 2017 (W17-4418): six kinds of emerging entities, BIO."""
    files = {
        "train": "wnut17train.conll",
        "dev": "emerging.dev.conll",
        "test": "emerging.test.annotated",
    }
    return {
        split: _rows(str(folder / name), "conll", column0="words", column1="labels")
        for split, name in files.items()
    }


def read_semeval(folder: Path) -> Splits:
    """Hendrickx et al. 2010 (S10-1006): 18 directed relations and Other. A tenth of the training rows is for development."""
    train = _rows(str(folder / "TRAIN_FILE.TXT"), "semeval", text="text", label="label")
    records = [Record("TRAIN_FILE.TXT", number, row) for number, row in enumerate(train, 1)]
    sides = split_train_dev(records, DEV_FRACTION, labels=[row["label"] for row in train])
    test = _rows(str(folder / "TEST_FILE_FULL.TXT"), "semeval", text="text", label="label")
    return {"train": _fields(sides[0]), "dev": _fields(sides[1]), "test": test}


def read_xquad(folder: Path) -> Splits:
    """Artetxe et al. 2020 (arXiv:1910.11856), English, a split of our own: whole articles, in the order of a hash."""
    articles = json.loads((folder / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    articles.sort(key=lambda article: hashlib.sha256(article["title"].encode()).digest())
    ends = {"test": XQUAD_ARTICLES["test"], "dev": sum(XQUAD_ARTICLES.values())}
    parts = {
        "test": articles[: ends["test"]],
        "dev": articles[ends["test"] : ends["dev"]],
        "train": articles[ends["dev"] :],
    }
    return {split: _questions(parts[split]) for split in SPLITS}


def _questions(articles: Sequence[Mapping[str, Any]]) -> list[Row]:
    return [
        {
            "id": question["id"],
            "question": question["question"],
            "context": paragraph["context"],
            "answers": [
                {"text": a["text"], "start": a["answer_start"]} for a in question["answers"]
            ],
        }
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def _rows(path: str, format: str = "", **names: str) -> list[Row]:
    """All rows of a file, with fields renamed; one that cannot be read is an error."""
    records, problems = read_records(path, format)
    if problems:
        raise ValueError("\n".join(map(str, problems[:10])))
    return [{names[key]: record.fields[key] for key in names} for record in records]


def _fields(records: Sequence[Record]) -> list[Row]:
    return [record.fields for record in records]


# --- scores -----------------------------------------------------------------------------------------------------------


def _score_classes(rows: Sequence[Row], said: Sequence[str]) -> dict[str, float]:
    names = sorted({row["label"] for row in rows} | set(said))
    ids = {name: number for number, name in enumerate(names)}
    return scores.classification_scores(
        [ids[row["label"]] for row in rows], [ids[name] for name in said], names
    )


def _score_relations(rows: Sequence[Row], said: Sequence[str]) -> dict[str, float]:
    return scores.semeval_scores([row["label"] for row in rows], said)


def _score_words(rows: Sequence[Row], said: Sequence[Sequence[str]]) -> dict[str, float]:
    return scores.entity_scores([row["labels"] for row in rows], said)


def _score_answers(rows: Sequence[Row], said: Sequence[str]) -> dict[str, float]:
    return squad_scores([[answer["text"] for answer in row["answers"]] for row in rows], said)


SCORES: dict[str, Callable[[Sequence[Row], Sequence[Any]], dict[str, float]]] = {
    "sequence_classification": _score_classes,
    "relation_classification": _score_relations,
    "token_classification": _score_words,
    "question_answering": _score_answers,
}
METRICS = {
    "sequence_classification": "accuracy",
    "relation_classification": "semeval_f1",
    "token_classification": "entity_f1",
    "question_answering": "f1",
}


def score(task: str, rows: Sequence[Row], said: Sequence[Any]) -> dict[str, float]:
    """The scores of jaxlm/tasks/scores.py, for whoever's predictions: a label, a word's labels or an answer a row.

    Raises:
      ValueError: not one prediction for each row.
    """
    if len(rows) != len(said):
        raise ValueError(f"found {len(said)} predictions for {len(rows)} rows")
    return SCORES[task](rows, said)


# --- the data sets ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """folder: in the folder of --data; origin: whose files it holds. task: a key of SCORES. config: ours. settings: of both
    sides, by trainer's names; best: what a side changes of them, because its development score or its speed is better so.
    """

    folder: str
    origin: str
    task: str
    read: Callable[[Path], Splits]
    config: str
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    best: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def settings_of(self, side: str) -> dict[str, Any]:
        return {**self.settings, **self.best.get(side, {})}


COMMON = {"num_epochs": 3, "learning_rate": 3e-4, "warmup_ratio": 0.1, "weight_decay": 0.01}
DATASETS = {
    "clinc150": Dataset(
        "clinc150",
        "github.com/clinc/oos-eval",
        "sequence_classification",
        read_clinc150,
        "configs/finetune/classification.py",
        (0, 1, 2),
        COMMON | {"num_epochs": 5, "batch_size": 32, "seq_len": 64},
        {"ours": {"batch_size": 64, "learning_rate": 4e-4, "task.pooling": "mean"}},
    ),
    "wnut17": Dataset(
        "wnut17",
        "github.com/leondz/emerging_entities_17",
        "token_classification",
        read_wnut17,
        "configs/finetune/tagging.py",
        (0, 1, 2),
        COMMON | {"batch_size": 16, "seq_len": 128},
    ),
    "semeval": Dataset(
        "semeval2010_task8",
        "github.com/sahitya0000/Relation-Classification",
        "relation_classification",
        read_semeval,
        "configs/finetune/relations.py",
        (0,),
        COMMON | {"batch_size": 32, "seq_len": 128},
    ),
    "xquad": Dataset(
        "xquad",
        "github.com/google-deepmind/xquad",
        "question_answering",
        read_xquad,
        "configs/finetune/question_answering.py",
        (0,),
        COMMON | {"batch_size": 8, "seq_len": 384},
    ),
}


def write_splits(name: str, data: Path, folder: Path) -> dict[str, Path]:
    """Writes a data set's three files below `folder`; returns split -> file.

    Raises:
      FileNotFoundError: if --data has no such data set.
      ValueError: if a file is there with other rows, of which there may be results.
    """
    source = data / DATASETS[name].folder
    if not source.is_dir():
        raise FileNotFoundError(
            f"found: no {source}; change: put the files of {DATASETS[name].origin} there, "
            f"or --data=FOLDER that has {source.name}"
        )
    files = {split: folder / name / f"{split}.jsonl" for split in SPLITS}
    for split, rows in DATASETS[name].read(source).items():
        files[split].parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if files[split].is_file() and files[split].read_text(encoding="utf-8") != text:
            raise ValueError(
                f"found: rows in {files[split]} that are not those of {source}; change: another --work, or --data"
            )
        files[split].write_text(text, encoding="utf-8")
    return files


def read_rows(path: Path) -> list[Row]:
    """Not splitlines(): tweets have U+2028 inside words."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
