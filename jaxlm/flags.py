"""The flags that entrypoints share.

Flags are defined by `define_flags()` of the script that is run, not by importing it: two scripts may have
flags of one name, and tests and notebooks import several.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from jaxlm import config_files
from jaxlm.private import refuse_secrets

READER = f"{config_files.__file__}:"


def define_config_flag():
    """`--config=configs/NAME.py:ARGUMENT` or `--config=W/config.json`, with `--config.field=value`."""
    named = {_name_of(place, arg): arg for place, arg in enumerate(sys.argv[1:], 1)}
    try:
        refuse_secrets(named)
    except ValueError as error:
        sys.exit(str(error))
    sys.argv = [*through_reader(sys.argv)]
    return config_flags.DEFINE_config_file(
        "config", None, "configs/NAME.py:ARGUMENT or a run's W/config.json", lock_config=True
    )


def _name_of(place: int, arg: str) -> str:
    """What an argument is called where its value must not be shown."""
    name, equals, _ = arg.partition("=")
    return name if equals and name.startswith("-") else f"argument {place}"


def through_reader(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments, with --config=SPEC as --config=config_files.py:SPEC.

    ml_collections loads the Python file that a path names, and nothing else; config_files.py has a `get_config` that
    finds recipes of jaxlm's own, and reads JSON.
    """
    before = ""
    for argument in arguments:
        flag, equals, spec = argument.partition("=")
        if equals and re.fullmatch("--?config", flag):
            yield f"{flag}={READER}{spec}"
        else:
            yield f"{READER}{argument}" if re.fullmatch("--?config", before) else argument
        before = argument


def config_spec(args: flags.FlagValues) -> str:
    """What --config names, as it was written."""
    return config_flags.get_config_filename(args["config"]).removeprefix(READER)


def define_process_flags() -> None:
    """Who starts several processes, where no launcher's environment says it; see `jaxlm.parallel.launchers`."""
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, in a run of several processes.")
    flags.DEFINE_integer(
        "num_processes", None, "How many processes there are; 1: this one is alone."
    )
    flags.DEFINE_integer("process_id", None, "Which of them this is: 0 to num_processes - 1.")
    flags.DEFINE_integer("initialization_timeout", 300, "Seconds to wait for the other processes.")
    flags.DEFINE_integer(
        "heartbeat_timeout", 30, "Seconds after which a silent process is taken for dead."
    )


def process_options(args: flags.FlagValues) -> dict[str, Any]:
    """These flags as `parallel.processes.joined` takes them."""
    names = ("coordinator", "num_processes", "process_id")
    names += ("initialization_timeout", "heartbeat_timeout")
    return {name: getattr(args, name) for name in names}
