"""Writes demo data for fine-tuning, made from the running Python's standard library, as train, dev and test:

    python tools/make_demo.py package --out=DIR      JSON lines: a function's text, and the package it is from
    python tools/make_demo.py tokens --out=DIR       CoNLL: the words of statements, and their kinds
    python tools/make_demo.py docstring --out=DIR    SQuAD: what does this function do?
    python tools/make_demo.py search --out=DIR       JSON lines: functions, and what their docstrings say

Configs read the same data without files, as `demo:package` and so on. jaxlm/data/demos.py says how it is made.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxlm.data.demos import DEMOS, LIMITS, write_demo


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", choices=list(DEMOS))
    parser.add_argument("--out", required=True, type=Path, help="the folder of the files")
    parser.add_argument(
        "--limit", type=int, default=LIMITS["train"], help="training records at most (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split and the choice")
    args = parser.parse_args(argv)
    if args.limit < 1:
        parser.error(f"found: --limit={args.limit}; expected: at least 1")
    for path, count in write_demo(args.demo, args.out, limit=args.limit, seed=args.seed).items():
        print(f"{path}: {count:,} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
