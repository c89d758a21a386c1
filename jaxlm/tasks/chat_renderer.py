"""Chat templates are rendered here: by another process, in Jinja's sandbox, with little time and memory.

A template is somebody else's program. In the sandbox it reaches nothing but its own variables; it could still loop for
ever, or write a text that no memory holds, and sandboxes have had holes. So it runs in a process that has nothing of our
environment, can write no file, and is ended when it takes more than it may. One process serves all templates, line by line:

    {"source": "{% for … %}", "variables": {"messages": […], …}}  ──▶  {"text": "…"}  or  {"refused": "takes …"}
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

SECONDS = 5  # of processor time, for one text
MEMORY = 512 << 20  # bytes more than the process has at its start
MAX_CHARS = 16 << 20  # of one text
# Noncharacters of Unicode, which no text has: before and after what {% generation %} marks.
BEGIN, END = "\ufdd0", "\ufdd1"
_ENDS = {-signal.SIGPROF: f"takes more than {SECONDS} s"}


class Renderer:
    """The process that renders, started when it is first needed, and again after a template has ended it."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._owner, self._lock = 0, threading.Lock()

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The template's text; `variables` are JSON values.

        Raises:
          ValueError: with what the template does that it may not, or cannot do.
        """
        request = json.dumps({"source": source, "variables": variables}).encode() + b"\n"
        with self._lock:
            answer = self._ask(request)
        if "refused" in answer:
            raise ValueError(f"the chat template {answer['refused']}")
        return answer["text"]

    def _ask(self, request: bytes) -> dict[str, str]:
        if self._process is None or self._owner != os.getpid():  # a fork must not share the pipes
            self._process, self._owner = _start(), os.getpid()
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if line:
            return json.loads(line)
        status, self._process = self._process.wait(), None
        return {"refused": _ENDS.get(status, f"ends the process that renders it (status {status})")}


def _start() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # Ctrl-C is for us; it ends when its input does
    )


renderer = Renderer()


# ---------------------------------------------------------------- the other process


def main() -> None:
    """Renders the templates of standard input, a JSON line each, under limits of memory and time."""
    import jinja2.sandbox  # noqa: F401  before files are limited

    if sys.platform == "linux":  # elsewhere nobody says how much it is
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for line in sys.stdin.buffer:
        signal.setitimer(
            signal.ITIMER_PROF, SECONDS
        )  # its signal, which nobody handles, ends the process
        answer = json.dumps(_answer(**json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _answer(source: str, variables: dict[str, Any]) -> dict[str, str]:
    import jinja2

    try:
        text = _compiled(source).render(**variables)
    except jinja2.TemplateSyntaxError as error:
        return {"refused": f"is not Jinja: {error}"}
    except MemoryError:
        return {"refused": f"takes more than {MEMORY >> 20} MiB"}
    except Exception as error:  # of a program that we do not know
        return {"refused": f"refuses it: {error}"[:2000]}
    if len(text) > MAX_CHARS:
        return {"refused": f"writes {len(text):,} characters; expected {MAX_CHARS:,} at most"}
    return {"text": text}


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """The template with what transformers gives to its own: loop controls, `raise_exception`, `strftime_now`, a `tojson`
    that does not escape, and {% generation %}."""
    import datetime

    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller):
            return BEGIN + caller() + END

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return environment.from_string(source)


if __name__ == "__main__":
    main()
