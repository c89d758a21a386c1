"""The README's plans, predictions against published runs, and bars of speed: made again by one command that may be interrupted.

    python tools/plan_table.py                    all of it, into docs/plans/ and between the README's markers
    python tools/plan_table.py --only=gpt2        the rows whose name has it; --write_readme=False leaves the README

Each row is a real train step, compiled ahead of time (tools/plan.py); compiled programs are kept, so a second run only compiles what has
changed. On two CPU cores the whole takes about half an hour.
"""

import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxlm.planning.topologies import ENVIRONMENT

os.environ.update(ENVIRONMENT)  # before jax starts

from absl import app, flags

from jaxlm.config_files import read_config
from jaxlm.files import write_text
from jaxlm.plan import default_cache, make_plan
from jaxlm.planning.chips import GIB

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "plans"


@dataclasses.dataclass(frozen=True)
class Row:
    """A config with overrides on a topology. published: measured tokens/s of a chip of another code base's run of this model."""

    name: str
    label: str
    config: str
    topology: str
    overrides: dict[str, Any]
    published: float = 0.0
    source: str = ""


# No fused kernel drops probabilities out, as BERT's recipe does; the reference holds all scores and is bound by memory.
FUSED_ATTENTION = {"model.attention_dropout_rate": 0.0}
# Over all 16 chips gradients are all-reduced whole; over 8 they are reduced and scattered.
ON_16_CHIPS = {"mesh.data": 2, "mesh.fsdp": 8}

DENSE = [
    Row(
        "gpt2_v5e-1",
        "GPT-2 124M",
        "configs/gpt.py:gpt2",
        "v5e-1",
        dict(remat="dots", accumulation_steps=30),
    ),
    Row(
        "gpt2_v5e-8",
        "GPT-2 124M",
        "configs/gpt.py:gpt2",
        "v5e-8",
        dict(remat="dots", accumulation_steps=4),
    ),
    Row(
        "bert_v5e-8",
        "BERT-base, MLM, attention without dropout",
        "configs/bert.py:base",
        "v5e-8",
        {"remat": "dots", **FUSED_ATTENTION},
    ),
    Row(
        "llama3_1b_v5e-16",
        "Llama 3 1B",
        "configs/gpt.py:llama3_1b",
        "v5e-16",
        {
            "batch_size": 64,
            "accumulation_steps": 4,
            "objective.chunk_tokens": 16384,
            **ON_16_CHIPS,
        },
    ),
    Row(
        "llama3_8b_v5p-16",
        "Llama 3 8B",
        "configs/gpt.py:llama3_8b",
        "v5p-16",
        dict(batch_size=16),
    ),
    Row(
        "llama3_8b_h100x8",
        "Llama 3 8B",
        "configs/gpt.py:llama3_8b",
        "h100x8",
        dict(batch_size=8),
    ),
    Row(
        "llama3_70b_v5p-256",
        "Llama 3 70B",
        "configs/gpt.py:llama3_70b",
        "v5p-256",
        {"batch_size": 128, "eval.batch_size": 128, "remat": "full"},
    ),
    Row(
        "mixtral_v5p-128",
        "Mixtral 8x7B",
        "configs/gpt.py:mixtral_8x7b",
        "v5p-128",
        {"batch_size": 256, "mesh.fsdp": 32, "mesh.expert": 2, "remat": "full"},
    ),
    Row(
        "t5_large_v5e-16",
        "T5 large, span corruption",
        "configs/t5.py:large",
        "v5e-16",
        {"batch_size": 256, "remat": "dots", "mesh.fsdp": 16},
    ),
]

# What the speed bars of CONTRIBUTING's plans lane are about, besides rows above.
BARS = [
    Row(
        "qwen3_0_6b_v5e-16",
        "Qwen3 0.6B, 4 x 2,048 tokens a chip",
        "configs/gpt.py:qwen3_0_6b",
        "v5e-16",
        {"batch_size": 64, "seq_len": 2048, "remat": "full", "mesh.fsdp": 8, "mesh.tensor": 2},
    ),
    Row(
        "llama3_1b_2k_v5e-16",
        "Llama 3 1B, rows of 2,048",
        "configs/gpt.py:llama3_1b",
        "v5e-16",
        {
            "seq_len": 2048,
            "batch_size": 256,
            "accumulation_steps": 4,
            "objective.chunk_tokens": 16384,
            **ON_16_CHIPS,
        },
    ),
    Row(
        "llama3_8b_v5p-64",
        "Llama 3 8B",
        "configs/gpt.py:llama3_8b",
        "v5p-64",
        dict(batch_size=64),
    ),
    Row(
        "bert_all_positions_v5e-8",
        "BERT-base, MLM at all positions, likewise",
        "configs/bert.py:base",
        "v5e-8",
        {"remat": "dots", "objective.rate": 1.0, **FUSED_ATTENTION},
    ),
]

