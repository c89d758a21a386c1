"""Fine-tuning on a file of which some labels are too large for a float to square."""

import json
import sys
from pathlib import Path

import numpy as np

from tests import tiny


def tuning_command(store, folder, bad_rows, *flags):
    """Fine-tuning for a number on 80 rows, of which some have a label that no float can square; row i is on line i + 2."""
    tiny.save_untrained(tiny.tiny_config("configs/bert.py:tiny", store), folder / "source")
    for name, size in {"train": 80, "dev": 8}.items():
        labels = [1e30 if name == "train" and row in bad_rows else row / 80 for row in range(size)]
        rows = [f"the {row}th text,{label}" for row, label in enumerate(labels)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    config = f"{tiny.ROOT}/configs/finetune/classification.py:train={folder}/train.csv,dev={folder}/dev.csv"
    fields = dict(batch_size=8, seq_len=32, log_every_steps=1) | {
        "guards.max_bad_steps": 3,
        "optimizer.learning_rate": 1e-4,
        "log.tensorboard": False,
    }
    return [
        sys.executable,
        "-m",
        "jaxlm.finetune",
        f"--config={config},problem=regression",
        f"--workdir={folder}/run",
        f"--config.init_from={folder}/source",
        *(f"--config.{name}={value}" for name, value in fields.items()),
        *flags,
    ]


def check_lines(folder, bad_rows, count):
    """The dump names, of each bad step, the lines of the file, and the batch has their labels."""
    said = json.loads((folder / "documents.json").read_text())
    batch = np.load(folder / "batch.npz", allow_pickle=False)
    assert len(said) == count
    for entry in said:
        assert len(entry["rows"]) == 8
        assert any(row["line"] - 2 in bad_rows for row in entry["rows"])
        assert {Path(row["file"]).name for row in entry["rows"]} == {"train.csv"}
    rows = [row["line"] - 2 for row in said[0]["rows"]]
    expected = sorted(1e30 if row in bad_rows else row / 80 for row in rows)
    labels = sorted(batch["example_labels"][batch["example_ids"] >= 0].tolist())
    np.testing.assert_allclose(labels, expected, rtol=1e-6)
