"""Draws docs/overview.svg, the picture at the top of README.md: `python tools/draw_overview.py`.

How many objectives, tasks and families there are is read from their tables.
"""

import argparse
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxlm.interop import FAMILIES
from jaxlm.objectives import OBJECTIVES
from jaxlm.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 980, 415
# A page of its own behind everything, so that the picture reads the same in light and in dark.
PAPER, INK, FAINT, LINE = "#ffffff", "#1f2328", "#57606a", "#8c959f"
HOST, DEVICE, DISK, OUT = "#ddf4ff", "#fff8c5", "#eaeef2", "#dafbe1"


class Box(NamedTuple):
    """A rectangle at (x, y), in pixels from the left upper corner, with a title and lines below it."""

    x: int
    y: int
    width: int
    height: int
    fill: str
    title: str
    lines: tuple[str, ...]


BOXES = {
    "text": Box(20, 90, 140, 110, DISK, "Text", (".txt .jsonl .parquet", "on disk or gs://", "tokenizer: trained,", "or Hugging Face's")),
    "store": Box(205, 90, 140, 110, DISK, "Token store", ("memory-mapped", "each block checked", "one, any objective")),
    "batches": Box(390, 90, 150, 110, HOST, "Batches", (f"{len(OBJECTIVES)} objectives", "packed rows", "batch k: a function", "of (seed, k) alone")),
    "step": Box(585, 90, 170, 110, DEVICE, "Train step", ("decoder, encoder,", "encoder-decoder", "data fsdp expert", "context tensor")),
    "checkpoints": Box(800, 90, 160, 110, DISK, "Checkpoints", ("each array checked", "resume bit for bit,", "restore on any mesh")),
    "plan": Box(205, 300, 140, 95, OUT, "Plan", ("memory and time", "on TPUs and GPUs", "you do not have")),
    "use": Box(390, 300, 150, 95, OUT, "Use", ("write, fill, embed,", "score, search, or try", "it in the browser")),
    "tasks": Box(585, 300, 170, 95, OUT, "Fine-tuning", (f"{len(TASKS)} kinds of task", "LoRA, DPO; the same", "step and loop")),
    "hub": Box(800, 300, 160, 95, OUT, "Hugging Face", (f"{len(FAMILIES)} families, in and out", "each conversion", "is proved by numbers")),
}  # fmt: skip

# The corners of each arrow, (x, y).
ARROWS = (
    ((160, 145), (205, 145)),
    ((345, 145), (390, 145)),
    ((540, 145), (585, 145)),
    ((755, 145), (800, 145)),
    ((620, 200), (620, 228), (275, 228), (275, 300)),
    ((840, 200), (840, 258), (670, 258), (670, 300)),
    ((670, 258), (465, 258), (465, 300)),
    ((585, 348), (540, 348)),
    ((944, 200), (944, 300)),
    ((944, 300), (944, 200)),
)
# The middle of each command's line of text.
COMMANDS = (
    (182, 80, "tools/prepare_data.py"),
    (562, 80, "jaxlm.pretrain"),
    (362, 221, "tools/plan.py"),
    (755, 251, "jaxlm.finetune"),
    (565, 251, "jaxlm.generate"),
    (870, 283, "convert_checkpoint"),
)


def draw() -> str:
    """The picture as the text of an SVG file."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif" role="img">',
        "<title>From text to a token store, batches, the train step and checkpoints; from there to tasks, use and "
        "Hugging Face; and the plan of the same step</title>",
        f'<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto"><path '
        f'd="M0,0 L9,4 L0,8 z" fill="{LINE}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="{PAPER}"/>',
        _text(20, 42, "One core, one loop: pretraining, fine-tuning, and back to Hugging Face", 19, weight=600),
        *(_arrow(corners) for corners in ARROWS),
        *(_text(x, y, command, 12, anchor="middle", mono=True) for x, y, command in COMMANDS),
        *(part for box in BOXES.values() for part in _box(box)),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _box(box: Box) -> list[str]:
    rectangle = (
        f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="6" '
        f'fill="{box.fill}" stroke="{LINE}"/>'
    )
    lines = [
        _text(box.x + 10, box.y + 44 + 17 * i, line, 12, fill=FAINT)
        for i, line in enumerate(box.lines)
    ]
    return [rectangle, _text(box.x + 10, box.y + 23, box.title, 15, weight=600), *lines]


def _arrow(corners: Sequence[tuple[int, int]]) -> str:
    points = " ".join(f"{x},{y}" for x, y in corners)
    return (
        f'<polyline points="{points}" fill="none" stroke="{LINE}" stroke-width="1.6" '
        'marker-end="url(#head)"/>'
    )


def _text(
    x: int,
    y: int,
    text: str,
    size: int,
    *,
    fill: str = INK,
    weight: int = 400,
    anchor: str = "start",
    mono: bool = False,
) -> str:
    family = ' font-family="ui-monospace, Menlo, Consolas, monospace"' if mono else ""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{fill}" '
        f'text-anchor="{anchor}"{family}>{escape(text)}</text>'
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "overview.svg")
    args = parser.parse_args(arguments)
    args.output.write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
