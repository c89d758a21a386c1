"""Looks into a checkpoint: `python tools/inspect_checkpoint.py PATH`, or compares two: `--diff A B`.

PATH is a run's workdir, its checkpoints folder, or one step in it; of several steps the newest is read.
Neither the config nor the code of the model is needed. PATH may also be a Hugging Face folder; --diff of one
with a checkpoint compares the parameters tensor by tensor through the family's mapping table (jaxlm/interop).

Without --diff it prints every array's name, shape, dtype and norm, and the number of parameters; the
exit code is 1 if an array has a NaN or an infinity. With --diff the exit code is 0 only if every array
of the two newest steps is bitwise equal; what is not is listed.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxlm.exits import with_status
from jaxlm.files import as_path
from jaxlm.interop.arrays import read_theirs
from jaxlm.interop.convert import find_untrue_zeros
from jaxlm.interop.finetuned import open_parameters
from jaxlm.interop.mapping import bind, is_ignored, repeated_names
from jaxlm.interop.safetensors_io import DTYPES
from jaxlm.interop.source import open_source, read_tensors
from jaxlm.training.checkpoints import evaluated_item, find_step

ITEM_ORDER = ("params", "ema", "frozen", "opt_state")


class Arrays:
    """The arrays of one checkpoint step by name, read one at a time."""

    def __init__(self, path: str | Path, step: int | None = None):
        self.step_dir = find_step(path, step)
        self._trees: dict[str, Any] = {}
        self.about: dict[str, jax.ShapeDtypeStruct] = {}
        for item in self.items():
            tree = ocp.PyTreeCheckpointer().metadata(self.step_dir / item).item_metadata.tree
            self._trees[item] = tree
            for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
                # Scalars that are no arrays, and empty nodes, have no shape.
                if getattr(leaf, "shape", None) is not None:
                    name = "/".join([item, *(_key(k) for k in keys)])
                    self.about[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    def items(self) -> list[str]:
        """The folders of this step that hold arrays."""
        found = [p.parent.name for p in self.step_dir.glob("*/_METADATA")]
        return sorted(found, key=lambda n: (ITEM_ORDER.index(n) if n in ITEM_ORDER else 9, n))

    def read(self, name: str) -> np.ndarray:
        """One array in host memory, whatever devices it was saved from."""
        item, _, inner = name.partition("/")

        def pick(keys, leaf):
            wanted = "/".join(map(_key, keys)) == inner
            return leaf if wanted else ocp.PLACEHOLDER

        tree = jax.tree_util.tree_map_with_path(pick, self._trees[item])
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        restored = ocp.PyTreeCheckpointer().restore(
            self.step_dir / item,
            args=ocp.args.PyTreeRestore(
                item=tree, restore_args=jax.tree.map(lambda _: as_numpy, tree)
            ),
        )
        (array,) = (x for x in jax.tree.leaves(restored) if x is not ocp.PLACEHOLDER)
        return np.asarray(array)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        return ((name, self.read(name)) for name in self.about)


class Folder:
    """The tensors of a Hugging Face folder, with the attributes of `Arrays`; integer buffers are left out."""

    def __init__(self, path: str | Path):
        self.step_dir = Path(path)
        tensors, self.format = read_tensors(self.step_dir, allow_pickle=False)
        self._tensors = {f"tensors/{n}": t for n, t in sorted(tensors.items()) if _is_float(t)}
        self.about = {n: jax.ShapeDtypeStruct(t.shape, t.dtype) for n, t in self._tensors.items()}

    def items(self) -> list[str]:
        return ["tensors"]

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name].read()


def _is_float(tensor: Any) -> bool:
    return getattr(tensor, "kind", "F32") in DTYPES


def is_folder(path: str | Path) -> bool:
    """Whether `path` is a Hugging Face folder: it has a config.json and no checkpoints."""
    path = as_path(path)
    return (path / "config.json").is_file() and not (path / "checkpoints").is_dir()


def open_path(path: str | Path, step: int | None = None) -> Arrays | Folder:
    return Folder(path) if is_folder(path) else Arrays(path, step)


def _key(key: Any) -> str:
    """A path entry's bare name, for dict keys, attributes and indices alike."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def sum_of_squares(array: np.ndarray) -> float:
    """In float64, a part at a time, so that a large array is not copied whole."""
    flat, part = array.reshape(-1), 1 << 22
    pieces = (flat[i : i + part].astype(np.float64) for i in range(0, flat.size, part))
    return float(sum(np.dot(x, x) for x in pieces))


