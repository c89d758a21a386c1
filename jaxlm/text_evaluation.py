"""How well a pretrained model predicts a text: strided perplexity and bits per byte, masked-token metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm import build
from jaxlm.data import sources
from jaxlm.data.pipeline import EvalBatches
from jaxlm.data.store_format import read_manifest
from jaxlm.data.store_writer import write_store
from jaxlm.data.token_store import TokenStore
from jaxlm.inference import scoring
from jaxlm.inputs import bos_of, listed, need_lm
from jaxlm.interop.tokenizer_files import num_model_ids
from jaxlm.language_model import BadInput, LanguageModel
from jaxlm.objectives import MaskedLM
from jaxlm.parallel import mesh as meshes
from jaxlm.training.metrics import MetricSums, one_behind, with_perplexity
from jaxlm.training.step import make_eval_step

LONGEST = (
    2048  # the default window of models with a longer context: attention grows with its square
)
GROUP_TOKENS = 1 << 18  # so many are laid into batches at a time


def evaluate_text(
    lm: LanguageModel,
    data: str,
    *,
    window: int = 0,
    stride: int = 0,
    num_pseudo: int = 0,
    text_field: str = "text",
    config: ConfigDict | None = None,
) -> dict[str, Any]:
    """Metrics of a model on all of `data`.

    data: a text file (one document up to 4 MiB), JSON lines or Parquet with a `text_field`, a folder or a glob of them, or
      a token store: its validation split, or all of it if it has none.
    window: the tokens that are read at a time; 0 = the model's context, but at most LONGEST.
    stride: of a decoder, see `decoder_metrics`; 0 = window. num_pseudo: of an encoder, see `pseudo_metrics`; 0 = none.
    config: of an encoder's run, which says how its evaluation masks; None = BERT's way.

    Raises:
      BadInput: for a model that predicts no tokens, options out of range, and text that cannot be read.
    """
    need_lm(lm, "gpt", "bert")
    window = window or min(lm.max_len, LONGEST)
    stride = stride or window
    check_options(lm, window, stride, num_pseudo)
    corpus = open_corpus(lm, data, text_field)
    if lm.family == "gpt":
        metrics = decoder_metrics(lm, corpus, window, stride)
    else:
        metrics = encoder_metrics(lm, corpus, window, config)
        if num_pseudo:
            metrics |= pseudo_metrics(lm, corpus, window, num_pseudo)
    return {"data": data, "documents": corpus.num_documents, "window": window} | metrics


def check_options(lm: LanguageModel, window: int, stride: int, num_pseudo: int) -> None:
    """Raises BadInput with all that is wrong with the options for this model."""
    problems = []
    if not 3 <= window <= lm.max_len:
        problems.append(f"window={window}: expected 3 to {lm.max_len}, the model's context")
    if lm.family == "gpt" and num_pseudo:
        problems.append("pseudo-perplexity is of encoders, and this is a decoder: leave it out")
    if lm.family == "gpt" and not 1 <= stride <= window:
        problems.append(f"stride={stride}: expected 1 to {window}, the window")
    if lm.family == "bert" and stride != window:
        problems.append("a stride is of decoders, and this is an encoder: leave it out")
    if problems:
        raise BadInput(listed(f"{lm.checkpoint} cannot be evaluated so", problems))


# --- what is read -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents as ids (n,), int32, without bos and eos; and the UTF-8 bytes of their text."""

    documents: Iterable[np.ndarray]
    num_documents: int
    num_bytes: int
    stores: Sequence[TokenStore] = ()  # where they lie already


def open_corpus(lm: LanguageModel, data: str, text_field: str) -> Corpus:
    """What is read of `data`; see `evaluate_text`. Its documents may be read again and again, one at a time.

    Raises:
      BadInput: for a store of another tokenizer, without any text, or with all that cannot be read.
    """
    corpus = open_store(lm, data) if build.is_store(data) else open_files(lm, data, text_field)
    if not corpus.num_bytes:
        raise BadInput(f"{data} has no text in it")
    return corpus


def open_store(lm: LanguageModel, data: str) -> Corpus:
    """The held-out documents of a store, or all. Raises BadInput for a store of another tokenizer."""
    manifest = read_manifest(data)
    if manifest["tokenizer_sha256"] != lm.tokenizer.sha256:
        raise BadInput(
            f"{data} was prepared with another tokenizer than {lm.checkpoint}'s: prepare it again with that one"
        )
    held_out = manifest["splits"].get("validation", {}).get("num_documents")
    stores = [TokenStore(data, s) for s in (["validation"] if held_out else manifest["splits"])]
    documents = Again(
        lambda: (
            store.tokens(*store.document_span(index))[1:-1]
            for store in stores
            for index in range(store.num_documents)
        )
    )
    count = lambda field: sum(getattr(store, field) for store in stores)
    return Corpus(documents, count("num_documents"), count("num_bytes"), stores)


def open_files(lm: LanguageModel, data: str, text_field: str) -> Corpus:
    """The documents of text files. Raises BadInput with all that cannot be read."""
    num_documents, num_bytes, problems = 0, 0, []
    for item in sources.read_documents(data, text_field=text_field):
        if isinstance(item, sources.Document):
            num_documents += 1
            num_bytes += len(item.text.encode())
        elif item.reason not in ("empty_file", "empty_text"):  # of which nothing is predicted
            detail = f": {item.detail}" if item.detail else ""
            problems.append(f"{item.origin}: {item.reason}{detail}")
    if problems:
        raise BadInput(listed(f"{data} cannot be read whole", problems))
    documents = Again(
        lambda: (
            lm.tokenizer.encode(item.text)
            for item in sources.read_documents(data, text_field=text_field)
            if isinstance(item, sources.Document)
        )
    )
    return Corpus(documents, num_documents, num_bytes)


