"""Files of strangers, damaged on purpose: each is read, refused with a typed error, or has its bad rows counted.

Never a crash, a hang, or memory by the gigabyte. A child process reads them (untrusted.py), so what ends the process is seen.
"""

import collections
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterable

import pytest

from tests import tiny
from tests.faults import untrusted

FINE = {"refused", "counted", "loaded"}
MOST_ENDS = 5  # a child that dies is started again, after what it died of, so often


def read_all(
    plan: list[str], folder, timeout: float, seconds: float = 10
) -> tuple[dict[str, str], list[str]]:
    """(how each item of the plan ended, what ended the child): an item at which it dies is in both."""
    outcomes: dict[str, str] = {}
    ends: list[str] = []
    environment = tiny.environment() | {"TOKENIZERS_PARALLELISM": "false"}
    while len(outcomes) < len(plan) and len(ends) < MOST_ENDS:
        rest = plan[len(outcomes) :]
        child = subprocess.run(
            [sys.executable, "-m", "tests.faults.untrusted", str(folder), str(seconds), *rest],
            env=environment,
            cwd=tiny.ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        outcomes |= dict(json.loads(line) for line in child.stdout.splitlines())
        if child.returncode:
            died = plan[len(outcomes)]
            name = signal.Signals(-child.returncode).name if child.returncode < 0 else "an error"
            outcomes[died] = f"ended the process by {name}: {child.stderr[-500:]}"
            ends.append(died)
    return outcomes, ends


def check_inputs(kinds: Iterable[str], seeds: Iterable[int], folder, **limits: float):
    """Counts how the mutated inputs of these kinds ended; none may be a fault."""
    plan = [f"{kind}:{seed}" for seed, kind in itertools.product(seeds, kinds)]
    outcomes, _ = read_all(plan, folder, **limits)
    faults = [f"{item}: {outcome}" for item, outcome in outcomes.items() if outcome not in FINE]
    assert not faults, f"{len(faults)} of {len(plan)} mutated inputs:\n" + "\n".join(faults)
    assert outcomes.keys() == set(plan)
    return collections.Counter(outcomes.values())


def test_six_hundred_mutated_inputs_are_read_refused_or_counted(tmp_path):
    seeds = range(-(-600 // len(untrusted.KINDS)))
    counts = check_inputs(untrusted.KINDS, seeds, tmp_path, timeout=300)
    print(dict(counts))
    assert counts.total() >= 600
    assert min(counts[outcome] for outcome in FINE) > 30


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1_000, 1_210, 30))
def test_six_thousand_mutated_inputs_are_read_refused_or_counted(first, tmp_path):
    check_inputs(untrusted.KINDS, range(first, first + 30), tmp_path, timeout=600)


def test_files_that_ask_for_more_memory_than_there_is_are_refused_or_read_in_parts(tmp_path):
    check_inputs(untrusted.BOMBS, [-1], tmp_path, timeout=200)


# (what is seen of it, seeds of which one at least brings it about)
CAUGHT = {
    "believes lengths": ("MemoryError", range(9, 12)),
    "reads until it finds": ("SIGVTALRM", range(3)),
    "unpacks at once": ("(MemoryError|SIGVTALRM)", [-1]),
    "follows addresses": ("SIGSEGV", range(12)),
}


@pytest.mark.parametrize("kind", untrusted.WRONG)
def test_a_reader_that_believes_what_it_reads_is_caught(kind, tmp_path):
    seen, seeds = CAUGHT[kind]
    with pytest.raises(AssertionError, match=f"{kind}:.*{seen}"):
        check_inputs([kind], seeds, tmp_path, timeout=100, seconds=1)
