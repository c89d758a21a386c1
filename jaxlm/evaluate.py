"""Evaluates a run on all of its held-out text: `python -m jaxlm.evaluate --checkpoint=W`.

With `--data=FILE|STORE`, and also of a Hugging Face model (`--checkpoint=hf:DIR_OR_HUB_ID`): how well it predicts that text.
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
from absl import flags, logging

from jaxlm import build, config_files, language_model, reports, tuning
from jaxlm.compiled import keep_compiled_programs
from jaxlm.entrypoint import run_program
from jaxlm.exits import with_status
from jaxlm.files import as_path
from jaxlm.flags import define_process_flags, process_options, require
from jaxlm.host import keep_freed_memory
from jaxlm.parallel import processes
from jaxlm.text_evaluation import evaluate_text
from jaxlm.training.checkpoints import evaluated_item, find_step, load_item, split_step


def open_run(checkpoint: str | Path, step: int | None = None) -> tuple[build.Run, Path]:
    """The run of a checkpoint, set to evaluate on all of its held-out text, and the checkpoint's folder."""
    step_dir = find_step(checkpoint, step)
    workdir = step_dir.parent.parent
    config = config_files.saved_config(workdir / "config.json")
    config.eval.num_batches = 0
    with processes.main_first("data"):
        return build.make_run(config, workdir), step_dir


def evaluate(checkpoint: str | Path, step: int | None = None) -> dict:
    """Held-out metrics of the whole validation split, and whose parameters ('raw' or 'ema') they are of."""
    run, step_dir = open_run(checkpoint, step)
    item = evaluated_item(step_dir)
    metrics = run.evaluate(load_item(step_dir, run.param_shapes, item))
    says = "ema" if item == "ema" else "raw"
    return {"step": int(step_dir.name), "params": says, **metrics}


def evaluate_data(
    checkpoint: str, data: str, step: int | None = None, **options: Any
) -> dict[str, Any]:
    """Metrics of a pretrained model on a text or a token store; options as of `evaluate_text`."""
    lm = language_model.load(checkpoint, step)
    is_run = not checkpoint.startswith(build.HUGGING_FACE)
    if is_run:
        workdir = find_step(split_step(checkpoint)[0], step).parent.parent
        options["config"] = config_files.saved_config(workdir / "config.json")
    return {"checkpoint": checkpoint} | evaluate_text(lm, data, **options)


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
        output = output or f"{as_path(data).stem}.predictions.csv"
    if output:
        reports.write_table(as_path(output), split, predictions)
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
    workdir = as_path(workdir)
    config = config_files.saved_config(workdir / "config.json")
    tokenizer = build.make_tokenizer(config, workdir)
    for path in build.make_stores(config, tokenizer, workdir).values():
        store = build.open_store(config, path, "validation")
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
    """Defines the command's flags."""
    define_process_flags()
    flags.DEFINE_string("checkpoint", None, "A run's workdir, or one of its checkpoints.")
    flags.DEFINE_integer("step", None, "Which checkpoint of the workdir; default the newest.")
    flags.DEFINE_bool(
        "baselines",
        False,
        "Also print what a model has to beat: gzip -9 and xz -9, or token frequencies.",
    )
    flags.DEFINE_string(
        "data",
        "",
        "A text file, JSON lines, a folder, a glob, or a token store; of a fine-tuned run the file to score or to predict.",
    )
    flags.DEFINE_string("text_field", "text", "Of --data's JSON lines or Parquet.")
    flags.DEFINE_integer(
        "window", 0, "Tokens of --data that are read at a time; 0: the context, at most 2048."
    )
    flags.DEFINE_integer(
        "stride", 0, "Of a decoder: tokens from window to window; 0: windows do not overlap."
    )
    flags.DEFINE_integer(
        "pseudo", 0, "Of an encoder: also the pseudo-perplexity of that many windows of --data."
    )
    flags.DEFINE_string("output", "", "Of a fine-tuned run: a CSV to write predictions to.")
    require(checkpoint="--checkpoint=W, or hf:FOLDER_OR_HUB_ID with --data")


@with_status
def main(argv):
    """Evaluates what the flags name, in all processes of the job."""
    del argv
    keep_freed_memory()
    keep_compiled_programs()
    logging.set_verbosity(logging.ERROR)  # of libraries: Orbax warns of a file that nothing needs
    with processes.joined(**process_options(flags.FLAGS)):
        run(flags.FLAGS)


def run(args: flags.FlagValues) -> None:
    """Evaluates a checkpoint by its kind: a task's on labelled rows, a language model on text."""
    checkpoint, is_finetuned = args.checkpoint, tuning.is_finetuned(args.checkpoint)
    refuse_unused(args, is_finetuned)
    if is_finetuned:
        results = evaluate_task(checkpoint, args.data, args.step, args.output)
    elif args.data:
        options = dict(window=args.window, stride=args.stride, num_pseudo=args.pseudo)
        results = evaluate_data(
            checkpoint, args.data, args.step, text_field=args.text_field, **options
        )
    else:
        results = evaluate(checkpoint, args.step)
    if not processes.is_main():
        return
    print(json.dumps(results, indent=2))
    if args.baselines:
        title, rows = compare_with_baselines(checkpoint, results, args.step)
        print(f"\n{title}")
        for name, figure in rows.items():
            print(f"  {name:<22} {figure:.3f}")


def refuse_unused(args: flags.FlagValues, is_finetuned: bool) -> None:
    """Raises ValueError for flags that would change nothing, and for a model without a text."""
    problems = []
    if args.checkpoint.startswith(build.HUGGING_FACE) and not args.data:
        problems.append(f"{args.checkpoint} without --data: it brings no held-out text of its own")
    if args.baselines and (is_finetuned or args.data):
        problems.append("--baselines with --data: it is of a pretrained run's own held-out text")
    if args.output and not is_finetuned:
        problems.append(f"--output={args.output}: predictions are of fine-tuned runs")
    for name in ("window", "stride", "pseudo"):
        if getattr(args, name) and (is_finetuned or not args.data):
            problems.append(f"--{name}={getattr(args, name)}: is of a pretrained model and --data")
    if processes.count() > 1 and (is_finetuned or args.data or args.baselines):
        problems.append(
            f"{processes.count()} processes: only a pretrained run's own held-out text is evaluated by several; "
            "start one"
        )
    if problems:
        raise ValueError("\n  ".join(problems))


def command() -> None:
    """The console script jaxlm-evaluate."""
    define_flags()
    run_program(main, __doc__)


if __name__ == "__main__":
    command()
