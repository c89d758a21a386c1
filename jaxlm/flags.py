"""The flags that entrypoints share.

Flags are defined by `define_flags()` of the script that is run, not by importing it: two scripts may have
flags of one name, and tests and notebooks import several.
"""

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import config_flags

from jaxlm import config_files
from jaxlm.exits import Damaged
from jaxlm.near import meant
from jaxlm.private import refuse_secrets

READER = f"{config_files.__file__}:"
NUMBERS = {int: "a whole number", float: "a finite number"}


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


def parse(arguments: Sequence[str]) -> list[str]:
    """The parser of `app.run`: reads the flags, or ends the program with all that is wrong with --config and its fields, or
    with what absl says."""
    if problems := config_problems(arguments):
        sys.exit("\n".join(problems))
    try:
        rest = flags.FLAGS(arguments)[1:]
    except flags.Error as error:
        sys.exit(f"{error}\n--help shows all flags.")
    if rest:
        sys.exit(
            f"{' '.join(rest)}: no flags; expected --name=value, in quotes where it has spaces or commas in brackets"
        )
    return [arguments[0]]


def require(values: flags.FlagValues = flags.FLAGS, /, **needed: str) -> None:
    """Ends the program where one of these flags is not given. needed: what to write, by the flag's name."""

    def check(given: Mapping[str, Any]) -> bool:
        if missing := [needed[name] for name, value in given.items() if value is None]:
            sys.exit(f"missing: {', '.join(missing)}")  # absl would show the values of all flags
        return True

    flags.register_multi_flags_validator(list(needed), check, flag_values=values)


def config_problems(arguments: Sequence[str]) -> list[str]:
    """What is wrong with --config=SPEC and --config.FIELD=VALUE, a line or more each; absl reads all that is right."""
    given = dict(_pairs(arguments))
    if (spec := given.pop("config", None)) is None:
        return []
    try:
        config = config_files.read_config(spec.removeprefix(READER))
    except (ValueError, FileNotFoundError, Damaged) as error:
        return [str(error)]
    fields = flatten_dict(config.to_dict(), sep=".")
    named = {name.removeprefix("config."): value for name, value in given.items()}
    found = [field_problem(fields, name, value) for name, value in named.items()]
    return [problem for problem in found if problem]


def field_problem(fields: Mapping[str, Any], name: str, value: str) -> str:
    """What is wrong with --config.NAME=VALUE, '' if nothing is. fields: the config's, 'group.field': value."""
    flag = f"--config.{name}"
    if name not in fields:
        inside = [field for field in fields if field.startswith(f"{name}.")]
        if inside:
            return f"{flag} is a group; expected one of its fields, such as --config.{inside[0]}"
        own = name.rpartition(".")[2]
        same = [field for field in fields if field.rpartition(".")[2] == own]
        near = f"; did you mean {' or '.join(same)}?" if same else meant(name, fields)
        return f"{flag}: the config has no such field{near}"
    kind = type(fields[name])
    if kind not in NUMBERS:
        return ""
    try:
        is_number = math.isfinite(int(value, 0) if kind is int else float(value))
    except ValueError:
        is_number = False
    return "" if is_number else f"{flag}={value}: expected {NUMBERS[kind]}, as {fields[name]} is"


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of --config and --config.FIELD, written as --name=value or --name value."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        if re.fullmatch(r"--?config(\.[\w.]+)?", flag):
            yield flag.lstrip("-"), value if equals else following


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
