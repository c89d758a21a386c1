"""What a fine-tuned model leaves for a reader: report.json, predictions.jsonl, a printed report, a confusion picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.files import write_text, write_whole
from jaxlm.parallel import processes
from jaxlm.training.confusion import plot_confusion
from jaxlm.tuning import Split, TaskRun

PyTree = Any


def write_reports(run: TaskRun, params: PyTree, step: int, workdir: Path) -> dict[str, Any]:
    """Evaluates the development and the test split, prints their reports and writes report.json, predictions.jsonl (of the
    test split, or of the development split if there is none) and plots/confusion.png. All processes evaluate, one writes."""
    report: dict[str, Any] = {
        "step": step,
        "task": run.config.task.name,
        "records": {name: len(split.records) for name, split in run.splits.items()},
        "truncated": {name: split.truncated for name, split in run.splits.items()},
    }
    for name in [name for name in ("dev", "test") if name in run.splits]:
        split = run.splits[name]
        if split.is_labelled:
            report[name], predictions = run.scored(params, name)
        else:
            _, predictions = run.predictor.predict(params, split, run.eval_batches[name])
        if not processes.is_main():
            continue
        if split.is_labelled:
            print(f"\n{name}: {len(split.records)} records, step {step}")
            print_scores(report[name])
            print(run.objective.report(split.records, predictions))
        write_predictions(workdir / "predictions.jsonl", split, predictions)
        draw_confusion(run.objective, split, predictions, workdir / "plots" / "confusion.png")
    if processes.is_main():
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        write_text(workdir / "report.json", text)
    return report


def print_scores(scores: Mapping[str, float]) -> None:
    """Prints a score a line."""
    for name, value in scores.items():
        print(f"  {name:<22} {value:.4f}")


def write_predictions(path: Path, split: Split, predictions: Sequence[Mapping[str, Any]]) -> None:
    """One JSON line for each record, in the file's order: where it stands, its fields, and `prediction`."""
    lines = (
        {
            "file": record.source,
            "line": record.line,
            **record.fields,
            "prediction": prediction,
        }
        for record, prediction in zip(split.records, predictions, strict=True)
    )
    text = (json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(path, lambda file: file.writelines(line.encode() for line in text))


def draw_confusion(task: Any, split: Split, predictions: Sequence[Mapping], path: Path) -> None:
    """The confusion matrix of tasks that have one."""
    if not split.is_labelled or not hasattr(task, "confusion"):
        return
    counts = task.confusion(split.records, predictions)
    if counts is not None:
        path.parent.mkdir(exist_ok=True)
        plot_confusion(counts, task.labels, path)


def write_table(path: Path, split: Split, predictions: Sequence[Mapping[str, Any]]) -> None:
    """A CSV with a row for each record: its fields and its prediction, a column for each value; nested ones as JSON.

    Of probabilities, {'probabilities': {'yes': 0.9, …}}, each has a column, p(yes).
    """
    rows = [
        {name: _cell(value) for name, value in record.fields.items()} | _flat(prediction)
        for record, prediction in zip(split.records, predictions, strict=True)
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def _flat(prediction: Mapping[str, Any]) -> dict[str, Any]:
    row = {f"predicted_{k}": _cell(v) for k, v in prediction.items() if k != "probabilities"}
    probabilities = prediction.get("probabilities", {})
    if isinstance(probabilities, Mapping):
        return row | {f"p({label})": value for label, value in probabilities.items()}
    return row | {"probabilities": _cell(probabilities)}


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
