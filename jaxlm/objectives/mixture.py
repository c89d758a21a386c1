"""Several objectives in one run: which one a row of a batch is for, and how much each one counts."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxlm.objectives.losses import label_cross_entropy
from jaxlm.objectives.prefix_lm import PrefixLM
from jaxlm.objectives.seq2seq import Seq2Seq
from jaxlm.objectives.tables import TokenTables
from jaxlm.objectives.ul2 import crop, widened
from jaxlm.objectives.window import Window

# Objectives whose rows are tokens and labels of every position, and whose loss is the cross-entropy of these.
FOR_DECODERS = ("causal", "fim", "prefix_lm")
FOR_ENCODER_DECODERS = ("denoising", "seq2seq_prefix_lm", "span_corruption", "ul2")


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Each row of a batch is corrupted by one of the objectives; the loss is the weighted mean over all labels.

        shares    ("0:causal=0.75,fim=0.25", "1000:causal=0.5,fim=0.5")
        step 0    causal fim causal causal | causal causal fim causal        batches of four rows
        …
        step 1000 causal fim causal fim | fim causal fim causal

    Which objective a row is for is arithmetic of its number (a golden-ratio sequence: after any number of rows each
    objective has had its share of them within a few), so batch k stays a pure function of (seed, k). Evaluation takes
    all objectives equally often. An objective that reads less than the longest window reads a random stretch of it.

    The mean loss of objective o over its labels in a (micro-)batch, L_o, is the metric `<name>_loss`. Its labels count
    w_o = c * loss_weights_o * L_o ** adapt times, which is the metric `<name>_weight`; c makes the mean weight of a label
    1, so that the learning rate means what it does without weights. No gradient goes through w_o, and it needs no state.
    A batch without a row of an objective says nothing of it. `loss` is the weighted mean; `nll` and `accuracy` are of
    all labels alike.

    objectives: {name: {"name": …, options…}}, all for decoders or all for encoder-decoders; names are for shares,
      weights and metrics.
    shares: of rows, 'STEP:NAME=SHARE,…' from that step on; () = equal ones.
    loss_weights: 'NAME=WEIGHT,…'; '' = all 1.
    adapt: 0 = fixed weights; above 0 what is hard counts more, below 0 what is easy.
    decoder_start: of all objectives; see `Seq2Seq`.
    tokenizer: gives ids and tables; not kept.
    z_loss, label_smoothing, chunk_tokens: see `cross_entropy`.
    """

    tokenizer: dataclasses.InitVar[Any]
    objectives: Mapping[str, Mapping[str, Any]]
    shares: tuple[str, ...] = ()
    loss_weights: str = ""
    adapt: float = 0.0
    decoder_start: str = "bos"
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk_tokens: int = 0
    names: tuple[str, ...] = dataclasses.field(init=False)
    parts: tuple[Any, ...] = dataclasses.field(init=False, repr=False)
    schedule: dict[int, np.ndarray] = dataclasses.field(init=False, repr=False)
    base_weights: np.ndarray = dataclasses.field(init=False, repr=False)
    tables: TokenTables = dataclasses.field(init=False, repr=False)

    static: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = ("gpt", "encoder_decoder")  # a mixture: of its parts

    def __post_init__(self, tokenizer: Any) -> None:
        names = tuple(sorted(self.objectives))  # a saved config has its keys in this order, too
        problems = find_problems(self.objectives)
        schedule, found = read_schedule(self.shares, names)
        weights, more = read_values(self.loss_weights, names, "loss_weights", 1.0)
        problems += found + more
        if any(step_shares.sum() <= 0 for step_shares in schedule.values()):
            problems.append(f"shares {self.shares}: expected one or more above 0 in each")
        if (weights <= 0).any():
            problems.append(f"loss_weights {self.loss_weights!r}: expected weights above 0")
        if problems:
            raise ValueError("mixture of objectives:\n  " + "\n  ".join(problems))
        parts = tuple(self.make_part(self.objectives[name], tokenizer) for name in names)
        for name, value in {
            "names": names,
            "parts": parts,
            "families": parts[0].families,
            "schedule": schedule,
            "base_weights": weights,
            "tables": TokenTables.of(tokenizer),
        }.items():
            object.__setattr__(self, name, value)

    def make_part(self, options: Mapping[str, Any], tokenizer: Any) -> Any:
        """One of the objectives, by its options."""
        from jaxlm.objectives import OBJECTIVES  # which has this module in it

        options = dict(options)
        make = OBJECTIVES[options.pop("name")]
        start = {"decoder_start": self.decoder_start} if issubclass(make, Seq2Seq) else {}
        return make(tokenizer=tokenizer, **start, **options)

    def window(self, seq_len: int) -> Window:
        """The longest of the objectives' windows."""
        windows = [part.window(seq_len) for part in self.parts]
        return Window(
            max(window.length for window in windows),
            max(window.stride for window in windows),
            sentences=any(window.sentences for window in windows),
        )

    def target_len(self, seq_len: int) -> int:
        """The longest of the objectives' targets; 0 for decoders, which have one row only."""
        return self.num_predictions(seq_len) if isinstance(self.parts[0], Seq2Seq) else 0

    def num_predictions(self, seq_len: int) -> int:
        """Positions of a row that go through the vocabulary matrix."""
        return max(part.num_predictions(seq_len) for part in self.parts)

    def of_draw(self, draw: int, step: int) -> "OfMixture":
        """What makes the row of draw number `draw` (from 0, over all batches), which is in batch `step`."""
        shares = self.schedule[max(start for start in self.schedule if start <= step)]
        place = (draw * GOLDEN % 2**64) / 2**64
        index = int(np.searchsorted(shares.cumsum() / shares.sum(), place, side="right"))
        return OfMixture(self, min(index, int(np.flatnonzero(shares)[-1])))

    def corrupt(self, rng: np.random.Generator, example: dict, seq_len: int) -> dict:
        """The row of an example, for an objective at random."""
        return OfMixture(self, int(rng.integers(len(self.parts)))).corrupt(rng, example, seq_len)

    def loss(self, outputs: Any, batch: dict) -> tuple[tuple, dict]:
        """((total, weight), metrics): loss, nll, accuracy, and of each objective its own loss and its weight."""
        groups_B = batch["objective_ids"][:, 0]
        is_plain = self.adapt == 0 and len(set(self.base_weights)) == 1
        joint, metrics = self.cross_entropy(outputs, batch, batch["weights"], groups_B)
        totals_G, counts_G = metrics.pop("loss_by_group")
        weights_G = jnp.ones(len(self.names))
        if not is_plain:
            weights_G = self.weigh(totals_G, counts_G)
            weights_BT = batch["weights"] * weights_G[groups_B][:, None]
            joint, _ = self.cross_entropy(outputs, batch, weights_BT, groups_B)
        metrics["loss"] = joint
        for name, total, count, weight in zip(
            self.names, totals_G, counts_G, weights_G, strict=True
        ):
            is_there = (count > 0).astype(jnp.float32)
            metrics[f"{name}_loss"] = (total, count)
            metrics[f"{name}_weight"] = (weight * is_there, is_there)
        return joint, metrics

    def weigh(self, totals_G: Any, counts_G: Any) -> Any:
        """What a label of each objective counts, (objectives,); its mean over all labels is 1."""
        is_there_G = counts_G > 0
        means_G = jnp.where(is_there_G, totals_G / jnp.maximum(counts_G, 1e-9), 1.0)
        raw_G = jnp.asarray(self.base_weights, jnp.float32) * means_G**self.adapt
        mean = (raw_G * counts_G).sum() / jnp.maximum(counts_G.sum(), 1e-9)
        return raw_G / jnp.where(mean > 0, mean, 1.0)

    def cross_entropy(self, outputs: Any, batch: dict, weights_BT: Any, groups_B: Any) -> tuple:
        """The cross-entropy with weights (B, T), and its parts by objective. groups_B: int (B,), whose each row is."""
        return label_cross_entropy(
            outputs,
            {**batch, "weights": weights_BT},
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
            chunk_tokens=self.chunk_tokens,
            groups_B=groups_B,
            num_groups=len(self.names),
        )


GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: its multiples fill the circle evenly


@dataclasses.dataclass(frozen=True)
class OfMixture:
    """One objective of a mixture, with rows of the mixture's shapes."""

    mixture: Mixture
    index: int

    def corrupt(self, rng: np.random.Generator, example: dict, seq_len: int) -> dict:
        """The row of an example, with `objective_ids` (1,) that say which objective made it."""
        mixture, part = self.mixture, self.mixture.parts[self.index]
        row = part.corrupt(rng, crop(rng, example, part.window(seq_len).length), seq_len)
        row = widened(row, seq_len, mixture.num_predictions(seq_len), mixture.tables.pad_id)
        if any(isinstance(other, PrefixLM) for other in mixture.parts):
            row.setdefault("is_prefix", np.zeros(len(row["tokens"]), bool))
        return {**row, "objective_ids": np.array([self.index], np.int32)}


def find_problems(objectives: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with the objectives of a mixture, each as found and expected."""
    kinds = {name: options.get("name") for name, options in objectives.items()}
    problems = []
    if len(kinds) < 2:
        problems.append(f"objectives {sorted(kinds)}: expected two or more")
    if not (
        set(kinds.values()) <= set(FOR_DECODERS) or set(kinds.values()) <= set(FOR_ENCODER_DECODERS)
    ):
        problems.append(
            f"objectives {kinds}: expected all of {', '.join(FOR_DECODERS)}, "
            f"or all of {', '.join(FOR_ENCODER_DECODERS)}"
        )
    shared = ("decoder_start", "z_loss", "label_smoothing", "chunk_tokens")
    for name, options in objectives.items():
        if own := sorted(set(options) & set(shared)):
            problems.append(f"objective {name!r}: found {own}; say them of the mixture")
    return problems


def read_schedule(
    shares: tuple[str, ...], names: tuple[str, ...]
) -> tuple[dict[int, np.ndarray], list[str]]:
    """('0:a=1,b=1', '1000:a=1') as {step: shares (names,)}, and what is wrong with it."""
    schedule, problems = {}, []
    for entry in shares:
        step, colon, values = entry.partition(":")
        if not colon or not step.isdigit():
            problems.append(f"shares {entry!r}: expected 'STEP:NAME=SHARE,…'")
            continue
        schedule[int(step)], found = read_values(values, names, "shares", 0.0)
        problems += found
    if shares and 0 not in schedule:
        problems.append(f"shares {shares}: expected the first to be from step 0")
    return schedule or {0: np.ones(len(names))}, problems


def read_values(
    text: str, names: tuple[str, ...], what: str, default: float
) -> tuple[np.ndarray, list[str]]:
    """'a=1,b=0.5' as values (names,), `default` for those it does not name, and what is wrong with it."""
    values, problems = np.full(len(names), default), []
    for item in filter(None, text.split(",")):
        name, _, number = item.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if name not in names or not 0 <= value < float("inf"):
            problems.append(
                f"{what} {item!r}: expected NAME=NUMBER, a name of {', '.join(names)} and a number of 0 or more"
            )
        else:
            values[names.index(name)] = value
    return values, problems
