"""What makes a run the run that it is, and what of it may be another on a resume.

identity     model, objective, optimizer, seed, batch, dtypes, where it starts,      refused with the difference,
             sources and what is in them                                             or allowed by a flag
kept         the tokenizer: the ids of a run mean what it says                       refused
execution    EXECUTION_FIELDS: how it runs, not what it computes                     allowed, and logged
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from jaxlm.exits import RunError
from jaxlm.models.transformer import TransformerConfig

log = logging.getLogger("jaxlm")

# A group or a field in a group; all others are identity.
EXECUTION_FIELDS = (
    "num_train_steps",  # may be raised; schedules read it
    "log_every_steps",
    "eval_every_steps",
    "checkpoint_every_steps",
    "mesh",
    "pipeline_micro_batches",
    "remat",
    "offload_optimizer",
    "unroll",
    "attention_kernel",
    "compiler_flags",
    "checkpoint",
    "eval",
    "log",
    "guards.max_bad_steps",
    "guards.self_check_every_steps",
    "guards.watchdog_seconds",
    "data.num_workers",
    "data.prefetch",
    "data.cache_dir",
)
KEPT_FIELDS = ("tokenizer",)


class OtherRun(RunError, ValueError):
    """What was asked for is not the run that the workdir holds."""


def kind_of(name: str) -> str:
    """'execution', 'kept' or 'identity', of a field as 'data.prefetch'."""
    for kind, fields in (("execution", EXECUTION_FIELDS), ("kept", KEPT_FIELDS)):
        if any(name == field or name.startswith(f"{field}.") for field in fields):
            return kind
    return "identity"


def config_changes(old: ConfigDict, new: ConfigDict) -> dict[str, str]:
    """The fields that differ: name -> 'name: old -> new'."""
    # A field of the model that is younger than the run has the value that it had before it was one.
    defaults = {
        f"model.{field.name}": field.default
        for field in dataclasses.fields(TransformerConfig)
        if field.default is not dataclasses.MISSING
    }
    defaults = json.loads(json.dumps(defaults))
    before, after = (defaults | flatten_dict(json.loads(c.to_json()), sep=".") for c in (old, new))
    return _differences(before, after)


def manifest_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(what may be allowed, what may not) of that in which a run differs from a checkpoint's manifest, besides the config:
    the content of its data, the dtype that it computes in where the config leaves that to the machine, the tokenizer."""
    data = [
        {f"data of {name} (fingerprint)": value for name, value in about["data"].items()}
        | {"dtype": about.get("dtype", new["dtype"])}  # older manifests lack it
        for about in (old, new)
    ]
    tokenizer = [{"tokenizer (sha256)": about["tokenizer_sha256"]} for about in (old, new)]
    return [*_differences(*data).values()], [*_differences(*tokenizer).values()]


def accept_changes(
    workdir: Path, changes: list[str], kept: Sequence[str] = (), *, allowed: bool, then: str = ""
) -> None:
    """Says in the log what has changed about a run, if that is allowed.

    changes: a line for each change that makes it another run. kept: of what no flag allows.
    then: what follows from going on with the changes.

    Raises:
      OtherRun: with all of them, if they are not allowed.
    """
    if kept or (changes and not allowed):
        lines = "".join(f"\n  {line}" for line in (*changes, *kept))
        flag = "" if kept else ", or pass --allow_config_change"
        raise OtherRun(
            f"{workdir} holds another run (what it has -> what is asked for):{lines}\n"
            "Take another --workdir (--config.init_from starts from this run's parameters), undo the change"
            f"{flag}.{then}"
        )
    for line in changes:
        log.warning("changed since this run began, as allowed: %s%s", line, then)


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }
