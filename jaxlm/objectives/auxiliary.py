"""The losses that a model's layers add to an objective's: the same for every objective and every task."""

from collections.abc import Callable
from typing import Any


def with_auxiliary(loss: Callable) -> Callable:
    """`loss`, a function (outputs, batch) -> ((total, weight), metrics), with `outputs.auxiliary` added where there is one.

    The mean of the (micro-)batch grows by `auxiliary.loss`: it is added times the weight, so that a batch counts in
    proportion when totals are summed. The metric `loss` is the sum, as it is with every other part of a loss; those that
    a model reports of its layers are added. Without an auxiliary loss nothing is changed.
    """

    def total_loss(outputs: Any, batch: dict) -> tuple[tuple, dict]:
        (total, weight), metrics = loss(outputs, batch)
        if outputs.auxiliary is None:
            return (total, weight), metrics
        total = total + outputs.auxiliary.loss * weight
        return (total, weight), {**metrics, "loss": (total, weight), **outputs.auxiliary.metrics}

    return total_loss
