"""Whether this machine can run: a line for each thing looked at, ok, warn or fail, with the mend.

    python tools/doctor.py
    python tools/doctor.py --workdir=W --config=configs/gpt.py:gpt2
    srun python tools/doctor.py --workdir=/shared/W        all processes of a run: they join, add up, write together

Versions that break together, devices, a compile and a matmul against the chip's peak, the processes' start, a checkpoint
written to the workdir and read back, the room there, what a run has left in it, and every byte of the prepared stores that the
config names. Exit status 1 if anything fails.
"""

import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags
from absl import logging as absl_logging

from jaxlm import exits
from jaxlm.doctor import FAIL, Finding, Patient, examine
from jaxlm.files import as_path
from jaxlm.flags import define_config_flag, define_process_flags, parse, process_options
from jaxlm.parallel import processes
from jaxlm.parallel.launchers import LaunchError, find_place
from jaxlm.private import redact


def say(finding: Finding) -> None:
    found = " ".join(finding.found.split())
    mend = f"\n{'':18}mend: {finding.mend}" if finding.mend else ""
    print(redact(f"{finding.verdict:<6}{finding.check:<12}{found}{mend}"), flush=True)


@exits.with_status
def main(argv):
    del argv
    args = flags.FLAGS
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("jaxlm").setLevel(logging.ERROR)
    options = process_options(args)
    named = {name: options[name] for name in ("coordinator", "num_processes", "process_id")}
    try:
        place = find_place(os.environ, **named)
    except LaunchError as error:
        print(f"{FAIL:<6}{'processes':<12}{error}")
        sys.exit(exits.FAILED)
    failed = False
    with processes.joined(**options):
        workdir = as_path(args.workdir) if args.workdir else None
        for finding in examine(Patient(workdir, args.config, place)):
            if place is None or processes.is_main() or finding.verdict == FAIL:
                say(finding)
            failed |= finding.verdict == FAIL
    sys.exit(exits.FAILED if failed else exits.DONE)


if __name__ == "__main__":
    define_config_flag()
    define_process_flags()
    flags.DEFINE_string("workdir", "", "Folder of a run that is, or is to be; or gs://….")
    app.run(main, flags_parser=parse)
