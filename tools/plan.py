"""What a training run would take on machines that you do not have: does it fit, how fast is it, what limits it.

    python tools/plan.py --config=configs/gpt.py:gpt2 --topology=v5e-8 --output=plans/gpt2
    python tools/plan.py --config=configs/gpt.py:llama3_8b --topology=v5p-128 --config.mesh.tensor=2 --output=plans/8b

Compiles the real train step with the real TPU or GPU compiler, on this machine's CPU (a minute or two for a large model), and writes
plan.json, memory.png and time.png. Needs pip install 'jaxlm[plans]'. Topologies: v4-N, v5p-N (N cores, two a chip), v5e-N, v6e-N (N
chips), SxNAME for S slices, h100xN. The exit code is 0 if the program fits, else 1. Times are estimates.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxlm.planning.topologies import ENVIRONMENT

os.environ.update(ENVIRONMENT)  # before jax starts

from absl import app, flags

from jaxlm.flags import define_config_flag
from jaxlm.plan import make_plan, write_plan
from jaxlm.planning.report import format_plan


def main(argv):
    del argv
    args = flags.FLAGS
    try:
        plan = make_plan(args.config, args.topology)
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(str(error))
    write_plan(plan, Path(args.output))
    print(format_plan(plan))
    sys.exit(0 if plan["fits"] else 1)


if __name__ == "__main__":
    define_config_flag()
    flags.DEFINE_string("topology", None, "The machines: v5e-16, v5p-128, 2xv5e-256, h100x8, …")
    flags.DEFINE_string("output", None, "Folder for plan.json and the pictures.")
    flags.mark_flags_as_required(["config", "topology", "output"])
    app.run(main)
