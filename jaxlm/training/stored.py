"""The folder of one checkpoint: its manifest and its arrays, which are compared with what was saved whenever they are read.

    <step>/manifest/metadata   JSON that says its own sha256, and 'params/layers/w': 'float32[2, 8] 94d1c3a05e88b21f', …
    <step>/params/… ema/…      Orbax's arrays, which nothing protects: most flipped bits in them are read without an error

Schema 1, until November 2026, has no sha256 and no checksums: it is read as it is.
"""

import functools
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxlm import sealed
from jaxlm.exits import Damaged, RunError
from jaxlm.files import write_text
from jaxlm.parallel import processes
from jaxlm.parallel.mesh import path_names
from jaxlm.training.checksums import start_checksums

PyTree = Any
T = TypeVar("T")

SCHEMA_VERSION = 2
YOUNGER_KEYS = {"schema_version", "checksums", sealed.SEAL}  # what schema 1 has none of
MOST_BYTES = 64 << 20  # of a manifest, which has a line for each array
# These say nothing about what is on the disk; all else that a reader raises may be the work of a damaged file.
NO_DAMAGE = (MemoryError, PermissionError, ConnectionError, jax.errors.JaxRuntimeError)


# ---------------------------------------------------------------- manifest


def start_manifest(
    content: Mapping[str, Any], items: Mapping[str, PyTree]
) -> Callable[[], dict[str, Any]]:
    """What gives the manifest of a checkpoint with these items, in any thread; all processes must call.

    It raises Corrupted if devices hold different copies of one array.
    """
    started = start_fingerprints(items)

    def finish() -> dict[str, Any]:
        about = {"schema_version": SCHEMA_VERSION, "checksums": started()}
        return sealed.seal({**content, **about})

    return finish


def read_manifest(step_dir: Path) -> dict[str, Any]:
    """What the run wrote about itself when it saved this checkpoint.

    Raises:
      Damaged: if it is not there, or is not what was written. RunError: if a newer version of jaxlm wrote it.
    """
    path = step_dir / "manifest" / "metadata"
    if not path.is_file():
        raise Damaged(f"{path}: found no file, expected the checkpoint's manifest")
    manifest = sealed.read_object(path, MOST_BYTES)
    if manifest.keys() & YOUNGER_KEYS:
        if not sealed.is_sealed(manifest):
            raise Damaged(f"{path}: its content has another sha256 than it says")
        if manifest["schema_version"] != SCHEMA_VERSION:
            raise RunError(
                f"{path}: found schema_version {manifest['schema_version']}, expected {SCHEMA_VERSION} or less: "
                "read it with the version of jaxlm that wrote it, or a newer one"
            )
    if manifest.get("metrics"):  # Orbax decides by its own copy which step is the best
        kept = sealed.read_object(step_dir / "metrics" / "metrics", MOST_BYTES)
        if kept != manifest["metrics"]:
            raise Damaged(f"{step_dir}: found the metrics {kept}, saved {manifest['metrics']}")
    return manifest


