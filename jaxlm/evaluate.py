"""Evaluates a run on all of its held-out text: `python -m jaxlm.evaluate --checkpoint=W`."""

import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags, logging

from jaxlm import build
from jaxlm.data.token_store import TokenStore
from jaxlm.host import keep_freed_memory
from jaxlm.training.checkpoints import evaluated_item, find_step, load_item


def evaluate(checkpoint: str | Path, step: int | None = None) -> dict:
    """Held-out metrics of the whole validation split, and whose parameters ('raw' or 'ema') they are of."""
    step_dir = find_step(checkpoint, step)
    workdir = step_dir.parent.parent
    config = build.saved_config(workdir / "config.json")
    config.eval.num_batches = 0
    run = build.make_run(config, workdir)
    item = evaluated_item(step_dir)
    metrics = run.evaluate(load_item(step_dir, run.state_shape.params, item))
    says = "ema" if item == "ema" else "raw"
    return {"step": int(step_dir.name), "params": says, **metrics}


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
        "compressors", False, "Also print the bits per byte of gzip -9 and xz -9 on the same text."
    )
    flags.mark_flag_as_required("checkpoint")


def main(argv):
    del argv
    keep_freed_memory()
    args = flags.FLAGS
    logging.set_verbosity(logging.WARNING)  # of libraries: Orbax writes dozens of lines
    metrics = evaluate(args.checkpoint, args.step)
    print(json.dumps(metrics, indent=2))
    if args.compressors:
        workdir = find_step(args.checkpoint, args.step).parent.parent
        rows = {"this model": metrics["bits_per_byte"]}
        rows |= compressor_bits_per_byte(held_out_documents(workdir))
        print("\nbits per byte on the held-out text (smaller is better)")
        for name, bits in rows.items():
            print(f"  {name:<12} {bits:.3f}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
