"""Uses a trained model on texts: `python -m jaxlm.generate --checkpoint=W --prompt='def '`.

    --task=generate    a decoder goes on from each prompt, an encoder-decoder answers it; a single one token by token
    --task=fill_mask   an encoder ranks tokens for each [MASK]
    --task=embed       vectors, into --output=F.npz (a `jaxlm.inference.search.Index`) or F.jsonl
    --task=score       log-likelihood, tokens and bits per byte of each text

Without --task an encoder fills masks, and all others generate. The checkpoint is a run's folder W, W@STEP, or
hf:FOLDER_OR_HUB_ID. From Python: `jaxlm.api`, whose defaults hold here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags, logging

from jaxlm import api
from jaxlm.compiled import keep_compiled_programs
from jaxlm.entrypoint import run_program
from jaxlm.exits import with_status
from jaxlm.files import as_path, is_remote, write_whole
from jaxlm.flags import require
from jaxlm.host import keep_freed_memory
from jaxlm.inference.search import Index
from jaxlm.inputs import read_prompts
from jaxlm.parallel.mesh import make_mesh

STREAMED = "max_new_tokens temperature top_k top_p min_p repetition_penalty stop seed".split()
Row = dict[str, Any]


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the command's flags. values: where."""
    own = {"flag_values": values}
    flags.DEFINE_string("checkpoint", None, "W, W@STEP, or hf:FOLDER_OR_HUB_ID.", **own)
    flags.DEFINE_integer("step", None, "Which checkpoint of W; else the newest, or best.", **own)
    flags.DEFINE_enum("task", None, list(TASKS), "Else what the model is for.", **own)
    flags.DEFINE_multi_string("prompt", [], "A text; may be given several times.", **own)
    flags.DEFINE_string("prompts_file", "", "A text a line; or F.jsonl: prompt or text.", **own)
    flags.DEFINE_string("output", "", "F.jsonl, or F.npz for vectors, not the terminal.", **own)
    flags.DEFINE_integer("max_new_tokens", None, "How many tokens to add at most (100).", **own)
    flags.DEFINE_float("temperature", None, "0 takes the likeliest token (0.8).", **own)
    flags.DEFINE_integer(
        "top_k", None, "Sample from that many, 0 = all (50); or show that many (5).", **own
    )
    flags.DEFINE_float("top_p", None, "Sample from the fewest that have this probability.", **own)
    flags.DEFINE_float("min_p", None, "From those this likely beside the likeliest.", **own)
    flags.DEFINE_float("repetition_penalty", None, "Above 1 repeats less.", **own)
    flags.DEFINE_multi_string("stop", None, "Ends a text; may be given several times.", **own)
    flags.DEFINE_integer("seed", None, "Another seed gives another text (0).", **own)
    flags.DEFINE_integer("num_samples", None, "Texts for each prompt (1).", **own)
    flags.DEFINE_integer("num_beams", None, "Above 1: beam search instead of sampling.", **own)
    flags.DEFINE_float("length_penalty", None, "Above 0 prefers longer beams (1).", **own)
    flags.DEFINE_integer("batch_size", None, "Texts that are continued at once (8).", **own)
    flags.DEFINE_integer("tensor", 1, "Devices over which the heads are spread.", **own)
    flags.DEFINE_string("pooling", None, "Of vectors: mean or cls; else the model's own.", **own)
    require(values, checkpoint="--checkpoint=W, W@STEP or hf:FOLDER_OR_HUB_ID")


def run(args: Any) -> None:
    """Does what the flags say: prints, or writes --output.

    Raises:
      BadInput, ValueError, FileNotFoundError, ImportError: with what to change; then nothing was written.
    """
    prompts = [
        *args.prompt,
        *(read_prompts(as_path(args.prompts_file)) if args.prompts_file else []),
    ]
    if not prompts:
        raise api.BadInput("found no texts: give --prompt or --prompts_file")
    if args.output:
        check_output(as_path(args.output), args.task)
    mesh = make_mesh(tensor=args.tensor, devices=jax.devices()[: args.tensor])
    lm = api.load(args.checkpoint, args.step, mesh=mesh)
    name = args.task or ("generate" if lm.family in api.WRITERS else "fill_mask")
    task = TASKS[name]
    task.run(lm, prompts, args.output, options_of(args, name))


def options_of(args: Any, name: str) -> dict[str, Any]:
    """The options that were given, which must be those of the task."""
    every = dict.fromkeys(option for task in TASKS.values() for option in task.options)
    given = {option: getattr(args, option) for option in every if getattr(args, option) is not None}
    if wrong := [f"--{option}" for option in given if option not in TASKS[name].options]:
        raise api.BadInput(f"{', '.join(wrong)}: not for --task={name}")
    return given


# --- files ------------------------------------------------------------------------------------------------------------


