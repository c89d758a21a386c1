"""The flags that entrypoints share.

Flags are defined by `define_flags()` of the script that is run, not by importing it: two scripts may have
flags of one name, and tests and notebooks import several.
"""

import sys

from ml_collections import config_flags

from jaxlm import saved_config


def define_config_flag():
    """`--config=configs/NAME.py:ARGUMENT` or `--config=W/config.json`, with `--config.field=value`."""
    # ml_collections loads Python files only, so a JSON path becomes the argument of one that reads it.
    sys.argv = [_through_saved_config(arg) for arg in sys.argv]
    return config_flags.DEFINE_config_file(
        "config", None, "configs/NAME.py:ARGUMENT or a run's W/config.json", lock_config=True
    )


def _through_saved_config(arg: str) -> str:
    for prefix in ("--config=", "-config="):
        if arg.startswith(prefix) and arg.endswith(".json"):
            return f"{prefix}{saved_config.__file__}:{arg.removeprefix(prefix)}"
    return arg
