"""Draws a run's loss.png, throughput.png and optimization.png (learning rate and gradient norm): `python tools/plot_run.py W`
or, of several runs in one picture each, `python tools/plot_run.py W1 W2 --output=DIR`; with `--metric=accuracy --by=init` one
held-out metric, the runs of each value of a field together, their mean and standard deviation."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxlm.files import as_path
from jaxlm.training.plots import plot_metric, plot_runs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdirs", nargs="+", metavar="W", help="workdir of a run")
    parser.add_argument(
        "--output", help="folder for the pictures; default W/plots of the first run"
    )
    parser.add_argument("--metric", help="draw this held-out metric instead")
    parser.add_argument("--by", default="", help="a config field whose values group the runs")
    args = parser.parse_args(argv)
    missing = [w for w in args.workdirs if not (as_path(w) / "metrics.jsonl").is_file()]
    if missing:
        print(
            f"found: no metrics.jsonl in {', '.join(missing)}\n"
            "expected: the workdirs of runs that have logged at least one step\n"
            "change: name the --workdir of a run",
            file=sys.stderr,
        )
        return 2
    output = args.output or as_path(args.workdirs[0]) / "plots"
    if args.metric:
        try:
            written = [plot_metric(args.workdirs, args.metric, output, args.by)]
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    else:
        written = plot_runs(args.workdirs, output)
    for path in written:
        print(path)
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