@dataclasses.dataclass(frozen=True)
class Again:
    """An iterable that begins anew each time."""

    make: Any

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.make())


# --- decoders ---------------------------------------------------------------------------------------------------------


def decoder_metrics(
    lm: LanguageModel, corpus: Corpus, window: int, stride: int
) -> dict[str, float]:
    """Mean nats of a token, perplexity, accuracy, and bits per UTF-8 byte of the text, each token counted once.

    A document is [bos] text [eos] if the vocabulary has them, as in a token store: its end is predicted, too. One that is
    longer than `window` is read in windows whose beginnings are `stride` tokens apart, so that each but the first sees
    window - stride tokens before the first that it counts: a smaller stride costs more and knows more.
    """
    start, end = bos_of(lm) or eos_of(lm), eos_of(lm)
    if not start:
        raise BadInput(f"{lm.checkpoint} has no token to begin a text with")
    scorer = scoring.make_scorer(lm.model, lm.num_ids)
    score = functools.partial(scoring.token_logprobs, scorer, lm.params, max_len=window)
    texts = (np.concatenate([start, ids, end]).astype(np.int32) for ids in corpus.documents)
    nll, count, right = 0.0, 0, 0
    for group in in_groups(texts):
        for found in lm.in_mesh(scoring.rolling)(score, group, window=window, stride=stride):
            nll -= found.total
            count += len(found.logprobs)
            right += int(found.likeliest.sum())
    means = {"nll": nll / count, "accuracy": right / count}
    return {
        "stride": stride,
        "tokens": count,
        "bytes": corpus.num_bytes,
        **with_perplexity(means),
        "bits_per_byte": nll / math.log(2) / corpus.num_bytes,
    }


def eos_of(lm: LanguageModel) -> tuple[int, ...]:
    """The id that ends a text; () if the vocabulary came without one."""
    eos = lm.tokenizer.eos_id
    return (eos,) if eos < num_model_ids(lm.tokenizer) else ()


def in_groups(texts: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Lists of texts, int (n,) each, of about GROUP_TOKENS tokens: neither many nor long ones fill the memory."""
    group: list[np.ndarray] = []
    size = 0
    for ids in texts:
        group.append(ids)
        size += len(ids)
        if size >= GROUP_TOKENS:
            yield group
            group, size = [], 0
    if group:
        yield group


# --- encoders ---------------------------------------------------------------------------------------------------------


def encoder_metrics(
    lm: LanguageModel, corpus: Corpus, window: int, config: ConfigDict | None
) -> dict[str, float]:
    """Mean nats and accuracy of masked tokens, in packed rows of `window` tokens; always the same ones are masked."""
    objective = MaskedLM(lm.tokenizer, **masking_options(config))
    step = lm.in_mesh(jax.jit(make_eval_step(lm.model, objective.loss)))
    rows = meshes.batch_devices(lm.mesh)
    rows *= max(1, scoring.BATCH_TOKENS // window // rows)
    seed = config.seed if config else 0
    sums = MetricSums()
    with stored(lm, corpus) as stores:
        batches = (
            batch
            for store in stores
            if store.num_tokens
            for batch in EvalBatches(store, objective, window, rows, seed)
        )
        for metrics in one_behind(
            step(lm.params, meshes.put_batch(lm.mesh, batch)) for batch in batches
        ):
            sums.add(metrics)
    means = with_perplexity(sums.means())
    names = ("nll", "perplexity", "accuracy")
    return {"masked_tokens": round(sums.sums["nll"][1])} | {name: means[name] for name in names}


def masking_options(config: ConfigDict | None) -> dict[str, Any]:
    """What the run's objective says of masking; {}, which is BERT's way, where there is none."""
    names = {field.name for field in dataclasses.fields(MaskedLM) if field.init}
    said = config.objective.to_dict() if config and "objective" in config else {}
    return {name: value for name, value in said.items() if name in names}


@contextlib.contextmanager
def stored(lm: LanguageModel, corpus: Corpus) -> Iterator[Sequence[TokenStore]]:
    """The stores of a corpus, or a temporary one that is made of it."""
    if corpus.stores:
        yield corpus.stores
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        write_store(path, {"validation": corpus.documents}, lm.tokenizer)
        yield [TokenStore(path, "validation")]


def pseudo_metrics(
    lm: LanguageModel, corpus: Corpus, window: int, num_rows: int
) -> dict[str, float]:
    """Pseudo-perplexity (arXiv:1910.14659, section 2.3) of the first `num_rows` pieces of text of up to `window` tokens.

    Every token is masked alone and predicted from all others of its piece: a row of the model for each token.
    """
    t = lm.tokenizer
    pieces = (
        np.concatenate([[t.cls_id], ids[start : start + window - 2], [t.sep_id]]).astype(np.int32)
        for ids in corpus.documents
        for start in range(0, len(ids), window - 2)
    )
    scorer = scoring.make_scorer(lm.model, lm.num_ids)
    scored = [
        lm.in_mesh(scoring.pseudo_logprobs)(
            scorer,
            lm.params,
            [piece],
            mask_id=t.mask_id,
            special_ids=t.special_ids,
            max_len=window,
        )[0]
        for _, piece in zip(range(num_rows), pieces, strict=False)
    ]
    found = scoring.join(scored)
    mean = -found.total / max(1, len(found.logprobs))
    return {
        "pseudo_rows": len(scored),
        "pseudo_tokens": len(found.logprobs),
        "pseudo_nll": mean,
        "pseudo_perplexity": with_perplexity({"nll": mean})["perplexity"],
    }
