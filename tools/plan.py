"""What a training run would take on machines that you do not have: does it fit, how fast is it, what limits it.

    python tools/plan.py --config=configs/gpt.py:gpt2 --topology=v5e-8 --output=plans/gpt2
    python tools/plan.py --config=configs/gpt.py:llama3_8b --topology=v5p-128 --config.mesh.tensor=2 --output=plans/8b
    python tools/plan.py --config=configs/gpt.py:llama3_8b --topology=v5p-128 --search=6 --output=plans/8b

Compiles the real train step with the real TPU or GPU compiler, on this machine's CPU (a minute or two for a large model), prints the plan
and writes plan.json, memory.png and time.png. Needs pip install 'jaxlm[plan]'. Topologies: v4-N, v5p-N (N cores, two a chip), v5e-N,
v6e-N (N chips), SxNAME for S slices, h100xN. --search=N also plans the N most promising other meshes, remat policies and numbers of
parts, ranks them, and writes the best; what was compiled is not compiled again. The exit code is 0 if the program fits, else 1.
Times are estimates.
"""

import logging
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxlm.planning.topologies import ENVIRONMENT, parse_topology

os.environ.update(ENVIRONMENT)  # before jax starts

from absl import app, flags

from jaxlm.exits import with_status
from jaxlm.flags import define_config_flag, parse, require
from jaxlm.plan import default_cache, make_plan, write_plan
from jaxlm.planning import search
from jaxlm.planning.compiling import plan_program
from jaxlm.planning.report import format_plan


@with_status
def main(argv):
    del argv
    args = flags.FLAGS
    logging.getLogger("jaxlm").setLevel(logging.INFO)
    output, planned = Path(args.output), partial(make_plan, cache=Path(args.cache))
    if args.search:
        plan = find_best(args.config, args.topology, planned, args.search)
    else:
        plan = planned(args.config, args.topology)
    write_plan(plan, output)
    print(format_plan(plan))
    sys.exit(0 if plan["fits"] else 1)


def find_best(config, topology, planned, count):
    """The best plan of the shortlist; prints the ranking."""
    machine = parse_topology(topology)
    num_params = plan_program(search.any_mesh(config, machine), machine).num_params
    plans = search.search(config, machine, planned, num_params, count)
    if not plans:
        sys.exit(
            f"no mesh of {topology} holds {num_params / 1e9:.1f}B parameters with batch_size={config.batch_size} and "
            f"eval.batch_size={config.eval.batch_size}: take a larger slice, or batches that more ways divide"
        )
    print(search.format_ranking(plans), end="\n\n")
    return plans[0]


if __name__ == "__main__":
    define_config_flag()
    flags.DEFINE_string("topology", None, "The machines: v5e-16, v5p-128, 2xv5e-256, h100x8, …")
    flags.DEFINE_string("output", None, "Folder for plan.json and the pictures.")
    flags.DEFINE_integer("search", 0, "How many other ways to run the config to plan.")
    flags.DEFINE_string("cache", str(default_cache()), "Folder of compiled programs.")
    require(
        config="--config=configs/NAME.py:VARIANT",
        topology="--topology=MACHINES, such as v5p-128",
        output="--output=FOLDER",
    )
    app.run(main, flags_parser=parse)
