"""Entities as spans of words and as one tag for each word: BIO, BIOES, BILOU, IOB1 and IO.

words     Ada    Lovelace  of     London   United  Kingdom
BIO       B-PER  I-PER     O      B-LOC    B-LOC   I-LOC
BIOES     B-PER  E-PER     O      S-LOC    B-LOC   E-LOC
BILOU     B-PER  L-PER     O      U-LOC    B-LOC   L-LOC
IOB1      I-PER  I-PER     O      I-LOC    B-LOC   I-LOC     B only where two of a kind touch
IO        I-PER  I-PER     O      I-LOC    I-LOC   I-LOC     two of a kind that touch are one
spans     (0, 2, PER)             (3, 4, LOC)  (4, 6, LOC)
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

# The prefixes of a span's first, inner and last word, and of a span's only word.
SCHEMES = {
    "BIO": ("B", "I", "I", "B"),
    "BIOES": ("B", "I", "E", "S"),
    "BILOU": ("B", "I", "L", "U"),
    "IOB1": ("I", "I", "I", "I"),
    "IO": ("I", "I", "I", "I"),
}
PLAIN = "plain"


class Span(NamedTuple):
    """The words [start, end) are an entity of the kind `name` ('' where tags are bare: B, I, O)."""

    start: int
    end: int
    name: str


def split_tag(tag: str) -> tuple[str, str]:
    """'B-PER' -> ('B', 'PER'), 'B' -> ('B', ''); what is no tag of an entity ('O', 'NOUN') -> ('O', '').

    L and U, BILOU's words for E and S, become these.
    """
    prefix, rest = tag[:1], tag[1:]
    if not prefix or prefix not in "BIESLU" or (rest and not rest.startswith("-")):
        return "O", ""
    return {"L": "E", "U": "S"}.get(prefix, prefix), rest[1:]


def tags_to_spans(tags: Sequence[str]) -> list[Span]:
    """The entities of one sentence, in whatever scheme, read as conlleval reads them (Tjong Kim Sang, CoNLL-2000).

    No sequence is illegal: a word goes on with an entity only where it is I or E, of the same kind as the word
    before, and that one is B or I; else it begins one. So I-PER after O begins an entity.
    """
    found: list[Span] = []
    before = ("O", "")
    for i, tag in enumerate(tags):
        prefix, name = split_tag(tag)
        if prefix in "IE" and before in (("B", name), ("I", name)):
            found[-1] = found[-1]._replace(end=i + 1)
        elif prefix != "O":
            found.append(Span(i, i + 1, name))
        before = prefix, name
    return found


def spans_to_tags(spans: Iterable[Span], num_words: int, scheme: str = "BIO") -> list[str]:
    """The tags of a sentence of `num_words` words; 'O' outside of every span.

    Raises:
      ValueError: an unknown scheme, or spans that are empty, overlap or leave the sentence.
    """
    ordered = sorted(spans)
    _check_spans(ordered, num_words, scheme)
    first, inner, last, only = SCHEMES[scheme]
    tags = ["O"] * num_words
    before = Span(-1, -1, "")
    for span in ordered:
        length = span.end - span.start
        prefixes = [only] if length == 1 else [first, *[inner] * (length - 2), last]
        if scheme == "IOB1" and (span.start, span.name) == (before.end, before.name):
            prefixes[0] = "B"
        tags[span.start : span.end] = [p + "-" * bool(span.name) + span.name for p in prefixes]
        before = span
    return tags


def convert_tags(tags: Sequence[str], scheme: str) -> list[str]:
    """The same entities in another scheme; in its own scheme, a sequence without its illegal transitions.

    convert_tags(['O', 'I-PER'], 'BIO') -> ['O', 'B-PER']. Into IO, entities of a kind that touch become one.
    """
    return spans_to_tags(tags_to_spans(tags), len(tags), scheme)


def detect_scheme(sentences: Iterable[Sequence[str]]) -> str:
    """Of the tags of whole sentences: a key of SCHEMES, or 'plain' where they are no tags of entities (part of speech).

    IOB1 is told from BIO by its sentences: some entity begins with I, and B is only where two of a kind touch.
    Nothing but O is BIO.

    Raises:
      ValueError: tags of entities of a kind (B-PER) beside tags that are none (NOUN): most likely a misprint.
    """
    tags: set[str] = set()
    begins_with_i = needless_b = False
    for sentence in sentences:
        tags.update(sentence)
        before = ("O", "")
        for tag in sentence:
            prefix, name = split_tag(tag)
            touches = before[0] != "O" and before[1] == name
            begins_with_i |= prefix == "I" and not touches
            needless_b |= prefix == "B" and not touches
            before = prefix, name
    if _are_plain(tags):
        return PLAIN
    prefixes = {tag[0] for tag in tags}
    if prefixes & {"L", "U"}:
        return "BILOU"
    if prefixes & {"E", "S"}:
        return "BIOES"
    if "B" not in prefixes:
        return "IO" if "I" in prefixes else "BIO"
    return "IOB1" if begins_with_i and not needless_b else "BIO"


def _are_plain(tags: set[str]) -> bool:
    others = sorted(tag for tag in tags if tag != "O" and split_tag(tag)[0] == "O")
    named = sorted(tag for tag in tags if split_tag(tag)[1])
    if others and named:
        raise ValueError(
            f"tags: found {', '.join(map(repr, named[:3]))}, which are tags of entities, beside"
            f" {', '.join(map(repr, others[:10]))}, which are none; expected O or one of B- I- E- S- L- U- and a"
            " kind for every word, or no such tag at all; correct the words' tags in the file"
        )
    return bool(others)


def _check_spans(ordered: Sequence[Span], num_words: int, scheme: str) -> None:
    problems = []
    if scheme not in SCHEMES:
        problems.append(f"scheme {scheme!r}: use one of {', '.join(SCHEMES)}")
    end = 0
    for span in ordered:
        if not 0 <= span.start < span.end <= num_words:
            problems.append(f"{span}: expected 0 <= start < end <= {num_words} words")
        elif span.start < end:
            problems.append(f"{span}: begins inside the entity before, which ends at {end}")
        end = max(end, span.end)
    if problems:
        raise ValueError("spans to tags:\n  " + "\n  ".join(problems))
