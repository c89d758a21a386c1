"""How a task's model is to write: what it must know before training, and the texts that it writes once trained."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxlm import program as programs
from jaxlm.data.records import Record
from jaxlm.files import as_path
from jaxlm.inference import decode
from jaxlm.inference.batches import in_batches
from jaxlm.inference.beam import beam_search
from jaxlm.inference.sampling import make_sampling
from jaxlm.interop.finetuned import read_task
from jaxlm.interop.safetensors_io import inside, read_json
from jaxlm.objectives.losses import cross_entropy
from jaxlm.tasks.chat import DEFAULT_TEMPLATE, ChatTemplate
from jaxlm.tasks.writing import Writer
from jaxlm.tuning.source import Source, find_decoder_start, find_prefix

MAX_TEMPLATE_BYTES = 1 << 20


def find_writing(config: ConfigDict, source: Source) -> dict[str, Any]:
    """What task.json says besides labels of a model that writes: the ids around its texts, and its chat template with the
    id that ends an answer.

    Raises:
      ValueError: for a template that cannot be read or used.
    """
    found: dict[str, Any] = {
        "prefix": list(find_prefix(source)),
        "start_id": find_decoder_start(source, config.task.get("decoder_start", "")),
    }
    if "template" in config.task:
        found["template"] = find_template(config.task.template, source)
        found["end_id"] = ChatTemplate(found["template"], source.tokenizer).end_id
    return found


def make_writer(config: ConfigDict, family: str, fitted: Mapping[str, Any]) -> Writer:
    """What a writing task knows of the model that writes."""
    return Writer(
        family,
        config.seq_len,
        prefix=tuple(fitted["prefix"]),
        start_id=fitted["start_id"],
        template=fitted.get("template", ""),
        cross_entropy=cross_entropy,
    )


def find_template(path: str, source: Source) -> str:
    """The chat template: of the file that the user names, else the one that the source was tuned with, else of its tokenizer's
    folder, else ours.

    Raises:
      ValueError: if the folder has several and none is the default, or a file is larger than any template.
    """
    if path:
        return _read(as_path(path).expanduser())
    if source.step_dir and (own := read_task(source.step_dir.parent.parent).get("template")):
        return own
    folder = source.folder or source.hf_files
    if folder is None:
        return DEFAULT_TEMPLATE
    if (folder / "chat_template.jinja").is_file():
        return _read(inside(folder, "chat_template.jinja"))
    settings = folder / "tokenizer_config.json"
    said = read_json(inside(folder, settings.name)) if settings.is_file() else {}
    template = said.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        if not isinstance(named.get("default"), str):
            raise ValueError(
                f"{settings} has the chat templates {', '.join(map(repr, named))} and no 'default': write the one to use "
                "into a file, and name it with --config.task.template"
            )
        template = named["default"]
    return template if isinstance(template, str) else DEFAULT_TEMPLATE


def _read(path: Path) -> str:
    if (size := path.stat().st_size) > MAX_TEMPLATE_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; expected at most {MAX_TEMPLATE_BYTES:,}")
    return path.read_text(encoding="utf-8")


def write_texts(
    model: Any, mesh: Any, params: Any, task: Any, records: Sequence[Record], options: ConfigDict
) -> list[dict[str, Any]]:
    """{'text': …} for each record: the likeliest text by `options.num_beams` beams (1: greedy), as the task prompts for it.

    options: a config's `eval` group. As many records at a time as its batch_size has room for beams.
    """
    prompts = [task.prompt(record) for record in records]
    if not prompts:
        return []
    start = {"start_id": task.writer.start_id} if task.writer.has_encoder else {}
    decoder = decode.make_decoder(model, task.tokenizer.vocab_size, **start)
    params = programs.in_mesh(mesh, decoder.prepare)(params)
    common = dict(
        max_new_tokens=task.target_len,
        max_len=task.writer.seq_len,
        eos_id=task.end_id,
    )
    if options.num_beams > 1:
        search = functools.partial(
            beam_search,
            decoder,
            params,
            num_beams=options.num_beams,
            length_penalty=options.length_penalty,
            **common,
        )
        write = lambda rows: [beams[0].tokens for beams in search(rows)]
    else:
        draw = functools.partial(
            decode.generate, decoder, params, sampling=make_sampling(temperature=0), **common
        )
        write = lambda rows: [row.tokens for row in draw(rows)]
    write = programs.in_mesh(mesh, write)
    written = in_batches(
        lambda indices: write([prompts[i] for i in indices]),
        [len(prompt) for prompt in prompts],
        task.writer.seq_len,
        max(1, options.batch_size // options.num_beams),
    )
    return [{"text": task.tokenizer.decode(tokens).strip()} for tokens in written]
