"""Writes one self-contained HTML page of a run: `python tools/report.py W [--output=FILE.html]`, default W/report.html.

What it is, its curves, samples over time, evaluation, in what its config differs from its recipe, where the time went, what went
wrong, and where it ran. The run may still be running, or have broken down.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxlm.exits import with_status
from jaxlm.page import write_page


@with_status
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", metavar="W", help="workdir of a run")
    parser.add_argument("--output", help="the page; default W/report.html")
    args = parser.parse_args(argv)
    print(write_page(args.workdir, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
