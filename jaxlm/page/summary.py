"""What stands at the top of a page: the run in a sentence, and its figures."""

from __future__ import annotations

import math
from collections.abc import Callable

from jaxlm.files import absolute
from jaxlm.page.blocks import shown
from jaxlm.page.files import Files
from jaxlm.training.goodput import account
from jaxlm.training.metrics import usual_mode

FAMILIES = {
    "gpt": "A decoder",
    "bert": "An encoder",
    "electra": "ELECTRA",
    "xlnet": "XLNet",
    "encoder_decoder": "An encoder-decoder",
}
UNREADABLE = (ValueError, TypeError, KeyError, OSError, RuntimeError)  # Damaged is the last


def describe(files: Files) -> tuple[str, str]:
    """(the run's name, what it is)."""
    config = files.config
    family = config.get("family", "")
    model = FAMILIES.get(family, family)
    start = f", from {config['init_from']}" if config.get("init_from") else ""
    if "task" in config:
        return absolute(
            files.workdir
        ).name, f"{model} fine-tuned for {config['task']['name']}{start}."
    objective = config["objective"]["name"]
    return absolute(files.workdir).name, f"{model} pretrained by the objective {objective}{start}."


def figures(files: Files) -> dict[str, str]:
    """Name -> figure; '?' where a file cannot be read, and none of what the run has not come to."""
    found = {name: _attempt(figure, files) for name, figure in FIGURES.items()}
    return {name: text for name, text in found.items() if text}


def _attempt(figure: Callable[[Files], str], files: Files) -> str:
    try:
        return figure(files)
    except UNREADABLE:
        return "?"


def _parameters(files: Files) -> str:
    return shown(files.read("environment.json").get("parameters", ""))


def _steps(files: Files) -> str:
    done = max((line["step"] for line in files.metrics), default=0)
    return f"{done:,} of {files.config['num_train_steps']:,}"


def _held_out(files: Files) -> str:
    """By what the run chooses its checkpoints, else by the loss."""
    rule = files.config["checkpoint"]
    metric = rule["best_metric"] or "loss"
    best = max if (rule["best_mode"] or usual_mode(metric)) == "max" else min
    found = [(x[metric], x["step"]) for x in files.evaluations if _is_number(x.get(metric))]
    if not found:
        return ""
    value, step = best(found, key=lambda pair: pair[0])
    return f"{metric} {value:.4g} at step {step:,}"


def _bits(files: Files) -> str:
    found = [x["bits_per_byte"] for x in files.evaluations if _is_number(x.get("bits_per_byte"))]
    return f"{min(found):.3f}" if found else ""


def _speed(files: Files) -> str:
    speeds = [x["tokens_per_second"] for x in files.metrics if "tokens_per_second" in x]
    return f"{sorted(speeds)[len(speeds) // 2]:,.0f}" if speeds else ""


def _goodput(files: Files) -> str:
    if not files.lives:
        return ""
    shares = account(files.lives)
    return f"{shares['useful'] / shares['wall']:.1%} of {shares['wall']:,.0f} s"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


FIGURES: dict[str, Callable[[Files], str]] = {
    "parameters": _parameters,
    "steps": _steps,
    "best held-out": _held_out,
    "best bits per byte": _bits,
    "tokens/s (median)": _speed,
    "goodput": _goodput,
}
