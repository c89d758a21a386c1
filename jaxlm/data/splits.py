"""A development set out of the training records, where there is no file of one.

    rows    a b a c d e b …            equal texts are one group and stay on one side
    labels  x y x x y z y …            each label gives its share; a label with one group stays in training

Groups are taken in the order of a hash of the seed and the text. So the split depends on nothing but the
records and the seed: no machine, no library, and no order of the rows.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from jaxlm.data.record_base import Record, log

# One sentence with several predicates or entity pairs is one text.
_NOT_COMPARED = frozenset(
    {"label", "labels", "answers", "id", "negative", "predicate", "spans", "target", "output"}
    | {"rejected"}
)


def split_train_dev(
    records: Sequence[Record],
    fraction: float,
    seed: int = 0,
    labels: Sequence[str | None] | None = None,
) -> tuple[list[Record], list[Record]]:
    """(train, dev), both in the order of the records and neither empty; dev has about `fraction` of them.

    records: with fields named by role. labels: each record's class, or None where it has none. Without
    labels (numbers, several labels, words, answers) the split does not regard them.

    A label with two different texts or more is shared out in proportion and always has one in training.
    Records with the same inputs (case and white space apart), or for question answering with the same
    context, are never on both sides.

    Raises ValueError for a fraction outside (0, 1) and where all inputs are equal.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"found: dev_fraction={fraction}; expected: above 0 and below 1")
    labels = [""] * len(records) if labels is None else [label or "" for label in labels]
    groups: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        groups[group_key(record)].append(index)
    if len(groups) < 2:
        raise ValueError(
            f"found: {len(records)} records with {len(groups)} different inputs, which cannot be split"
            "\nexpected: two or more\nchange: --config.data.dev=FILE"
        )
    shuffled = sorted(groups, key=lambda key: _digest(seed, key))
    classes: dict[str, list[str]] = defaultdict(list)
    for key in shuffled:
        classes[labels[groups[key][0]]].append(key)
    if len(classes) == len(groups):  # no label comes twice
        classes = {"": shuffled}
    sizes = {key: len(members) for key, members in groups.items()}
    dev_keys = _chosen_groups(classes, sizes, fraction)
    dev = {index for key in dev_keys for index in groups[key]}
    log.info(
        "%s: no development file, so %d of %d rows are held out (%s, seed %d, equal texts together)",
        records[0].source,
        len(dev),
        len(records),
        "in proportion to their labels" if len(classes) > 1 else "at random",
        seed,
    )
    sides: tuple[list[Record], list[Record]] = ([], [])
    for index, record in enumerate(records):
        sides[index in dev].append(record)
    return sides


def group_key(record: Record) -> str:
    """What records must not share across the two sides."""
    fields = record.fields
    inputs = {k: v for k, v in fields.items() if k not in _NOT_COMPARED}
    return json.dumps(_folded(fields.get("context") or inputs), sort_keys=True)


def _folded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _folded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_folded(part) for part in value]
    return " ".join(value.casefold().split()) if isinstance(value, str) else value


def _digest(seed: int, key: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()


def _chosen_groups(
    classes: dict[str, list[str]], sizes: dict[str, int], fraction: float
) -> set[str]:
    """The groups of dev: of each class the first that fit in its share, and never all."""
    shares = {label: fraction * sum(sizes[k] for k in keys) for label, keys in classes.items()}
    shared = [label for label, keys in classes.items() if len(keys) > 1]
    chosen: set[str] = set()
    for label, room in _whole_numbers(shares, shared).items():
        for key in classes[label][: len(classes[label]) - 1]:
            if sizes[key] <= room:
                chosen.add(key)
                room -= sizes[key]
    if not chosen:  # too few records: the smallest group of a class that has others
        spare = [key for label in shared for key in classes[label]]
        chosen.add(min(spare, key=sizes.__getitem__))
    return chosen


def _whole_numbers(shares: dict[str, float], may_grow: Iterable[str]) -> dict[str, int]:
    """Rounded so that the sum is the rounded sum: down, but the largest remainders of `may_grow` up."""
    rounded = {label: int(share) for label, share in shares.items()}
    left = round(sum(shares.values())) - sum(rounded.values())
    for label in sorted(may_grow, key=lambda label: (rounded[label] - shares[label], label))[:left]:
        rounded[label] += 1
    return rounded