def has_checksums(manifest: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's manifest has what its bytes can be checked against."""
    return "checksums" in manifest


def fingerprints(items: Mapping[str, PyTree]) -> dict[str, str]:
    """'params/w' -> 'float32[8, 4] 94d1c3a05e88b21f' of every array; all processes must call."""
    return start_fingerprints(items)()


def start_fingerprints(items: Mapping[str, PyTree]) -> Callable[[], dict[str, str]]:
    """`fingerprints`, of which the devices' work is only begun; see `start_checksums`."""
    started, described = start_checksums(items), describe(items)

    def finish() -> dict[str, str]:
        sums = started()
        return {path: f"{described[path]} {sums[path]}" for path in described}

    return finish


def describe(tree: PyTree) -> dict[str, str]:
    """Path -> 'float32[8, 4]' of every array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(path_names(p)): f"{np.dtype(x.dtype).name}{list(x.shape)}" for p, x in leaves}


# ---------------------------------------------------------------- arrays


def read(
    step_dir: Path, choose: Callable[[dict[str, PyTree]], dict[str, PyTree]]
) -> dict[str, PyTree]:
    """The arrays of some items, on the devices and as they were saved; all processes must call.

    choose: item -> tree of what is stored (leaves have shape and dtype), to item -> ShapeDtypeStructs with shardings of
      what to read. It refuses what does not fit: Orbax would cast an array in silence.

    Raises:
      Damaged: on every process, whichever found it.
    """
    manifest, stored = together(step_dir, lambda: look(step_dir))
    wanted = choose(stored)
    handler = (
        ocp.StandardCheckpointHandler()
    )  # a checkpointer has a barrier, which not all may reach
    loaded = together(
        step_dir,
        lambda: {
            item: handler.restore(step_dir / item, args=ocp.args.StandardRestore(tree))
            for item, tree in wanted.items()
        },
    )
    if has_checksums(manifest):
        compare(step_dir, fingerprints(loaded), manifest["checksums"], loaded)
    return loaded


def look(step_dir: Path) -> tuple[dict[str, Any], dict[str, PyTree]]:
    """(manifest, item -> tree of its arrays' shapes and dtypes), without reading an array.

    Raises:
      Damaged: if one of them is not what was written.
    """
    manifest = read_manifest(step_dir)
    handler = ocp.StandardCheckpointHandler()
    folders = [path.parent for path in step_dir.glob("*/_METADATA")]
    stored = {folder.name: handler.metadata(folder).tree for folder in folders}
    if "params" not in stored:
        raise Damaged(f"{step_dir}: found {sorted(stored)}, expected params with its _METADATA")
    if has_checksums(manifest):
        saved = {path: says.rpartition(" ")[0] for path, says in manifest["checksums"].items()}
        compare(step_dir, describe(stored), saved, {path.partition("/")[0] for path in saved})
    return manifest, stored


def problems(step_dir: Path, items: Collection[str] = ()) -> list[str]:
    """What is wrong with a checkpoint, or with some of its items, found by numpy, without devices and without a model.

    [] if it is whole; of schema 1 only that it can be read is known. One array at a time is in memory.
    """
    try:
        manifest, stored = together(step_dir, lambda: look(step_dir))
        stored = {item: tree for item, tree in stored.items() if not items or item in items}
        found = _file_fingerprints(step_dir, stored)
        if has_checksums(manifest):
            compare(step_dir, found, manifest["checksums"], stored)
    except Damaged as error:
        return [str(error)]
    return []


def seal_folder(step_dir: Path) -> None:
    """Adds the checksums of what is there to the manifest of a checkpoint that no run has written."""
    manifest, stored = look(step_dir)
    about = {"schema_version": SCHEMA_VERSION, "checksums": _file_fingerprints(step_dir, stored)}
    text = json.dumps(sealed.seal(manifest | about), indent=1)
    write_text(step_dir / "manifest" / "metadata", text)


def _file_fingerprints(step_dir: Path, stored: Mapping[str, PyTree]) -> dict[str, str]:
    found: dict[str, str] = {}
    for item, tree in stored.items():
        for keys, _ in jax.tree_util.tree_leaves_with_path(tree):
            read = functools.partial(_read_numpy, step_dir / item, tree, keys)
            path = "/".join([item, *path_names(keys)])
            found |= fingerprints({path: together(step_dir, read)})
    return found


def _read_numpy(folder: Path, tree: PyTree, keys: Any) -> np.ndarray:
    """The one array of a stored tree at these keys."""
    pick = lambda at, leaf: leaf if at == keys else ocp.PLACEHOLDER
    wanted = jax.tree_util.tree_map_with_path(pick, tree)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy)
    restored = jax.tree.leaves(ocp.PyTreeCheckpointHandler().restore(folder, args=args))
    (array,) = (x for x in restored if x is not ocp.PLACEHOLDER)
    return np.asarray(array)


def compare(
    step_dir: Path, found: Mapping[str, str], saved: Mapping[str, str], items: Collection[str]
) -> None:
    """Raises Damaged, naming the arrays of these items that are not as they were saved."""
    saved = {path: says for path, says in saved.items() if path.partition("/")[0] in items}
    lines = [
        f"  {path}: found {found.get(path, 'nothing')}, saved {saved.get(path, 'nothing')}"
        for path in sorted(found.keys() | saved.keys())
        if found.get(path) != saved.get(path)
    ]
    if lines:
        raise Damaged(f"{step_dir} is not what was saved:\n" + "\n".join(lines))


def together(step_dir: Path, read: Callable[[], T]) -> T:
    """What `read` gives, if no process finds damage; all must call.

    Raises:
      Damaged: on every process, saying what any of them found.
    """
    result, problem = None, ""
    try:
        result = read()
    except Damaged as error:
        problem = str(error)
    except (RunError, *NO_DAMAGE):
        raise
    except Exception as error:  # Orbax, tensorstore and zarr have no common type
        problem = f"{step_dir} cannot be read: {in_short(error)}"
    said = list(dict.fromkeys(filter(None, processes.gather("damage", problem))))
    if said:
        raise Damaged("\n".join(said))
    return result  # type: ignore[return-value]


def in_short(error: Exception, most: int = 500) -> str:
    """What an error says, without the page of settings that tensorstore adds; of a long one both ends: the cause is last."""
    text = str(error).partition(" [tensorstore_spec=")[0]
    if len(text) > most:
        text = f"{text[: most // 2]} … {text[-most // 2 :]}"
    return f"{type(error).__name__}: {text}"
