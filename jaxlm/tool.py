"""Runs one of the tools that came with jaxlm: `jaxlm-tool plot_run W` is `python tools/plot_run.py W` of a clone."""

import ast
import os
import sys
from pathlib import Path

from jaxlm.config_files import HOME
from jaxlm.near import meant


def tools() -> dict[str, Path]:
    """The file of each tool, by its name."""
    return {path.stem: path for path in sorted((HOME / "tools").glob("*.py"))}


def command() -> None:
    """Replaces this process by the tool that the first argument names."""
    """The console script jaxlm-tool."""
    known = tools()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in known:
        os.execv(sys.executable, [sys.executable, str(known[name]), *sys.argv[2:]])
    if name not in ("--help", "-h"):
        sys.exit(f"no tool {name!r}{meant(name, known)}; expected one of: {', '.join(known)}")
    print("jaxlm-tool NAME …, of which `jaxlm-tool NAME --help` says more:\n")
    for name, path in known.items():
        print(f"  {name:<20} {summary(path)}")


def summary(path: Path) -> str:
    """The first line of a tool's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


if __name__ == "__main__":
    command()
