"""Draws what is inside a trained model, into --output:

    python tools/look.py --checkpoint=W --output=P --text='def f(x):'    attention maps: all layers, then each with its tokens
    python tools/look.py --checkpoint=W --output=P --tokens=300          embeddings of the commonest tokens, on a plane
    python tools/look.py --checkpoint=F --output=P --labelled=my.csv     texts on a plane, and from which layer on their labels
                                                                         can be read (linear probes)

Any of these together. W is as everywhere: W@STEP, or hf:FOLDER_OR_HUB_ID. The functions are those of jaxlm.look.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from absl import logging

from jaxlm import api, look
from jaxlm.data.column_names import ROLES
from jaxlm.data.columns import as_role_records, choose_columns
from jaxlm.data.record_base import Problem, format_problems
from jaxlm.data.records import read_records
from jaxlm.exits import with_status
from jaxlm.files import as_path
from jaxlm.host import keep_freed_memory
from jaxlm.training.plots import save_figure

Pictures = Iterator[tuple[str, Any]]  # (a file's name, its Figure)


def attention(lm: api.LanguageModel, text: str, target: str) -> Pictures:
    for found in look.attention_maps(lm, text, target):
        yield f"attention-{found.name}.png", look.draw_attention(found)
        for layer in range(len(found.probs_LNTS)):
            yield f"attention-{found.name}-{layer}.png", look.draw_attention(found, layer)


def tokens(lm: api.LanguageModel, count: int) -> Pictures:
    names, vectors = look.token_vectors(lm, count)
    yield "tokens.png", look.draw_projection(look.project(vectors), names)


def labelled(lm: api.LanguageModel, texts: Sequence[str], labels: Sequence[str]) -> Pictures:
    """Also prints what the probes found."""
    look.check_labels(texts, labels)
    states = look.layer_states(lm, texts)
    yield "texts.png", look.draw_projection(look.project(states[-1]), groups=labels)
    found = look.probe_states(states, labels)
    print(f"layer  accuracy  with shuffled labels    ({found.num_test} held-out texts)")
    for layer, both in enumerate(zip(found.accuracies, found.controls, strict=True)):
        print(f"{layer:>5}  {both[0]:>8.3f}  {both[1]:>20.3f}")
    print(f"the commonest label: {found.majority:.3f}")
    yield "probe.png", look.draw_probe(found)


def read_labelled(
    path: Path, columns: dict[str, str], most: int, seed: int = 0
) -> tuple[list[str], list[str]]:
    """(texts, labels) of at most so many rows of a labelled file, drawn at random.

    Raises:
      ValueError, FileNotFoundError: as `read_records`, and for rows that cannot be used.
    """
    records, problems = read_records(path)
    given = {role: column for role, column in columns.items() if column} | {"text_pair": "none"}
    chosen = choose_columns(records, ROLES["sequence_classification"], given, labelled=True)
    records, more = as_role_records(records, chosen)
    unlabelled = [
        Problem(r.source, r.line, "there is no label") for r in records if "label" not in r.fields
    ]
    if problems := [*problems, *more, *unlabelled]:
        raise ValueError(format_problems(problems))
    order = np.sort(np.random.default_rng(seed).permutation(len(records))[:most])
    fields = [records[i].fields for i in order]
    return [f["text"] for f in fields], [f["label"] for f in fields]


@with_status
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="W, W@STEP, or hf:FOLDER_OR_HUB_ID")
    parser.add_argument("--output", required=True, type=as_path, help="folder of the pictures")
    parser.add_argument("--text", default="", help="whose attention maps are drawn")
    parser.add_argument("--target", default="", help="what an encoder-decoder has written of it")
    parser.add_argument("--tokens", type=int, default=0, help="how many tokens are laid on a plane")
    parser.add_argument("--labelled", type=as_path, help="a labelled file, as for classification")
    parser.add_argument("--text_column", default="", help="of --labelled")
    parser.add_argument("--label_column", default="", help="of --labelled")
    parser.add_argument("--most", type=int, default=1000, help="rows of --labelled that are read")
    args = parser.parse_args(argv)
    if not (args.text or args.tokens or args.labelled):
        parser.error("found: nothing to look at; change: give --text, --tokens or --labelled")
    keep_freed_memory()
    logging.set_verbosity(logging.ERROR)  # of libraries: Orbax warns of a file that nothing needs
    lm = api.load(args.checkpoint)
    pictures = [attention(lm, args.text, args.target)] if args.text else []
    pictures += [tokens(lm, args.tokens)] if args.tokens else []
    if args.labelled:
        columns = {"text": args.text_column, "label": args.label_column}
        pictures.append(labelled(lm, *read_labelled(args.labelled, columns, args.most)))
    args.output.mkdir(parents=True, exist_ok=True)
    for name, figure in (made for kind in pictures for made in kind):
        save_figure(figure, args.output / name)
        print(args.output / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
