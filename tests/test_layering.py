"""Who may import whom (jaxlm's layers), read from the source with ast: nothing is imported."""

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENTRYPOINTS = {"pretrain", "finetune", "evaluate", "generate", "harness"}
PEERS = {"models", "objectives", "tasks", "data"}
# A module's layer -> the layers of jaxlm that it may import (itself always).
THIRD_PARTY_ONLY: frozenset[str] = frozenset()
ALLOWED: dict[str, frozenset[str]] = {
    "compat": THIRD_PARTY_ONLY,
    "spread": THIRD_PARTY_ONLY,
    "mixing": THIRD_PARTY_ONLY,
    "files": frozenset({"exits", "private"}),
    "near": frozenset({"files", "exits", "private"}),
    "exits": frozenset({"private"}),
    "private": THIRD_PARTY_ONLY,
    "sealed": frozenset({"exits"}),
    "parallel": frozenset({"compat", "exits", "private"}),
    "tokenizers": frozenset({"compat", "files", "exits", "sealed"}),
    "models.layers": frozenset({"compat", "spread", "mixing"}),
    "models": frozenset({"compat", "spread", "models.layers"}),
    "objectives": frozenset({"compat", "spread"}),
    "tasks": frozenset({"compat"}),
    "data": frozenset({"compat", "files", "near", "exits", "sealed", "tokenizers"}),
    "training": frozenset(
        {
            "compat",
            "files",
            "near",
            "exits",
            "sealed",
            "mixing",
            "parallel",
            "models",
            "models.layers",
            "inference",
        }
    ),
    "inference": frozenset({"compat", "files", "exits", "parallel", "models", "models.layers"}),
    "interop": frozenset(
        {"compat", "files", "exits", "parallel", "models", "models.layers", "tokenizers"}
    ),
    "config_checks": frozenset({"compat", "parallel"}),
    "program": frozenset(
        {
            "compat",
            "config_checks",
            "parallel",
            "models",
            "models.layers",
            "objectives",
            "training",
        }
    ),
}
# Packages whose code runs in data workers: they must not even import jax.
NUMPY_ONLY = {"data"}


def module_name(path: Path, root: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """'jaxlm.models.layers' -> 'models.layers'; 'jaxlm.data.packing' -> 'data'."""
    parts = module.split(".")[1:]
    if not parts:
        return ""
    dotted = ".".join(parts[:2])
    if dotted == "models.layers":
        return dotted
    return parts[0]


def imported_modules(path: Path, module: str) -> Iterable[tuple[int, str]]:
    """(line, absolute module name) of every import in a file, nested ones included."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([base] if base else [])])
            for alias in node.names:  # `from jaxlm import data` imports jaxlm.data
                yield node.lineno, f"{base}.{alias.name}"


def _target_layer(name: str) -> str:
    return layer_of(name) if name.startswith("jaxlm.") else ""


def violations(root: Path) -> list[str]:
    """Every import under root/jaxlm and root/configs that points up or sideways."""
    found = []
    for path in sorted([*root.glob("jaxlm/**/*.py"), *root.glob("configs/**/*.py")]):
        module = module_name(path, root)
        where = str(path.relative_to(root))
        source = layer_of(module) if module.startswith("jaxlm") else "configs"
        for line, name in imported_modules(path, module):
            target = _target_layer(name)
            top = name.split(".")[0]
            if target in ENTRYPOINTS:
                found.append(f"{where}:{line}: {name}: entrypoints are imported by nobody")
            if source == "configs":
                if top == "jaxlm":
                    found.append(f"{where}:{line}: {name}: configs know only configs.common")
                continue
            if top == "configs":
                found.append(f"{where}:{line}: {name}: nothing in jaxlm imports configs")
            if source in NUMPY_ONLY and top in ("jax", "flax", "optax", "orbax"):
                found.append(f"{where}:{line}: {name}: {source} is numpy only")
            allowed = ALLOWED.get(source)
            if allowed is None or not target or target == source:
                continue
            package = target.split(".")[0]
            own = source.split(".")[0] == package and source != "models.layers"
            if not own and target not in allowed and package not in allowed:
                found.append(f"{where}:{line}: {name}: {source} may not import {target}")
    return found


def check_layers(root: Path) -> None:
    found = violations(root)
    assert not found, "imports that point up or sideways:\n" + "\n".join(found)


def test_imports_point_down_only():
    check_layers(ROOT)


WRONG = {
    "data uses a model": ("jaxlm/data/a.py", "from jaxlm.models import gpt"),
    "data uses jax": ("jaxlm/data/a.py", "def f():\n    import jax.numpy as jnp"),
    "a model uses data": ("jaxlm/models/a.py", "from ..data import packing"),
    "an objective uses a model": ("jaxlm/objectives/a.py", "import jaxlm.models.gpt"),
    "layers use attention": ("jaxlm/models/layers.py", "from jaxlm.models import attention"),
    "training uses data": ("jaxlm/training/a.py", "from jaxlm import data"),
    "inference uses objectives": ("jaxlm/inference/a.py", "from jaxlm.objectives import mlm"),
    "tokenizers use data": ("jaxlm/tokenizers.py", "import jaxlm.data.sources"),
    "a program uses data": ("jaxlm/program.py", "from jaxlm.data import pipeline"),
    "build uses an entrypoint": ("jaxlm/build.py", "from jaxlm.pretrain import main"),
    "build uses configs": ("jaxlm/build.py", "from configs import gpt"),
    "configs use jaxlm": ("configs/a.py", "import jaxlm"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_import_is_found(case, tmp_path):
    name, source = WRONG[case]
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(source + "\n")
    with pytest.raises(AssertionError):
        check_layers(tmp_path)


def test_allowed_imports_are_not_reported(tmp_path):
    for name, source in {
        "jaxlm/build.py": "import jaxlm.data.pipeline\nfrom jaxlm import models, objectives",
        "jaxlm/models/gpt.py": "from jaxlm.models import layers\nfrom . import attention",
        "jaxlm/data/prepare.py": "import numpy\nfrom jaxlm import tokenizers",
        "configs/gpt.py": "from configs import common",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source + "\n")
    check_layers(tmp_path)
