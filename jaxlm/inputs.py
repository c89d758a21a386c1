"""From texts to the ids that a model takes. What it cannot take is refused, all of it in one BadInput."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxlm.inference.fill_mask import MASK, encode_masked, split_at_masks
from jaxlm.inference.source_text import encode_source, split_at_hidden
from jaxlm.interop.tokenizer_files import num_model_ids
from jaxlm.language_model import BadInput, LanguageModel

SHOWN = 8  # problems that a message lists
FAMILIES = {
    "gpt": "a decoder: it continues texts, and fills no masks",
    "bert": "an encoder: it fills masks, and does not continue texts",
    "encoder_decoder": "an encoder-decoder: it answers texts with texts, and does nothing else",
    "xlnet": "an encoder that predicts in any order: it is there to be fine-tuned",
}


def read_prompts(path: Path) -> list[str]:
    """The texts of a file: one a line, or of F.jsonl one an object. Empty lines are left out."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: no UTF-8 at byte {error.start}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise BadInput(f"{path} is empty: expected a text a line")
    if path.suffix == ".jsonl":
        return [read_object(f"{path}:{number}", line) for number, line in numbered]
    return [line.removesuffix("\r") for _, line in numbered]


def read_object(where: str, line: str) -> str:
    """The text of a JSON line. where: what an error calls it."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    text = found.get("prompt", found.get("text")) if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise BadInput(f"{where}: expected an object with a text as 'prompt' or 'text'")
    return text


def need_lm(lm: LanguageModel, *families: str) -> None:
    """Raises BadInput unless the model predicts tokens as one of these families does."""
    if lm.no_lm:
        raise BadInput(f"{lm.checkpoint} {lm.no_lm}")
    if lm.family not in families:
        raise BadInput(f"{lm.checkpoint} is {FAMILIES.get(lm.family, lm.family)}")


def check_counts(**counts: int) -> None:
    """Raises BadInput unless all are whole numbers from 1 on."""
    if wrong := [f"{name}={n}" for name, n in counts.items() if not isinstance(n, int) or n < 1]:
        raise BadInput(f"{', '.join(wrong)}: expected 1 or more")


def bos_of(lm: LanguageModel) -> tuple[int, ...]:
    """The id that may begin any text; () if the model was never trained with one."""
    has_bos = lm.prefix or lm.tokenizer.bos_id < num_model_ids(lm.tokenizer)
    return (lm.tokenizer.bos_id,) if has_bos else ()


def encode_prompts(lm: LanguageModel, prompts: Sequence[str]) -> list[np.ndarray]:
    """What a decoder continues, int32 (n,): its prefix and the text. An empty prompt is bos alone, where there is one.

    Of an encoder-decoder what its encoder reads: prefix, text and eos.
    """
    if lm.family == "encoder_decoder":
        parts = lambda text: split_at_hidden(lm.tokenizer, text)[0]
        encode_one = lambda text: encode_source(lm.tokenizer, text, lm.prefix)
        least = len(lm.prefix) + 2
        return encode_each(lm, prompts, encode_one, least=least, most=lm.max_len, parts=parts)

    def encode(text: str) -> np.ndarray:
        start = lm.prefix if text else bos_of(lm)
        return np.concatenate([start, lm.tokenizer.encode(text)]).astype(np.int32)

    return encode_each(lm, prompts, encode, most=lm.max_len)


def encode_texts(
    lm: LanguageModel, texts: Sequence[str], *, most: int = 0, allow_any: bool = False
) -> list[np.ndarray]:
    """The ids of each text, (n,) int32 without specials. allow_any: it may be empty or have unknown characters."""
    least = 0 if allow_any else 1
    encode = lm.tokenizer.encode
    return encode_each(lm, texts, encode, least=least, most=most, allow_unknown=allow_any)


def encode_masked_texts(lm: LanguageModel, texts: Sequence[str]) -> list[np.ndarray]:
    """[CLS] text [SEP] with masks, which an encoder fills; int32 (n,) each."""
    parts = lambda text: split_at_masks(lm.tokenizer, text)
    problem = lambda text: "" if len(parts(text)) > 1 else f"no {MASK} in it"
    encode = lambda text: encode_masked(lm.tokenizer, text)
    return encode_each(lm, texts, encode, most=lm.max_len, parts=parts, problem=problem)


def encode_each(
    lm: LanguageModel,
    texts: Sequence[str],
    encode: Callable[[str], np.ndarray],
    *,
    most: int,
    least: int = 1,
    allow_unknown: bool = False,
    parts: Callable[[str], Sequence[str]] = lambda text: [text],
    problem: Callable[[str], str] = lambda text: "",
) -> list[np.ndarray]:
    """`encode` of each text.

    least, most: how many ids it may have; most 0 is any number. parts: of a text, what the tokenizer sees of it.
    problem: what else is wrong with a text, '' if nothing is.

    Raises:
      BadInput: with every text that cannot be used.
    """
    if isinstance(texts, str):
        raise BadInput(f"found one text, {texts[:40]!r}; expected a list of them")
    rows, problems = [], []
    for number, text in enumerate(texts, 1):
        row, wrong = np.empty(0, np.int32), problem(text)
        try:
            row = encode(text)
        except UnicodeEncodeError as error:
            wrong = f"character {error.start + 1} is half of one (a lone surrogate)"
        if not wrong and not allow_unknown:
            wrong = unknown_in(lm, parts(text))
        if not wrong and len(row) < least:
            wrong = "empty"
        if not wrong and 0 < most < len(row):
            wrong = f"{len(row)} tokens, and the context holds {most}"
        if wrong:
            problems.append(f"text {number} ({abbreviated(text)}): {wrong}")
        rows.append(row)
    if problems:
        raise BadInput(listed(f"{len(problems)} of {len(texts)} texts cannot be used", problems))
    return rows


def unknown_in(lm: LanguageModel, parts: Sequence[str]) -> str:
    """Says what the tokenizer does not know, '' if it knows all."""
    unknown = dict.fromkeys(u for part in parts for u in lm.tokenizer.find_unknown(part))
    if not unknown:
        return ""
    shown = ", ".join(repr(u) for u in list(unknown)[:SHOWN])
    return f"the tokenizer has no token for {shown}" + (" …" if len(unknown) > SHOWN else "")


def abbreviated(text: str, shown: int = 40) -> str:
    """A text as an error shows it: quoted, its first characters."""
    return repr(text) if len(text) <= shown else f"{text[:shown]!r} …"


def listed(title: str, problems: Sequence[str]) -> str:
    """One problem as it is; several under a title, a line each."""
    if len(problems) == 1:
        return problems[0]
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n  ".join([f"{title}:", *problems[:SHOWN], *more])
