"""Whether a machine, a workdir and a config are fit for a run: what is wrong with each, and the mend.

    for finding in doctor.examine(doctor.Patient(workdir, config, place)):
        print(finding.verdict, finding.check, finding.found, finding.mend)

A check is a generator that says what it saw: what breaks a run is FAIL, what makes it slow or short-lived WARN. To add one is
a function and a line in CHECKS.
"""

from collections.abc import Callable, Iterator

from jaxlm.doctor import machine, workplace
from jaxlm.doctor.findings import FAIL, OK, SCRATCH, WARN, Finding, NoDevices, Patient, Said

__all__ = ["CHECKS", "FAIL", "OK", "SCRATCH", "WARN", "Finding", "Patient", "examine"]

CHECKS: dict[str, Callable[[Patient], Said]] = {
    "python": machine.check_python,
    "versions": machine.check_versions,
    "cache": machine.check_cache,
    "devices": machine.check_devices,
    "arithmetic": machine.check_arithmetic,
    "speed": machine.check_speed,
    "processes": machine.check_processes,
    "config": workplace.check_config,
    "workdir": workplace.check_workdir,
    "room": workplace.check_room,
    "run": workplace.check_run,
    "data": workplace.check_data,
}


def examine(patient: Patient) -> Iterator[Finding]:
    """The findings of all checks, as they come; without devices there are no others after that. All processes of a run must
    ask."""
    for name, check in CHECKS.items():
        try:
            for said in check(patient):
                yield Finding(name, *said)
        except NoDevices as error:
            yield Finding(name, FAIL, *error.args)
            return
        # What a check has not foreseen: the others still have something to say.
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            yield Finding(name, FAIL, found, "mend what the error says")
