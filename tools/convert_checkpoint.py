"""Hugging Face folders in and out:

    python tools/convert_checkpoint.py from_hf --source DIR_OR_HUB_ID[@REVISION] --target W
    python tools/convert_checkpoint.py to_hf --source WORKDIR_OR_CHECKPOINT --target DIR

W is a workdir that generate, evaluate and pretrain take (`--checkpoint=W`, `--config=W/config.json`); DIR is what
`transformers` and vLLM load. Every conversion writes parity.json; one that does not hold is undone, and the exit code
is 1. Neither torch nor transformers is needed; with both installed the certificate compares with them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxlm import config_files
from jaxlm.exits import Damaged, with_status
from jaxlm.interop import FAMILIES, convert, export, parity
from jaxlm.training.checkpoints import evaluated_item, find_step
from jaxlm.training.stored import problems, seal_folder
from jaxlm.tuning import find_best_step

ROOT = Path(__file__).resolve().parents[1]
# What a Hugging Face folder does not say (optimizer, data, …) comes from these.
TEMPLATES = {
    "gpt": "configs/gpt.py:gpt2",
    "bert": "configs/bert.py:base",
    "xlnet": "configs/xlnet.py:base",
    "encoder_decoder": "configs/t5.py:base",
    "bart": "configs/bart.py:base",
}
# A run that goes on from a published model on one machine, and an evaluation on little text.
CONTINUED = {
    "batch_size": 16,
    "seq_len": 512,
    "num_train_steps": 1000,
    "log_every_steps": 10,
    "eval_every_steps": 200,
    "checkpoint_every_steps": 200,
    "checkpoint.keep_every": 0,
    "eval.batch_size": 16,
    "eval.num_batches": 16,
    "data.validation_fraction": 0.05,
    "optimizer.learning_rate": 5e-5,
    "optimizer.schedule.warmup_steps": 100,
}


def define_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("direction", choices=("from_hf", "to_hf"))
    parser.add_argument("--source", required=True, help="a folder, a hub id, or a checkpoint")
    parser.add_argument("--target", required=True, help="a folder that does not exist yet")
    parser.add_argument(
        "--dtype", default="", choices=("", "float32", "bfloat16", "float16"), help="of the output"
    )
    parser.add_argument("--certificate", default="auto", choices=parity.AGAINST)
    into, out = parser.add_argument_group("from_hf"), parser.add_argument_group("to_hf")
    into.add_argument(
        "--allow_pickle", action="store_true", help="read pytorch_model.bin, which can run code"
    )
    out.add_argument(
        "--step", type=int, help="which checkpoint; default the newest, or a fine-tuned run's best"
    )
    out.add_argument("--item", default="", help="'params' or 'ema'; default ema where there is one")
    out.add_argument("--family", default="", choices=("", *FAMILIES), help="default: what fits")
    out.add_argument("--max_shard_gb", type=float, default=5.0, help="size of a file at most")
    return parser


def from_hf(args: argparse.Namespace) -> dict:
    templates = {
        name: config_files.read_config(str(ROOT / spec), CONTINUED)
        for name, spec in TEMPLATES.items()
    }
    certificate = convert.from_hf(
        args.source,
        args.target,
        templates,
        allow_pickle=args.allow_pickle,
        dtype=args.dtype,
        against=args.certificate,
    )
    seal_folder(find_step(args.target))
    return certificate


def to_hf(args: argparse.Namespace) -> dict:
    step_dir = find_best_step(args.source, args.step)
    item = args.item or evaluated_item(step_dir)
    if lines := problems(step_dir, (item, "frozen")):
        raise Damaged("\n".join(lines))
    return export.to_hf(
        step_dir,
        args.target,
        config_files.saved_config(step_dir.parent.parent / "config.json"),
        item=item,
        family=args.family,
        dtype=args.dtype,
        max_shard_bytes=int(args.max_shard_gb * 2**30),
        against=args.certificate,
    )


@with_status
def main(argv: Sequence[str] | None = None) -> int:
    args = define_arguments().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # leave the accelerator to the run that has it
    logging.set_verbosity(logging.ERROR)
    try:
        certificate = (from_hf if args.direction == "from_hf" else to_hf)(args)
    except parity.Failed as error:
        print(f"{error}\n{args.target} was not written", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"{error}\n{args.target} was not written", file=sys.stderr)
        return 2
    print(f"{args.target}: {parity.summary(certificate)}")
    for group in certificate["converted"].get("initialised", ()):
        print(f"the source has no {group} head: it was initialised")
    return 0


if __name__ == "__main__":
    sys.exit(main())
