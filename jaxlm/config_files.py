"""Configs as files: recipes (`configs/NAME.py:ARGUMENT`) and the config.json of runs.

A recipe of the current folder goes first, then jaxlm's own of that name. jaxlm's own lie beside the package in a clone, and
inside it, in jaxlm/shipped, where a wheel was installed: a top-level package `configs` there would be everybody's.
"""

import functools
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxlm.files import as_path
from jaxlm.near import meant_path
from jaxlm.sealed import read_object

PACKAGE = Path(__file__).parent
SHIPPED = PACKAGE / "shipped"  # setup.py puts configs/, tools/ and requirements.txt there
HOME = SHIPPED if SHIPPED.is_dir() else PACKAGE.parent
MAX_CONFIG_BYTES = 16 << 20

# Fields that are younger than some runs, and what these did when there was none.
YOUNGER_FIELDS: dict[str, Any] = {
    "data.cache_dir": "",
    "offload_optimizer": False,
    "compiler_flags": "auto",
    "mesh.stage": 1,
    "pipeline_micro_batches": 0,
    "guards": dict(
        max_bad_steps=20,
        spike_factor=0.0,
        spike_window=128,
        skip_batches=0,
        max_rewinds=3,
        self_check_every_steps=0,
        watchdog_seconds=1800,
    ),
}


def read_config(spec: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config of 'configs/gpt.py:tiny' or of a run's 'W/config.json', with dotted overrides, locked."""
    if is_saved(spec):
        config = saved_config(found(spec, as_path(spec)))
    else:
        name, _, argument = spec.partition(":")
        recipe = load_recipe(find_recipe(name))
        config = recipe.get_config(argument) if argument else recipe.get_config()
    config.lock()
    config.update_from_flattened_dict(dict(overrides or {}))
    return config


def is_saved(spec: str) -> bool:
    """Whether it names a run's config.json: the argument of a recipe, 'qa.py:train=train.json', may end like one."""
    return spec.endswith(".json") and ".py:" not in spec


def find_recipe(name: str) -> Path:
    """The file of 'configs/gpt.py': that of the current folder, else jaxlm's own.

    Raises:
      FileNotFoundError: if there is neither.
    """
    return found(name, Path(name), HOME / name)


def found(name: str, *paths: Path) -> Path:
    """The first of them that is a file. name: what was asked for."""
    for path in paths:
        if path.is_file():
            return path
    near = next(filter(None, map(meant_path, paths)), "")
    raise FileNotFoundError(
        f"no config file {name!r}{near}; expected configs/NAME.py:VARIANT or W/config.json"
    )


def whereabouts(spec: str) -> str:
    """The spec with the path of the file that is read for it."""
    name, colon, argument = spec.partition(":")
    return spec if is_saved(spec) else f"{find_recipe(name)}{colon}{argument}"


def load_recipe(path: Path) -> Any:
    """The module of a recipe's file. What it imports as `configs.NAME` is looked for in the current folder, then in jaxlm's."""
    sys.path += [place for place in (os.getcwd(), str(HOME)) if place not in sys.path]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path} is no Python file: expected configs/NAME.py:ARGUMENT")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def saved_config(path: str | Path) -> ConfigDict:
    """A config written by `build.write_config`; JSON's lists become tuples again, and fields that are younger get their values."""

    def tuples(value):
        if isinstance(value, dict):
            return {key: tuples(item) for key, item in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    content = read_object(as_path(path), MAX_CONFIG_BYTES)
    config = ConfigDict(tuples(content), convert_dict=True)
    for name, value in YOUNGER_FIELDS.items():
        *groups, field = name.split(".")
        group = functools.reduce(lambda at, key: at.get(key), groups, config)
        if group is not None and field not in group:
            group[field] = value
    return config


# What ml_collections calls, which loads this file for the flag --config; see `flags.through_reader`.
get_config = read_config
