"""A plan of a training run on machines that are not here: the real step, compiled ahead of time, and read.

    topologies   'v5e-16' -> devices -> mesh           chips    what a chip can do, from its data sheet
    compiling    Program -> compiled, or what it lacks  hlo      the compiler's text -> computations, loops, sources
    network      a collective -> seconds                cost     a module -> seconds by operation
    memory       bytes by kind                          report   the plan as a dict, a table and pictures
    search       meshes, remat, micro-batches -> the best plans

`jaxlm.plan.make_plan` is the way through them.
"""
