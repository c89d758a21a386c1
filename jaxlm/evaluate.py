"""Evaluates a run on all of its held-out text: `python -m jaxlm.evaluate --checkpoint=W`.

Of a fine-tuned run: `python -m jaxlm.evaluate --checkpoint=F --data=FILE` prints the scores of a file with labels, and
writes a table of labels and probabilities for one without, or wherever --output says.
"""

import gzip
import json
import lzma
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

from jaxlm import build, reports, tuning
from jaxlm.data.token_store import TokenStore
from jaxlm.host import keep_freed_memory
from jaxlm.training.checkpoints import evaluated_item, find_step, load_item


def open_run(checkpoint: str | Path, step: int | None = None) -> tuple[build.Run, Path]:
    """The run of a checkpoint, set to evaluate on all of its held-out text, and the checkpoint's folder."""
    step_dir = find_step(checkpoint, step)
    workdir = step_dir.parent.parent
    config = build.saved_config(workdir / "config.json")
    config.eval.num_batches = 0
    return build.make_run(config, workdir), step_dir


def evaluate(checkpoint: str | Path, step: int | None = None) -> dict:
    """Held-out metrics of the whole validation split, and whose parameters ('raw' or 'ema') they are of."""
    run, step_dir = open_run(checkpoint, step)
    item = evaluated_item(step_dir)
    metrics = run.evaluate(load_item(step_dir, run.param_shapes, item))
    says = "ema" if item == "ema" else "raw"
    return {"step": int(step_dir.name), "params": says, **metrics}


def evaluate_task(
    checkpoint: str | Path, data: str = "", step: int | None = None, output: str = ""
) -> dict:
    """Scores of a fine-tuned run on a file with labels; predictions as a CSV where there are none, or to `output`.

    data: '' is the run's own test file, or its development file.
    """
    model = tuning.load_finetuned(checkpoint, step)
    config, task = model.predictor.config, model.predictor.task
    data = data or config.data.test or config.data.dev
    if not data:
        raise ValueError("--data is empty, and the run had neither a test nor a development file")
    split = model.read(data)
    result: dict[str, Any] = {"step": model.step, "data": data, "records": len(split.records)}
    if split.is_labelled:
        scores, predictions = model.predictor.scored(model.params, split)
        print(task.report(split.records, predictions))
        result |= scores
    else:
        _, predictions = model.predictor.predict(model.params, split)
        output = output or f"{Path(data.partition(':')[0]).stem}.predictions.csv"
    if output:
        reports.write_table(Path(output), split, predictions)
        result["predictions"] = output
    return result


def compare_with_baselines(
    checkpoint: str | Path, metrics: dict, step: int | None = None
) -> tuple[str, dict[str, float]]:
    """What the held-out figures have to beat: (a title, rows of figures, the model's own first).

    For a model that predicts every token: gzip and xz on the same text. For masked ones, whose bits do not
    add up to a code of the text: always giving the tokens' own frequencies, or the commonest token.
    """
    if "bits_per_byte" in metrics:
        workdir = find_step(checkpoint, step).parent.parent
        rows = {"this model": metrics["bits_per_byte"]}
        rows |= compressor_bits_per_byte(held_out_documents(workdir))
        return "bits per byte on the held-out text (smaller is better)", rows
    run, _ = open_run(checkpoint, step)
    entropy, share = unigram_baselines(
        batch for batches in run.eval_batches.values() for batch in batches
    )
    rows = {"this model's nats": metrics["nll"], "unigram entropy": entropy}
    rows |= {"this model's accuracy": metrics["accuracy"], "commonest token": share}
    return "masked tokens of the held-out text (nats: smaller is better; accuracy: larger)", rows


def unigram_baselines(batches: Iterable[Mapping[str, np.ndarray]]) -> tuple[float, float]:
    """(entropy in nats, share of the commonest) of all labels with a weight, by their own frequencies."""
    counts: Counter[int] = Counter()
    for batch in batches:
        counts.update(np.asarray(batch["labels"])[np.asarray(batch["weights"]) > 0].tolist())
    p = np.array(list(counts.values())) / counts.total()
    return float(-(p * np.log(p)).sum()), float(p.max())


def held_out_documents(workdir: str | Path) -> Iterator[str]:
    """The texts of the validation split of every source of a run, as its tokenizer reads them back."""
    config = build.saved_config(Path(workdir) / "config.json")
    tokenizer = build.make_tokenizer(config, Path(workdir))
    for path in build.make_stores(config, tokenizer, Path(workdir)).values():
        store = TokenStore(path, "validation")
        for index in range(store.num_documents):
            yield tokenizer.decode(store.tokens(*store.document_span(index)))


def compressor_bits_per_byte(texts: Iterator[str]) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` on all texts in one stream: what a model has to beat."""
    data = "".join(texts).encode("utf-8")
    sizes = {
        "gzip -9": len(gzip.compress(data, compresslevel=9)),
        "xz -9": len(lzma.compress(data, preset=9)),
    }
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "A run's workdir, or one of its checkpoints.")
    flags.DEFINE_integer("step", None, "Which checkpoint of the workdir; default the newest.")
    flags.DEFINE_bool(
        "baselines",
        False,
        "Also print what a model has to beat: gzip -9 and xz -9, or token frequencies.",
    )
    flags.DEFINE_string("data", "", "Of a fine-tuned run: the file to score or to predict.")
    flags.DEFINE_string("output", "", "Of a fine-tuned run: a CSV to write predictions to.")
    flags.mark_flag_as_required("checkpoint")


def main(argv):
    del argv
    keep_freed_memory()
    args = flags.FLAGS
    logging.set_verbosity(logging.ERROR)  # of libraries: Orbax warns of a file that nothing needs
    if tuning.is_finetuned(args.checkpoint):
        print(
            json.dumps(evaluate_task(args.checkpoint, args.data, args.step, args.output), indent=2)
        )
        return
    metrics = evaluate(args.checkpoint, args.step)
    print(json.dumps(metrics, indent=2))
    if args.baselines:
        title, rows = compare_with_baselines(args.checkpoint, metrics, args.step)
        print(f"\n{title}")
        for name, figure in rows.items():
            print(f"  {name:<22} {figure:.3f}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
