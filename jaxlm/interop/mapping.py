"""What a family's table is made of, and what reads it in both directions.

A row pairs arrays of ours with one tensor of theirs by a `Transform`, an invertible rearrangement:

    ours  layers/attention/query (L, D, N, H)   theirs  model.layers.{layer}.self_attn.q_proj.weight (N H, D), each layer

Nothing here reads or writes files: `bind` turns a table and the shapes of our parameters into `Piece`s, one for each
tensor of theirs, and a piece converts arrays either way.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from jaxlm.interop.safetensors_io import repair_list
from jaxlm.models.config import EXECUTION, TransformerConfig

Shape = tuple[int, ...]
LAYERS = "layers/"
# Arrays with an axis of experts after that of the layers, if they have so many axes.
EXPERT_PATHS = ("layers/mlp/up", "layers/mlp/gate", "layers/mlp/down")
EXPERT_AXES = 4
# Arrays whose first axis is the vocabulary: theirs may have fewer rows than ours (see `convert`).
VOCAB_PATHS = ("embed/embedding", "unembed", "mlm_head/vocab_bias")


class BadModel(ValueError):
    """A folder or a config that cannot be converted; the message lists everything that is in the way."""


def is_stacked(path: str) -> bool:
    """Whether the first axis of this parameter of ours is that of a stack's layers."""
    return LAYERS in path


