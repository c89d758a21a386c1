"""The sections of a page: each a function of the run's files that gives blocks, or none where the run has nothing for it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from jaxlm.data.positions import read_rewinds
from jaxlm.page.blocks import Block, Note, Picture, Quote, Section, Table, thinned
from jaxlm.page.files import Files, flat
from jaxlm.page.summary import UNREADABLE
from jaxlm.training.checkpoints import DAMAGED, FOLDER, find_steps
from jaxlm.training.goodput import account, report
from jaxlm.training.plots import PICTURES

MAX_PICTURES = 8
SAMPLE_STEPS = 6
EVALUATIONS = 6
ROWS = 10


def make_sections(files: Files) -> list[Section]:
    """What a run has of `SECTIONS`. A file that cannot be read is named where its content would stand."""
    made = [(title, _attempt(blocks, files)) for title, blocks in SECTIONS.items()]
    return [Section(title, blocks) for title, blocks in made if blocks]


def _attempt(blocks: Callable[[Files], list[Block]], files: Files) -> list[Block]:
    try:
        return blocks(files)
    except UNREADABLE as error:
        return [Note(f"This cannot be read: {type(error).__name__}: {error}", is_bad=True)]


def curves(files: Files) -> list[Block]:
    """Drawn from metrics.jsonl, whatever lies in plots/."""
    if not files.metrics:
        return [Note("No step has been logged yet.")]
    name = files.workdir.name
    return [
        Picture(_png(draw({name: files.metrics})), f"Curves: {file.removesuffix('.png')}")
        for file, draw in PICTURES.items()
    ]


def _png(figure: Any) -> bytes:
    """Three quarters of its usual size, so that letters are legible where two stand side by side."""
    file = io.BytesIO()
    figure.set_size_inches(0.75 * figure.get_size_inches())
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def samples(files: Files) -> list[Block]:
    """For each prompt what the model wrote, over the steps."""
    texts: dict[str, dict[int, str]] = {}
    for line in files.lines("samples.jsonl"):
        texts.setdefault(line["prompt"], {})[line["step"]] = line["text"]
    return [
        Quote(
            prompt, [(f"step {step:,}", text) for step, text in thinned(at.items(), SAMPLE_STEPS)]
        )
        for prompt, at in texts.items()
    ]


def evaluation(files: Files) -> list[Block]:
    """Held-out metrics over the steps; of a fine-tuned run its report, its pictures and some predictions."""
    blocks: list[Block] = []
    if lines := thinned(files.evaluations, EVALUATIONS):
        names = [k for k in dict.fromkeys(k for line in lines for k in line) if k not in KEYS]
        rows = [(name, *(line.get(name, "") for line in lines)) for name in names]
        blocks.append(Table(rows, ("held-out, at step", *(line["step"] for line in lines))))
    if found := files.read("report.json"):
        splits = {name: found[name] for name in ("dev", "test") if name in found}
        names = list(dict.fromkeys(name for scores in splits.values() for name in scores))
        rows = [(name, *(scores.get(name, "") for scores in splits.values())) for name in names]
        rows.append(("records", *(found["records"].get(name, "") for name in splits)))
        blocks += [
            Note(f"The best checkpoint, step {found['step']:,}:"),
            Table(rows, ("", *splits)),
        ]
    return blocks + _pictures(files) + _predictions(files)


KEYS = ("step", "split", "params")


def _pictures(files: Files) -> list[Block]:
    """Of plots/, what is not drawn anew: confusion.png, and curves of one metric."""
    paths = [path for path in files.glob("plots/*.png") if path.name not in PICTURES]
    return [Picture(path.read_bytes(), path.name) for path in paths[:MAX_PICTURES]]


def _predictions(files: Files) -> list[Block]:
    records = files.first_lines("predictions.jsonl", ROWS)
    names = list(dict.fromkeys(name for record in records for name in record))
    rows = [tuple(record.get(name, "") for name in names) for record in records]
    count = files.count_lines("predictions.jsonl")
    return [Table(rows, names, f"The first {len(rows)} of {count:,} predictions")] if rows else []


def config(files: Files) -> list[Block]:
    """In what the run differs from its recipe, what the recipe left open, and all fields."""
    fields = flat(files.config)
    whole = Table(list(fields.items()), ("field", "value"), f"All {len(fields)} fields")
    if not files.has("recipe.json"):
        return [whole]
    recipe = files.read("recipe.json")
    before = flat(recipe["config"])
    changed = [(n, x, fields.get(n, "absent")) for n, x in before.items() if fields.get(n) != x]
    filled = [(name, value) for name, value in fields.items() if name not in before]
    blocks: list[Block] = [
        Note(f"From the recipe {recipe['name']}, {'changed:' if changed else 'unchanged.'}")
    ]
    if changed:
        blocks.append(Table(changed, ("field", "recipe", "this run")))
    if filled:  # by the model that is fine-tuned, and by the data
        blocks.append(Table(filled, ("field", "value"), f"{len(filled)} fields that it left open"))
    return [*blocks, whole]


def origin(files: Files) -> list[Block]:
    """What the run started from, and what became of its parameters."""
    content = files.read("origin.json")
    rows = [
        (name, f"{len(x):,}: " + ", ".join(map(str, x[:ROWS])) if isinstance(x, list) and x else x)
        for name, x in content.items()
    ]
    return [Table(rows)] if rows else []


def time(files: Files) -> list[Block]:
    """Where the time of all starts of the run went."""
    lives = files.lives
    if not lives:
        return []
    seconds = account(lives)
    wall = seconds.pop("wall")
    spent = sorted(seconds.items(), key=lambda item: -item[1])
    rows = [(cause, f"{s:,.1f}", f"{s / wall:.1%}") for cause, s in spent if s >= 0.05]
    starts = [
        [life[k] for k in ("life", "steps", "bad", "again", "newest")]
        + [f"{life['ended'] - life['began']:,.0f}"]
        for life in lives
    ]
    head = ("start", "steps", "bad", "done again", "newest step", "seconds")
    return [
        Note(report(lives)[:1].upper() + report(lives)[1:] + "."),
        Table(rows, ("cause", "seconds", "share")),
        Table(starts, head, f"{len(lives)} starts" if len(lives) > 1 else "One start"),
    ]


def trouble(files: Files) -> list[Block]:
    """Steps that were left out, rewinds, checkpoints set aside, hangs, and rows that could not be used."""
    rows: list[tuple[str, str]] = []
    if bad := sum(life["bad"] for life in files.lives):
        rows.append(
            ("bad steps", f"{bad:,}: loss or gradient was not finite, or a spike; not applied")
        )
    for rewind in read_rewinds(files.workdir):
        first, last = rewind.bad_steps
        back = f"back to step {rewind.step:,}, on with batch {rewind.batch:,}"
        rows.append(("rewind", f"steps {first}-{last} were bad: {back}"))
    rows += [("bad steps kept", path.name) for path in files.glob("bad_steps/*")]
    for path in files.glob(f"{DAMAGED}/*.txt"):
        rows.append((f"checkpoint {path.stem} set aside", path.read_text(encoding="utf-8").strip()))
    rows += [("no step for too long", path.name) for path in files.glob("stacks-*.txt")]
    for problem in files.first_lines("problems.jsonl", ROWS):
        rows.append((f"{problem['source']}:{problem['line']}", problem["text"]))
    if (count := files.count_lines("problems.jsonl")) > ROWS:
        rows.append(("rows that cannot be used", f"{count:,} in all, in problems.jsonl"))
    return [Table(rows)] if rows else []


def checkpoints(files: Files) -> list[Block]:
    """The steps that are kept."""
    steps = find_steps(files.workdir / FOLDER)
    return [Note("Steps " + ", ".join(f"{step:,}" for step in steps) + ".")] if steps else []


def environment(files: Files) -> list[Block]:
    """Versions, devices and the rest of environment.json."""
    rows = list(flat(files.read("environment.json")).items())
    return [Table(rows)] if rows else []


# Title -> its blocks, in the order of the page.
SECTIONS: dict[str, Callable[[Files], list[Block]]] = {
    "Curves": curves,
    "Samples": samples,
    "Evaluation": evaluation,
    "Config": config,
    "Origin": origin,
    "Time": time,
    "Trouble": trouble,
    "Checkpoints": checkpoints,
    "Environment": environment,
}
