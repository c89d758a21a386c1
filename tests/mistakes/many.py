"""`python -m tests.mistakes.many < CALLS`: calls entrypoints as a shell would, one after another, in one process.

CALLS is a JSON list of {"module": "jaxlm.pretrain", "arguments": [...], "without": package}; what comes out is a list of
{"status", "said"}: the exit status, and all that was printed. `without`: a package that is as if it were not installed.
"""

import contextlib
import importlib
import io
import json
import sys
import traceback

from absl import app, flags


def main():
    app.define_help_flags()  # absl does it once, and reads them in every call
    calls = json.load(sys.stdin)
    print(json.dumps([called(**call) for call in calls]))


def called(module, arguments, without=""):
    """One call, with flags of its own: absl's are one set for a process."""
    defined, said = set(flags.FLAGS), io.StringIO()
    sys.argv = [module, *arguments]
    kept = sys.modules.pop(without, None)
    if without:
        sys.modules[without] = None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = exit_status(importlib.import_module(module).command)
    if without:
        del sys.modules[without]
    if kept:
        sys.modules[without] = kept
    for name in set(flags.FLAGS) - defined:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    return {"status": status, "said": said.getvalue()}


def exit_status(command):
    """As the interpreter ends: a text is printed, and is status 1; so is any other error, with its traceback."""
    try:
        command()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return 1 if isinstance(end.code, str) else end.code or 0
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