def check_output(path: Path, task: str | None) -> None:
    """Raises BadInput if the file cannot be written, before anything is computed."""
    suffixes = (".jsonl", ".npz") if task == "embed" else (".jsonl",)
    if path.suffix not in suffixes:
        raise api.BadInput(
            f"--output={path}: expected a name that ends with {' or '.join(suffixes)}"
        )
    if not is_remote(path) and not path.absolute().parent.is_dir():
        raise api.BadInput(f"--output={path}: there is no folder {path.parent}")


def write_rows(path: str, rows: Iterable[Row]) -> None:
    """Writes rows as JSON lines, the file whole or not at all."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, lambda file: file.writelines(line.encode() for line in lines))


# --- tasks ------------------------------------------------------------------------------------------------------------


def generate(
    lm: api.LanguageModel, prompts: Sequence[str], output: str, options: Mapping[str, Any]
) -> None:
    """Continues, or answers, the prompts: to the terminal as it is written, or to `output`."""
    if len(prompts) == 1 and not output and set(options) <= set(STREAMED):
        begin = prompts[0] if lm.family == "gpt" else ""
        for piece in api.stream(lm, prompts[0], **options):
            print(begin + piece.text, end="", flush=True)
            begin = ""
        print()
        return
    found = api.generate(lm, prompts, **options)
    rows = [
        {
            "prompt": prompt,
            "text": made.text,
            "finish": made.finish,
            "tokens": len(made.tokens),
            "score": made.score,
        }
        for prompt, samples in zip(prompts, found, strict=True)
        for made in samples
    ]
    if output:
        write_rows(output, rows)
    else:
        begin = "prompt" if lm.family == "gpt" else None  # an answer stands alone
        print("\n\n".join(row.get(begin, "") + row["text"] for row in rows))


def fill_mask(
    lm: api.LanguageModel, prompts: Sequence[str], output: str, options: Mapping[str, Any]
) -> None:
    """Fills the masks of the prompts: a table on the terminal, or rows of candidates in `output`."""
    found = api.fill_mask(lm, prompts, **options)
    if output:
        rows = [
            {
                "text": text,
                "masks": [[[c.token, c.probability] for c in candidates] for candidates in masks],
            }
            for text, masks in zip(prompts, found, strict=True)
        ]
        write_rows(output, rows)
        return
    for text, masks in zip(prompts, found, strict=True):
        print(text)
        for number, candidates in enumerate(masks, 1):
            if len(masks) > 1:
                print(f"  mask {number}")
            for candidate in candidates:
                print(f"  {printable(candidate.token):<20} {candidate.probability:.4f}")


def printable(token: str) -> str:
    """The token on one line."""
    return token if token.isprintable() else repr(token)[1:-1]


def embed(
    lm: api.LanguageModel, prompts: Sequence[str], output: str, options: Mapping[str, Any]
) -> None:
    """Writes a vector (D,) of each prompt to `output`, .npz or JSON lines."""
    if not output:
        raise api.BadInput("--task=embed writes vectors: give --output=F.npz or F.jsonl")
    vectors = api.embed(lm, prompts, **options)
    if output.endswith(".npz"):
        Index(vectors, prompts).save(output)
        return
    pairs = zip(prompts, vectors.tolist(), strict=True)
    write_rows(output, ({"text": text, "vector": vector} for text, vector in pairs))


def score(
    lm: api.LanguageModel, prompts: Sequence[str], output: str, options: Mapping[str, Any]
) -> None:
    """Says how likely the prompts are: log-probability in nats, tokens, bits per byte."""
    found = api.score(lm, prompts, **options)
    rows = [
        {
            "text": text,
            "logprob": said.logprob,
            "tokens": said.num_tokens,
            "bits_per_byte": said.bits_per_byte,
        }
        for text, said in zip(prompts, found, strict=True)
    ]
    if output:
        write_rows(output, rows)
        return
    print(f"{'logprob':>12} {'tokens':>7} {'bits/byte':>9}  text")
    for row in rows:
        figures = f"{row['logprob']:12.3f} {row['tokens']:7} {row['bits_per_byte']:9.3f}"
        print(f"{figures}  {row['text']}")


class Task(NamedTuple):
    """What is done with the texts, and its options in `jaxlm.api`."""

    run: Callable[[api.LanguageModel, Sequence[str], str, Mapping[str, Any]], None]
    options: Sequence[str]


TASKS = {
    "generate": Task(
        generate, [*STREAMED, "num_samples", "num_beams", "length_penalty", "batch_size"]
    ),
    "fill_mask": Task(fill_mask, ["top_k"]),
    "embed": Task(embed, ["pooling"]),
    "score": Task(score, []),
}


@with_status
def main(argv: Sequence[str]) -> None:
    """Does what the flags say."""
    del argv
    keep_freed_memory()
    keep_compiled_programs()
    logging.set_verbosity(logging.ERROR)  # of libraries: Orbax warns of a file that nothing needs
    run(flags.FLAGS)


def command() -> None:
    """The console script jaxlm-generate."""
    define_flags()
    run_program(main, __doc__)


if __name__ == "__main__":
    command()
