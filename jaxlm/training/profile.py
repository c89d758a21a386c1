"""A trace of some training steps by jax's profiler, which xprof (TensorBoard's Profile tab) and Perfetto read.

pip install xprof; xprof --logdir=W/profile
"""

import tempfile
from pathlib import Path
from typing import Any

import jax


def parse_steps(text: str) -> tuple[int, int] | None:
    """'10:15' -> (10, 15), both included and counted from 1 as in metrics.jsonl; '' -> None."""
    if not text:
        return None
    first, colon, last = text.partition(":")
    if colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
        return int(first), int(last)
    raise ValueError(
        f"found: --profile_steps={text}; expected: FIRST:LAST, two step numbers from 1 on, e.g. 10:15"
    )


def annotate_step(step: int) -> Any:
    """A context that names what is launched in it as a step of a trace; costs next to nothing without one."""
    return jax.profiler.StepTraceAnnotation("train", step_num=step)


class Profile:
    """Traces the steps `first` to `last` into `folder`, or what of them a run does."""

    def __init__(self, first: int, last: int, folder: Path):
        self.first, self.last, self.folder = first, last, folder
        self._scratch: tempfile.TemporaryDirectory | None = None

    def is_due(self, step: int) -> bool:
        """Whether the trace begins with this step, which is not launched yet."""
        return self._scratch is None and self.first <= step <= self.last

    def is_over(self, step: int, last_of_run: int) -> bool:
        """Whether the trace ends with this step, which is launched."""
        return self._scratch is not None and step >= min(self.last, last_of_run)

    def start(self) -> None:
        """Begins the trace."""
        # The profiler writes to local disks only.
        self._scratch = tempfile.TemporaryDirectory()
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it slows the steps down and fills the trace
        jax.profiler.start_trace(self._scratch.name, profiler_options=options)

    def stop(self) -> None:
        """Ends the trace and puts it into the folder."""
        scratch, self._scratch = self._scratch, None
        assert scratch is not None
        jax.profiler.stop_trace()
        for source in sorted(Path(scratch.name).rglob("*")):
            if source.is_file():
                target = self.folder / str(source.relative_to(scratch.name))
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
        scratch.cleanup()
