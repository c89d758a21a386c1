"""Field groups of tasks whose predictions are texts, besides those of `configs.finetune.common`."""

from typing import Any

from ml_collections import ConfigDict

from configs.finetune.common import base


def writing(task: dict[str, Any], arg: str, *, num_beams: int = 1, **choices: Any) -> ConfigDict:
    """The config of such a task; arguments as of `base`.

    Evaluation during training asks for the loss of the right texts, without smoothing, and the smallest is the best. The
    report at the end has the model write, by `num_beams` beams (1: greedy).
    """
    evaluation = dict(
        batch_size=32,
        num_beams=num_beams,
        # above 0 prefers longer texts
        length_penalty=1.0,
        # texts that are written at each evaluation, too; needed where best_metric is one of task.metrics
        dev_texts=0,
    )
    return base(task, arg, eval=evaluation, **choices)
