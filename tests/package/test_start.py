"""How long it takes until something is on the screen. Seconds are of the processor, so that other work does not count."""

import os
import subprocess
import sys

import pytest

IMPORT_SECONDS, HELP_SECONDS = 2.0, 3.0  # on a machine where `import jax` takes …
JAX_SECONDS = 0.75
# Large, and needed by some runs only: imported where they are used.
LATER = {
    *("matplotlib", "sklearn", "scipy.stats", "seqeval", "tensorboardX", "wandb", "pyarrow"),
    *("pandas", "datasets", "torch", "transformers", "lm_eval", "sacrebleu", "rouge_score"),
}


def start(*arguments: str) -> tuple[float, subprocess.CompletedProcess]:
    """The processor's seconds, user and system, of a child; and what it said."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True
    )
    after = os.times()
    names = ("children_user", "children_system")
    return sum(getattr(after, name) - getattr(before, name) for name in names), done


def starts_within(most: float, *arguments: str) -> subprocess.CompletedProcess:
    """What the child said, which took no more in one of three tries, or as many times more as `import jax` took beside it:
    cores share caches and pipelines."""
    for _ in range(3):
        jax_seconds = min(start("-c", "import jax")[0] for _ in range(2))
        slowness = max(1.0, jax_seconds / JAX_SECONDS)
        seconds, done = start(*arguments)
        if seconds < most * slowness:
            return done
    raise AssertionError(
        f"{' '.join(arguments)}: {seconds:.2f} s, expected less than {most * slowness:.2f}"
    )


def imported(stderr: str) -> set[str]:
    """The modules of `-X importtime`: 'import time:  self |  cumulative |  name'."""
    return {line.rpartition("|")[2].strip() for line in stderr.splitlines() if "|" in line}


@pytest.mark.parametrize(
    "entrypoint, flag",
    {
        "pretrain": "--workdir",
        "finetune": "--workdir",
        "evaluate": "--data",
        "generate": "--prompt",
    }.items(),
)
def test_help_is_there_within_three_seconds_and_shows_the_flags(entrypoint, flag):
    done = starts_within(HELP_SECONDS, "-m", f"jaxlm.{entrypoint}", "--help")
    assert f"python -m jaxlm.{entrypoint}" in done.stdout and f"  {flag}:" in done.stdout
    assert "jax" in imported(done.stderr)
    assert not imported(done.stderr) & LATER


def test_jaxlm_is_imported_within_two_seconds():
    done = starts_within(IMPORT_SECONDS, "-c", "import jaxlm.api")
    assert done.returncode == 0, done.stderr
    assert "jaxlm.api" in imported(done.stderr)


def test_a_python_that_is_too_old_is_told_so_in_one_line():
    code = "import sys; sys.version_info = (3, 10, 12, 'final', 0); import jaxlm"
    _, done = start("-c", code)
    (line,) = [line for line in done.stderr.splitlines() if "import time:" not in line]
    assert line == "found Python 3.10; expected 3.11, 3.12 or 3.13; change: start one of these"
    assert done.returncode == 1
