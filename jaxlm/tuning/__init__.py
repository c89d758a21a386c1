"""From a ConfigDict and a pretrained model to the parts of a fine-tuning run.

    source      init_from ──open_source──▶ model config, tokenizer ─┐
    splits      data files ──records──▶ task.infer ──▶ task ────────┴─ prepare ──▶ Prepared ──make_run──▶ TaskRun
    run         the last two arrows; a TaskRun is a build.Run
    prediction  load_finetuned(F).predict(rows)

What a user's config leaves open (the model's shape, the number of steps) is filled in by `prepare`; the run's config.json
holds the result, so a fine-tuned workdir stands alone. Like jaxlm.build this knows configs and every package below.
"""

from jaxlm.tuning.prediction import (
    Finetuned,
    Predictor,
    is_finetuned,
    load_finetuned,
)
from jaxlm.tuning.run import (
    TaskRun,
    add_reference,
    initial_state,
    make_run,
    prepare,
    write_task,
)
from jaxlm.tuning.source import (
    Repair,
    Source,
    find_best_step,
    open_source,
    read_weights,
    refuse_strangers,
)
from jaxlm.tuning.splits import Split

__all__ = [
    "Finetuned",
    "Predictor",
    "Repair",
    "Source",
    "Split",
    "TaskRun",
    "add_reference",
    "find_best_step",
    "initial_state",
    "is_finetuned",
    "load_finetuned",
    "make_run",
    "open_source",
    "prepare",
    "read_weights",
    "refuse_strangers",
    "write_task",
]