def non_finite(array: np.ndarray) -> int:
    """How many elements are NaN or infinite."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return 0
    return int(array.size - np.count_nonzero(np.isfinite(array)))


def describe(path: str | Path, step: int | None = None) -> tuple[str, int]:
    """(the printed report, how many elements are NaN or infinite)."""
    arrays = open_path(path, step)
    lines, bad_total = [f"checkpoint {arrays.step_dir}"], 0
    for item in arrays.items():
        names = [name for name in arrays.about if name.startswith(item + "/")]
        width = max(map(len, names), default=0)
        size = sum(arrays.about[n].size for n in names)
        nbytes = sum(arrays.about[n].size * arrays.about[n].dtype.itemsize for n in names)
        what = "elements" if item == "opt_state" else "parameters"
        lines += ["", f"{item}: {size:,} {what} in {len(names)} arrays, {nbytes / 1e6:,.1f} MB"]
        squares = 0.0
        for name in names:
            array = arrays.read(name)
            square, bad = sum_of_squares(array), non_finite(array)
            squares, bad_total = squares + square, bad_total + bad
            warning = f"   {bad:,} NaN or infinite" if bad else ""
            lines.append(
                f"  {name:<{width}}  {array.dtype!s:<9} {array.shape!s:<20} "
                f"norm {square**0.5:.6g}{warning}"
            )
        lines.append(f"  norm of {item}: {squares**0.5:.6g}")
    lines += ["", f"NaN or infinite elements: {bad_total:,}"]
    return "\n".join(lines), bad_total


def differences(a: str | Path, b: str | Path) -> list[str]:
    """A line for each array of the newest steps of `a` and `b` that is not bitwise equal.

    Bits decide: a NaN equals the same NaN, 0.0 does not equal -0.0.
    """
    if is_folder(a) != is_folder(b):
        return differences_by_table(a, b) if is_folder(a) else differences_by_table(b, a)
    first, second = open_path(a), open_path(b)
    lines = []
    for name in sorted(first.about.keys() | second.about.keys()):
        if name not in first.about or name not in second.about:
            lines.append(f"{name}: only in {a if name in first.about else b}")
            continue
        old, new = first.about[name], second.about[name]
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            lines.append(f"{name}: {old.dtype}{old.shape} in {a}, {new.dtype}{new.shape} in {b}")
            continue
        lines += _differing(name, first.read(name), second.read(name))
    return lines


def differences_by_table(folder: str | Path, checkpoint: str | Path) -> list[str]:
    """A line for each tensor of a Hugging Face folder that the newest step's parameters do not give, and for each
    that they give and the folder lacks."""
    source = open_source(folder)
    step_dir = find_step(checkpoint)
    arrays = open_parameters(step_dir, evaluated_item(step_dir))
    shapes = {path: array.shape for path, array in arrays.items()}
    pieces = {p.name: p for p in bind(source.family, shapes, source.config["vocab_size"])}
    known = {*repeated_names(source.family, tied="unembed" not in shapes), *source.family.zeros}
    lines = find_untrue_zeros(source)
    for name in sorted(source.tensors.keys() | pieces.keys()):
        if name not in pieces:
            if name not in known and not is_ignored(source.family, name):
                lines.append(f"{name}: only in {folder}")
        elif name not in source.tensors:
            lines.append(f"{name}: only in {checkpoint}")
        else:
            x, y = source.tensors[name].read(), read_theirs(pieces[name], arrays)
            if (x.shape, x.dtype) != (y.shape, y.dtype):
                lines.append(
                    f"{name}: {x.dtype}{x.shape} in {folder}, {y.dtype}{y.shape} in {checkpoint}"
                )
            else:
                lines += _differing(name, x, y)
    return lines


def _differing(name: str, x: np.ndarray, y: np.ndarray) -> list[str]:
    unequal = _unequal(x, y)
    if not unequal.any():
        return []
    gap = np.abs(x.astype(np.float64) - y.astype(np.float64)).max()
    return [
        f"{name}: {np.count_nonzero(unequal):,} of {x.size:,} elements differ, by {gap:.3g} at most"
    ]


def _unequal(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(size,) bool: where the bytes of two arrays of one shape and dtype differ."""
    as_bytes = [
        np.ascontiguousarray(a).reshape(-1).view(np.uint8).reshape(a.size, a.itemsize)
        for a in (x, y)
    ]
    return (as_bytes[0] != as_bytes[1]).any(axis=1)


@with_status
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", metavar="PATH")
    parser.add_argument("--diff", action="store_true", help="compare two checkpoints bit by bit")
    parser.add_argument(
        "--step", type=int, help="which step, instead of the newest (not with --diff)"
    )
    args = parser.parse_args(argv)
    if len(args.paths) != 1 + args.diff or (args.diff and args.step is not None):
        parser.error("expected: one PATH, or --diff A B without --step")
    jax.config.update("jax_platforms", "cpu")  # leave the accelerator to the run that has it
    logging.set_verbosity(logging.ERROR)
    try:
        if not args.diff:
            text, bad = describe(args.paths[0], args.step)
            print(text)
            return int(bad > 0)
        lines = differences(*args.paths)
    except (FileNotFoundError, ValueError) as error:
        print(f"found: {error}", file=sys.stderr)
        return 2
    for line in lines:
        print(line)
    steps = " and ".join(str(path if is_folder(path) else find_step(path)) for path in args.paths)
    print(f"{len(lines)} arrays differ" if lines else "bitwise equal", f"({steps})")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
