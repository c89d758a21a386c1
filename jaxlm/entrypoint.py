"""How the command lines of pretraining and fine-tuning start, alike: flags, the processes of the run, signals, exit status."""

import logging
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from jaxlm import exits
from jaxlm.compiled import keep_compiled_programs
from jaxlm.config_files import whereabouts
from jaxlm.files import as_path
from jaxlm.flags import (
    config_spec,
    define_config_flag,
    define_process_flags,
    parse,
    process_options,
    require,
)
from jaxlm.host import keep_freed_memory
from jaxlm.parallel import processes
from jaxlm.parallel.accelerators import unseen_accelerators
from jaxlm.private import keep_private
from jaxlm.training import stopping

log = logging.getLogger("jaxlm")


def run_program(main: Callable[[list[str]], Any], doc: str | None) -> None:
    """Runs `main` with the flags that are defined; --help shows doc and jaxlm's flags, whether the program was started by
    python -m or by its console script."""
    args = flags.FLAGS
    for module, defined in args.flags_by_module_dict().items():
        for flag in defined if module.startswith("jaxlm.") else ():
            args.register_key_flag_for_module(sys.argv[0], flag)
    sys.modules["__main__"].__doc__ = doc
    app.run(main, flags_parser=parse)


def launch(train: Callable[..., Any], doc: str | None) -> None:
    """Runs `train` as a program's main function. train: as `pretrain.pretrain`. doc: what --help shows."""
    keep_private()
    define_config_flag()
    define_process_flags()
    flags.DEFINE_string(
        "workdir", None, "Folder of the run, or gs://…: all that it makes lies there."
    )
    flags.DEFINE_bool(
        "allow_config_change", False, "Resume although fields that define the run have changed."
    )
    flags.DEFINE_string(
        "profile_steps",
        "",
        "FIRST:LAST: traces these steps into W/profile, for xprof (TensorBoard).",
    )
    require(
        config="--config=configs/NAME.py:VARIANT or W/config.json",
        workdir="--workdir=FOLDER, of a new run or of one to go on with",
    )

    @exits.with_status
    def main(argv: list[str]) -> None:
        del argv
        args = flags.FLAGS
        absl_logging.set_verbosity(absl_logging.ERROR)  # of libraries: Orbax writes dozens of lines
        keep_freed_memory()
        keep_compiled_programs(args.workdir)
        log.setLevel(logging.INFO)
        log.info("config: %s", whereabouts(config_spec(args)))
        with processes.joined(**process_options(args)), stopping.signals() as stop:
            for found, mend in unseen_accelerators():
                log.warning("%s: %s", found, mend)
            train(
                args.config,
                as_path(args.workdir),
                recipe=config_spec(args),
                allow_config_change=args.allow_config_change,
                profile_steps=args.profile_steps,
                stop=stop,
            )

    run_program(main, doc)
