"""Searches texts by meaning, with a model of sentence embeddings:

    python tools/search.py --checkpoint=F --corpus=FILE --query='how to parse a date' [--query=…] [--k=5]
    python tools/search.py --checkpoint=hf:DIR --corpus=FILE --index=I.npz       keeps the vectors, asks for queries
    python tools/search.py --checkpoint=hf:DIR --index=I.npz --query=…           searches them again, without FILE

F is a run of configs/finetune/embedding.py; FILE has a text a line, or is a table or JSON lines, of which --text_column
says the column. Every text is compared (no approximation). Without --query, queries are read from the terminal, a line
each. An index is used only with the model that made it: its first text is embedded again, and must come out the same.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from absl import logging

from jaxlm import api
from jaxlm.data.column_names import ROLES
from jaxlm.data.columns import as_role_records, choose_columns
from jaxlm.data.records import format_problems, read_records
from jaxlm.exits import with_status
from jaxlm.files import as_path
from jaxlm.host import keep_freed_memory
from jaxlm.inference.search import Index
from jaxlm.inputs import read_prompts

LINES = ("", ".txt", ".text", ".md")  # endings of files with a text a line
SAME = 0.999  # cosine of a text's vector and that of the same text from the same model, in another batch


def read_texts(path: Path, column: str = "") -> list[str]:
    """The texts of a corpus, without empty ones.

    Raises:
      ValueError, FileNotFoundError: if there are none, or rows that cannot be read.
    """
    if path.suffix in LINES:
        return read_prompts(path)
    records, problems = read_records(path)
    given = {"text": column, "text_pair": "none", "label": "none"}
    columns = choose_columns(records, ROLES["sequence_classification"], given, labelled=False)
    records, more = as_role_records(records, columns)
    if problems := [*problems, *more]:
        raise ValueError(format_problems(problems))
    texts = [text for record in records if (text := record.fields["text"].strip())]
    if not texts:
        raise ValueError(f"found: {path} has no texts; expected: some")
    return texts


def open_index(lm: api.LanguageModel, corpus: Path | None, column: str, file: Path | None) -> Index:
    """The index of `file`, if there is one; else of the corpus, which is then kept as `file`.

    Raises:
      ValueError: if there is neither, or the index is another model's or another corpus's.
    """
    if file is None or not file.is_file():
        if corpus is None:
            raise ValueError("found: no index; change: give --corpus=FILE")
        texts = read_texts(corpus, column)
        index = Index(api.embed(lm, texts), texts)
        if file is not None:
            index.save(file)
        return index
    index = Index.load(file)
    if corpus is not None and read_texts(corpus, column) != index.ids:
        raise ValueError(f"found: {file} is the index of other texts than {corpus}'s; delete it")
    vector = api.embed(lm, index.ids[:1])
    if vector.shape[1:] != index.vectors.shape[1:] or np.sum(vector * index.vectors[:1]) < SAME:
        raise ValueError(f"found: {file} was made by another model than {lm.checkpoint}; delete it")
    return index


def show(index: Index, lm: api.LanguageModel, queries: Iterable[str], k: int) -> Iterator[str]:
    for query in queries:
        hits = index.search(api.embed(lm, [query]), k)
        yield query
        for cosine, place in zip(hits.cosines[0], hits.places[0], strict=True):
            yield f"  {cosine:.3f}  {' '.join(index.ids[place].split())}"


@with_status
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="W, W@STEP, or hf:FOLDER_OR_HUB_ID")
    parser.add_argument("--corpus", type=as_path, help="texts to search")
    parser.add_argument("--text_column", default="", help="of a table, or a key of JSON lines")
    parser.add_argument("--index", type=as_path, help="I.npz: where the corpus's vectors are kept")
    parser.add_argument("--query", action="append", default=[], help="may be given several times")
    parser.add_argument("--k", type=int, default=5, help="hits that are shown")
    args = parser.parse_args(argv)
    keep_freed_memory()
    logging.set_verbosity(logging.ERROR)  # of libraries: Orbax warns of a file that nothing needs
    try:
        lm = api.load(args.checkpoint)
        index = open_index(lm, args.corpus, args.text_column, args.index)
        print(f"{len(index):,} texts", file=sys.stderr)
        typed = (line.strip() for line in sys.stdin)
        for line in show(index, lm, args.query or filter(None, typed), args.k):
            print(line, flush=True)
    except (ValueError, OSError, ImportError) as error:  # BadInput is a ValueError
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