CALIBRATIONS = [
    Row(
        "published_164m_v5e-1",
        "164M decoder",
        "configs/gpt.py:qwen3_0_6b",
        "v5e-1",
        {
            "model.emb_dim": 1024,
            "model.num_layers": 8,
            "model.num_heads": 4,
            "model.num_kv_heads": 1,
            "model.head_dim": 256,
            "model.mlp_dim": 3072,
            "model.vocab_size": 32768,
            "model.final_softcap": 15.0,
            "model.tie_embeddings": False,
            "model.max_len": 2048,
            "seq_len": 2048,
            "batch_size": 64,
            "accumulation_steps": 16,
            "remat": "none",
            "unroll": 0,
        },
        published=148_829,
        source="[vorushin.github.io](https://vorushin.github.io/blog/llm-pretraining-tpu-v6e-50usd)",
    ),
    Row(
        "published_32b_v5p-128",
        "MaxText 32B",
        "configs/gpt.py:llama3_70b",
        "v5p-128",
        {
            "model.emb_dim": 8192,
            "model.num_layers": 32,
            "model.num_heads": 64,
            "model.num_kv_heads": 64,
            "model.head_dim": 128,
            "model.mlp_dim": 28672,
            "model.vocab_size": 32000,
            "model.rope_scaling": (),
            # Its run has 7 rows a chip and a mesh of fsdp 16 x tensor 4; ours keeps more of a layer than its policy 'minimal'.
            "seq_len": 2048,
            "batch_size": 256,
            "remat": "dots",
        },
        # 328 TFLOP/s a chip, by that project's count of FLOPs, which counts all scores as ours does.
        published=328e12,
        source="[MaxText's README](https://github.com/AI-Hypercomputer/maxtext), v5p, 32B",
    ),
]


def plan_row(row: Row, cache: Path) -> dict[str, Any]:
    """The plan of a row, written to docs/plans/NAME.json."""
    plan = make_plan(read_config(row.config, row.overrides), row.topology, cache=cache)
    plan = {"name": row.name, "config": row.config, "overrides": row.overrides} | plan
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{row.name}.json"
    write_text(path, json.dumps(plan, indent=1) + "\n")
    return plan


def read_plan(row: Row) -> dict[str, Any] | None:
    path = FOLDER / f"{row.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def format_row(row: Row, plan: dict[str, Any]) -> str:
    mesh = " x ".join(f"{k} {v}" for k, v in plan["mesh"].items()) or "1"
    parts = f" in {plan['accumulation_steps']} parts" if plan["accumulation_steps"] > 1 else ""
    low, high = plan.get("estimated_mfu_range", (0, 0))
    return (
        f"| {row.label} | {row.topology} | {mesh} | {plan['batch_size']} x {plan['seq_len']:,}{parts} | {plan['remat']} | "
        f"{plan['hbm_bytes'] / GIB:.1f} of {plan['usable_bytes'] / GIB:.1f} GiB | "
        + (
            f"{plan['tokens_per_second_per_chip']:,.0f} | {plan['estimated_mfu']:.0%} ({low:.0%} to {high:.0%}) | "
            f"{plan['roofline']['bound']} |"
            if plan["fits"] and "roofline" in plan
            else f"{'not readable' if plan['fits'] else 'does not fit'} | | |"
        )
    )


def plans_table() -> str:
    head = (
        "| model | machine | mesh | batch | remat | memory of a device | tokens/s/chip | MFU | longest bound |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    rows = [format_row(row, plan) for row in [*DENSE, *BARS] if (plan := read_plan(row))]
    return "\n".join([head, *rows])


def calibration_table() -> str:
    head = (
        "| published run | machine | published tokens/s/chip | predicted (bracket) | predicted / published |\n"
        "|---|---|---|---|---|"
    )
    rows = []
    for row in CALIBRATIONS:
        if (plan := read_plan(row)) and "roofline" in plan:
            published = published_speed(row, plan)
            low, high = plan["tokens_per_second_per_chip_range"]
            speed = plan["tokens_per_second_per_chip"]
            rows.append(
                f"| {row.label}, {row.source} | {row.topology} | {published:,.0f} | {speed:,.0f} ({low:,.0f} to {high:,.0f}) | "
                f"{speed / published:.2f} |"
            )
    return "\n".join([head, *rows])


def published_speed(row: Row, plan: dict[str, Any]) -> float:
    """Tokens/s of a chip; a published number of FLOP/s is divided by the model's FLOPs of a token."""
    if row.published < 1e9:
        return row.published
    tokens = plan["batch_size"] * plan["seq_len"]
    return row.published / (plan["model_flops"] / tokens)


def write_readme(path: Path) -> None:
    """Puts both tables between their markers.

    Raises:
      ValueError: if the markers are not there.
    """
    text = path.read_text(encoding="utf-8")
    for name, table in (("plans", plans_table()), ("calibration", calibration_table())):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"{path} has no {begin} … {end}: put the markers where the table goes")
        before, after = text.partition(begin)[0], text.partition(end)[2]
        text = f"{before}{begin}\n{table}\n{end}{after}"
    path.write_text(text, encoding="utf-8")


def main(argv):
    del argv
    args = flags.FLAGS
    logging.getLogger("jaxlm").setLevel(logging.INFO)
    for row in [*CALIBRATIONS, *DENSE, *BARS]:
        if args.only in row.name:
            print(row.name, flush=True)
            plan = plan_row(row, Path(args.cache))
            print(format_row(row, plan), flush=True)
    if args.write_readme:
        write_readme(ROOT / "README.md")


if __name__ == "__main__":
    flags.DEFINE_string("only", "", "Plan only rows with this in their name.")
    flags.DEFINE_bool("write_readme", True, "Put the tables into README.md.")
    flags.DEFINE_string("cache", str(default_cache()), "Folder of compiled programs.")
    app.run(main)
