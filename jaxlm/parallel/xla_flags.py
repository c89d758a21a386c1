"""Flags of the compilers in the environment. One that a release does not know ends the process that has it.

What jaxlm itself asks of a compiler is in compiler_options.py and needs no flag; these are the user's own.
"""

import os
import re
import subprocess
import sys
from collections.abc import MutableMapping

VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# As jaxlib and libtpu say it; both name all that they do not know.
_UNKNOWN = re.compile(r"Unknown flags? in XLA_FLAGS: (.*)|Unknown command line flag '(\w+)'")


def leave_out_unknown_flags(environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Removes from `environment` the flags that this machine's jaxlib or libtpu does not know; returns their names.

    Call it before jax looks for devices: a child process that does so first is asked, for some seconds, if there are any.
    """
    if not any(environment.get(variable) for variable in VARIABLES):
        return []
    look = [sys.executable, "-c", "import jax; jax.devices()"]
    child = subprocess.run(look, env=dict(environment), capture_output=True, text=True)
    unknown = {
        name
        for flags, flag in _UNKNOWN.findall(child.stderr)
        for name in (flag, *map(name_of, flags.split()))
        if name
    }
    for variable in VARIABLES:
        flags = environment.get(variable, "").split()
        if any(name_of(flag) in unknown for flag in flags):
            environment[variable] = " ".join(flag for flag in flags if name_of(flag) not in unknown)
    return sorted(unknown)


def name_of(flag: str) -> str:
    """--xla_name=value -> xla_name."""
    return flag.lstrip("-").partition("=")[0]
