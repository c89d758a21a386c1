"""Which parameters train: a tree of parameters in two parts, and together again.

The trained part is what gradients, clipping, optimizer and moving average see; the frozen one lies in `state.frozen`.
"""

from collections.abc import Callable
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from jaxlm.models.lora import is_adapter

PyTree = Any
HEAD, EMBED, LAYERS = "head/", "embed/", "layers/"

# What a run trains -> whether the parameter of a path is part of that.
TRAINED: dict[str, Callable[[str], bool]] = {
    "all": lambda path: True,
    "head": lambda path: path.startswith(HEAD),
    "lora": lambda path: path.startswith(HEAD) or is_adapter(path),
}


def trainable(train: str, *, frozen_layers: int = 0, num_layers: int = 0) -> Callable[[str], bool]:
    """A function of a parameter's path ('layers/mlp/up'): whether it trains.

    train: 'all'; 'head' of the task; 'lora', the adapters and the head.
    frozen_layers: over 0 the embeddings do not train, and with all of `num_layers` frozen no layer does. Fewer of the
      stacked layers cannot be told apart by path: `optimizers.scale_layers` keeps those.

    Raises:
      ValueError: if `train` is none of these.
    """
    if train not in TRAINED:
        raise ValueError(f"train={train!r}: use one of {', '.join(TRAINED)}")
    kept = (EMBED,) if frozen_layers else ()
    kept += (LAYERS,) if frozen_layers and frozen_layers == num_layers else ()
    return lambda path: TRAINED[train](path) and not path.startswith(kept)


def split(tree: PyTree, is_trained: Callable[[str], bool]) -> tuple[PyTree, PyTree]:
    """(trained, frozen): nested dicts with the leaves of `tree` whose path is trained, and with the others.

    Leaves are whatever is no dict, so trees of parameters, of their boxes and of their axes split alike. Branches
    without a leaf are left out.
    """
    flat = flatten_dict(tree, sep="/")
    trained = {path: leaf for path, leaf in flat.items() if is_trained(path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")


def join(trained: PyTree, frozen: PyTree | None) -> PyTree:
    """The tree that `split` took apart; without a frozen part `trained` itself.

    Raises:
      ValueError: naming the paths that both have.
    """
    if not frozen:
        return trained
    first, second = flatten_dict(trained, sep="/"), flatten_dict(frozen, sep="/")
    if both := sorted(first.keys() & second.keys()):
        raise ValueError(f"trained and frozen at once: {', '.join(both)}")
    return unflatten_dict(first | second, sep="/")