# --- transforms -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Transform:
    """An invertible rearrangement between arrays of ours (without the layer axis) and one tensor of theirs.

    merge: ours -> theirs. split: (theirs, shapes of ours) -> ours. shape: shapes of ours -> shape of theirs.
    split(merge(a), shapes of a) == a, bit by bit.
    """

    merge: Callable[[Sequence[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray, Sequence[Shape]], list[np.ndarray]]
    shape: Callable[[Sequence[Shape]], Shape]


def _matrix(shape: Shape, num_in: int) -> Shape:
    return math.prod(shape[:num_in]), math.prod(shape[num_in:])


def linear(num_in: int = 1) -> Transform:
    """A kernel (in…, out…) with `num_in` input axes <-> torch's nn.Linear weight (out, in)."""
    return Transform(
        merge=lambda arrays: arrays[0].reshape(_matrix(arrays[0].shape, num_in)).T,
        split=lambda tensor, shapes: [tensor.T.reshape(shapes[0])],
        shape=lambda shapes: _matrix(shapes[0], num_in)[::-1],
    )


def conv1d(num_in: int = 1) -> Transform:
    """A kernel (in…, out…) <-> GPT-2's Conv1D weight (in, out)."""
    return Transform(
        merge=lambda arrays: arrays[0].reshape(_matrix(arrays[0].shape, num_in)),
        split=lambda tensor, shapes: [tensor.reshape(shapes[0])],
        shape=lambda shapes: _matrix(shapes[0], num_in),
    )


SAME = Transform(
    merge=lambda arrays: arrays[0],
    split=lambda tensor, shapes: [tensor],
    shape=lambda shapes: shapes[0],
)
# A bias (N, H) <-> (N H,).
FLAT = Transform(
    merge=lambda arrays: arrays[0].reshape(-1),
    split=lambda tensor, shapes: [tensor.reshape(shapes[0])],
    shape=lambda shapes: (math.prod(shapes[0]),),
)


def fused(part: Transform, axis: int = 0) -> Transform:
    """Several arrays of ours, each through `part`, lie one after the other on an axis of theirs."""

    def split(tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        ends = np.cumsum([part.shape([s])[axis] for s in shapes])[:-1]
        parts = np.split(tensor, ends, axis=axis)
        return [part.split(t, [s])[0] for t, s in zip(parts, shapes, strict=True)]

    def shape(shapes: Sequence[Shape]) -> Shape:
        parts = [list(part.shape([s])) for s in shapes]
        first = parts[0]
        first[axis] = sum(p[axis] for p in parts)
        return tuple(first)

    merge = lambda arrays: np.concatenate([part.merge([a]) for a in arrays], axis=axis)
    return Transform(merge=merge, split=split, shape=shape)


# --- a family ---------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One tensor of theirs and what it is in ours.

    ours: a path as in 'layers/mlp/up', or several for a fused tensor. Paths that a config does not have (biases that
      are off, an output table that is tied) drop their row; a layer's paths have 'layers/' in them.
    theirs: the name in the model with a head, {layer} standing for the number of the layer, and {expert} for that of
      the expert, which is the axis after the layers in ours.
    group: '' for what every model of the family has, else the head that it belongs to: a source without any tensor of
      a group is taken, and the group is initialised (see `convert`).
    first_layer: theirs lacks the layers before it, whose slices of ours nothing reads.
    beside, without: a path that a model must have, or must not have, for this row to hold: T5's names of a matrix depend
      on whether there is a gate.

    A row of layers without {layer} is a layer that all share.
    """

    ours: str | tuple[str, ...]
    theirs: str
    transform: Transform = SAME
    group: str = ""
    first_layer: int = 0
    beside: str = ""
    without: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of our parameters that this tensor of theirs holds."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


REQUIRED = object()


class Field(NamedTuple):
    """One option of ours and the key of config.json that says it.

    default: what an absent or null key means: a value, or a function of the whole config.json; REQUIRED refuses.
    values: their word -> ours, where the words differ.
    """

    ours: str
    theirs: str
    default: Any = REQUIRED
    values: Mapping[Any, Any] | None = None


class Architecture(NamedTuple):
    """A class of transformers: the groups of rows that it has, and whether its names carry the family's prefix."""

    name: str
    groups: frozenset[str] = frozenset()
    prefixed: bool = True


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything about one `model_type`; see the package's docstring for how to add one.

    model: the key of jaxlm.models.MODELS. fixed: options of ours that this family has no choice of; any option
      that is named nowhere must have TransformerConfig's default. expected: keys of config.json that we can honour
      with these values only (absent is fine).
    extra_from: config.json -> options of ours; extra_to: our config -> keys of config.json; extra_fields: which
      options of ours these two handle; both may raise ValueError.
    architectures: the first whose groups fit is what an export is called.
    prefix: of the base model inside the model with a head; published base models lack it.
    ties: name of theirs -> the name that it repeats when embeddings are tied; repeats: always (an export of untied
      embeddings writes these, too); copies: always, and no export writes them. ignored: patterns of buffers.
    zeros: buffers that hold nothing but zeros; a source with another value in one is refused.
    renames: (pattern, replacement) of old spellings, applied with re.sub.
    """

    model_type: str
    model: str
    rows: tuple[Row, ...]
    fields: tuple[Field, ...]
    fixed: Mapping[str, Any]
    architectures: tuple[Architecture, ...]
    prefix: str
    expected: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    extra_from: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda hf: {}
    extra_to: Callable[[TransformerConfig], dict[str, Any]] = lambda config: {}
    extra_fields: tuple[str, ...] = ()
    ties: Mapping[str, str] = dataclasses.field(default_factory=dict)
    repeats: Mapping[str, str] = dataclasses.field(default_factory=dict)
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()

    def architecture(self, groups: Iterable[str], wanted: str = "") -> Architecture:
        """The class to export as: `wanted` if it holds exactly these groups, else the first that does."""
        fitting = [a for a in self.architectures if a.groups == frozenset(groups)]
        if not fitting:
            known = "; ".join(f"{a.name}: {sorted(a.groups)}" for a in self.architectures)
            raise BadModel(
                f"{self.model_type} has no class with the heads {sorted(groups)}; {known}"
            )
        return next((a for a in fitting if a.name == wanted), fitting[0])


# Options that say how a model is run or trained; what it computes from given parameters does not depend on them.
FREE = frozenset(
    {
        *EXECUTION,
        "init_std",
        "embed_init_std",
        "zero_init_out",
        "dropout_rate",
        "attention_dropout_rate",
        "expert_capacity_factor",
        "router_aux_weight",
        "router_z_weight",
    }
)
MAX_SIZE, MAX_LAYERS = 1 << 27, 4096  # of a number in a config.json that nobody vouches for


def config_from_hf(family: Family, hf: Mapping[str, Any]) -> dict[str, Any]:
    """The options of TransformerConfig that a config.json means.

    Raises:
      BadModel: every key that is missing, absurd, or says what we cannot do.
    """
    problems = [
        f"{key}={hf[key]!r}: only {' or '.join(map(repr, allowed))} can be converted"
        for key, allowed in family.expected.items()
        if key in hf and hf[key] not in allowed
    ]
    options, unsaid = dict(family.fixed), []
    for field in family.fields:
        value = hf.get(field.theirs)
        if value is None:
            if field.default is REQUIRED:
                problems.append(f"{field.theirs}: missing")
                continue
            try:
                value = field.default(hf) if callable(field.default) else field.default
            except (KeyError, TypeError, ZeroDivisionError):
                # mostly because what it is made from is missing or wrong, and listed itself
                unsaid.append(f"{field.theirs}: missing, and no other key says it")
                continue
        if field.values is not None:
            if not isinstance(value, str | bool) or value not in field.values:
                problems.append(
                    f"{field.theirs}={value!r}: known are {', '.join(map(str, field.values))}"
                )
                continue
            value = field.values[value]
        problem = _find_absurd(field, value)
        if problem:
            problems.append(problem)
        else:
            options[field.ours] = type(_defaults().get(field.ours, value))(value)
    try:
        options |= family.extra_from(hf)
    except ValueError as error:
        problems.append(str(error))
    except (KeyError, TypeError, ZeroDivisionError, AttributeError) as error:
        if not problems:  # else it is what is listed already
            problems.append(f"{type(error).__name__}: {error}")
    problems = problems or unsaid
    if not problems:
        try:
            TransformerConfig(**options)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise BadModel(
            repair_list(f"this {family.model_type} config.json cannot be converted", problems)
        )
    return options


def _defaults() -> dict[str, Any]:
    """TransformerConfig's fields with their defaults; sizes have 1."""
    fields = dataclasses.fields(TransformerConfig)
    return {f.name: 1 if f.default is dataclasses.MISSING else f.default for f in fields}


def _find_absurd(field: Field, value: Any) -> str:
    like = _defaults()[field.ours]
    if isinstance(like, bool):
        return (
            "" if isinstance(value, bool) else f"{field.theirs}={value!r}: expected true or false"
        )
    if isinstance(like, int):
        most = MAX_LAYERS if field.ours in ("num_layers", "num_decoder_layers") else MAX_SIZE
        if type(value) is not int or not 0 <= value <= most:
            return f"{field.theirs}={value!r}: expected an integer from 0 to {most}"
    elif isinstance(like, float):
        if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1e12:
            return f"{field.theirs}={value!r}: expected a finite number"
    elif not isinstance(value, str):
        return f"{field.theirs}={value!r}: expected a word"
    return ""


def config_to_hf(family: Family, config: TransformerConfig) -> dict[str, Any]:
    """The keys of config.json for a model of this config.

    Raises:
      BadModel: every option that this family cannot express, by name.
    """
    problems = find_inexpressible(family, config)
    hf: dict[str, Any] = {"model_type": family.model_type}
    for field in family.fields:
        value = getattr(config, field.ours)
        if field.values is not None:
            words = {ours: theirs for theirs, ours in reversed(list(field.values.items()))}
            value = words.get(value, value)
        hf.setdefault(field.theirs, value)
    try:
        hf |= family.extra_to(config)
    except ValueError as error:
        problems.append(str(error))
    if not problems:
        # The written file must mean this very model: what two fields share one key for must agree.
        back = dataclasses.replace(config, **config_from_hf(family, hf))
        problems = [
            f"{name}={getattr(config, name)!r}: {family.model_type} would read {getattr(back, name)!r}"
            for name in _defaults()
            if name not in FREE and meaning(config, name) != meaning(back, name)
        ]
    if problems:
        raise BadModel(repair_list(f"{family.model_type} cannot express", problems))
    return hf


def meaning(config: TransformerConfig, name: str) -> Any:
    """An option's value; (4096,) and (4096, 4096) are the same windows for two layers, 0 decoder layers as many as the
    encoder's."""
    if name == "num_decoder_layers":
        return config.decoder.num_layers
    return getattr(config, "layer_windows" if name == "attention_windows" else name)


def find_inexpressible(family: Family, config: TransformerConfig) -> list[str]:
    """A line for each option of `config` that no field, and no fixed value, of the family stands for."""
    problems = []
    fields = {f.ours: f for f in family.fields}
    for name, default in _defaults().items():
        value = getattr(config, name)
        if name in FREE or name in family.extra_fields:
            continue
        if name in fields:
            known = fields[name].values
            if known is not None and value not in known.values():
                problems.append(
                    f"{name}={value!r}: it knows {', '.join(map(repr, known.values()))}"
                )
        elif value != family.fixed.get(name, default):
            problems.append(f"{name}={value!r}: it always has {family.fixed.get(name, default)!r}")
    return problems


# --- binding a table to a model ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of theirs in one model.

    layer, expert: the indices in our stacked arrays, or None. shapes: of ours, without these axes, with their vocabulary.
    """

    name: str
    paths: tuple[str, ...]
    layer: int | None
    shapes: tuple[Shape, ...]
    transform: Transform
    group: str
    expert: int | None = None

    @property
    def index(self) -> Any:
        """Where it lies in our arrays."""
        if self.layer is None:
            return ...
        return self.layer if self.expert is None else (self.layer, self.expert)

    @property
    def shape(self) -> Shape:
        """Of their tensor."""
        return self.transform.shape(self.shapes)

    def to_theirs(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Our arrays, in the shapes of `shapes`, as their tensor."""
        return self.transform.merge(arrays)

    def to_ours(self, tensor: np.ndarray) -> list[np.ndarray]:
        """Their tensor as our arrays, in the shapes of `shapes`."""
        return self.transform.split(tensor, self.shapes)


def bind(family: Family, shapes: Mapping[str, Shape], vocab_size: int) -> list[Piece]:
    """The pieces of a model whose parameters have these shapes, by path; `vocab_size` is theirs.

    Raises:
      BadModel: parameters of ours that no row names.
    """
    pieces, covered = [], set()
    for row in family.rows:
        present = [path for path in row.paths if path in shapes]
        if not present or (row.beside and row.beside not in shapes) or row.without in shapes:
            continue
        if len(present) != len(row.paths):
            missing = sorted(set(row.paths) - set(present))
            raise BadModel(f"{row.theirs} needs {missing}, which this model does not have")
        covered |= set(row.paths)
        if not is_stacked(row.paths[0]):
            own = tuple(
                (vocab_size, *shapes[p][1:]) if p in VOCAB_PATHS else shapes[p] for p in row.paths
            )
            pieces.append(Piece(row.theirs, row.paths, None, own, row.transform, row.group))
            continue
        (num_layers,) = {shapes[path][0] for path in row.paths}
        experts: Sequence[int | None] = [None]
        if "{expert}" in row.theirs:
            experts = range(shapes[row.paths[0]][1])
        own = tuple(shapes[path][1 + (experts[0] is not None) :] for path in row.paths)
        for layer, expert in itertools.product(range(row.first_layer, num_layers), experts):
            name = row.theirs.replace("{layer}", str(layer)).replace("{expert}", str(expert))
            piece = Piece(name, row.paths, layer, own, row.transform, row.group, expert)
            pieces.append(piece)
    if missing := sorted(set(shapes) - covered):
        raise BadModel(f"{family.model_type} has no place for the parameters {', '.join(missing)}")
    return pieces


def canonical_names(family: Family, names: Iterable[str]) -> dict[str, str]:
    """Their tensors' names in the rows' spelling -> as they are: old spellings and a missing prefix are put right."""

    def renamed(name: str) -> str:
        for pattern, replacement in family.renames:
            name = re.sub(pattern, replacement, name)
        return name

    current = {renamed(name): name for name in names}
    # A base model's own file: every name of the base lacks the prefix, the heads' names are as they are.
    if not any(name.startswith(family.prefix) for name in current):
        stems = [
            row.theirs.removeprefix(family.prefix).split("{layer}")[0]
            for row in family.rows
            if row.theirs.startswith(family.prefix)
        ]
        is_base = lambda name: (
            any(name.startswith(stem) for stem in stems) or is_ignored(family, family.prefix + name)
        )
        current = {(family.prefix + n if is_base(n) else n): old for n, old in current.items()}
    return current


def is_ignored(family: Family, name: str) -> bool:
    """Whether a tensor of this name may be there and is not read."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in family.ignored)


def present_groups(family: Family, names: Iterable[str]) -> set[str]:
    """The groups of which a source has at least one tensor (names in the rows' spelling)."""
    names = set(names)
    return {row.group for row in family.rows if row.theirs in names} - {""}


def repeated_names(family: Family, tied: bool) -> dict[str, str]:
    """Names of theirs that hold what another name holds -> that name."""
    return {**family.repeats, **family.copies, **(family.ties if tied else {})}


def match(
    family: Family,
    pieces: Sequence[Piece],
    found: Mapping[str, Shape],
    *,
    tied: bool,
    left: Set[str] = frozenset(),
) -> tuple[list[Piece], list[str]]:
    """(the pieces whose group the source lacks as a whole, every problem) of a source with these shapes by name.

    left: tensors of heads, which may be there although the model has no place for them; those of a task's head
    ('head/…') that the model has and the source lacks are then no problem either, but absent.
    """
    groups = {p.group for p in pieces if p.name in found}
    absent = [p for p in pieces if p.group and p.group not in groups]
    absent += [p for p in pieces if left and p.name not in found and p.paths[0].startswith("head/")]
    names = {p.name for p in absent}
    wanted = [p for p in pieces if p.name not in names]
    missing = [
        f"{p.name}: missing, expected {list(p.shape)}" for p in wanted if p.name not in found
    ]
    wrong = [
        f"{p.name}: found {list(found[p.name])}, expected {list(p.shape)}"
        for p in wanted
        if p.name in found and tuple(found[p.name]) != p.shape
    ]
    known = {p.name for p in wanted} | set(repeated_names(family, tied)) | set(family.zeros) | left
    extra = [
        f"{name}: {list(shape)} has no place in this model"
        for name, shape in found.items()
        if name not in known and not is_ignored(family, name)
    ]
    return absent, [*missing, *wrong, *extra]
