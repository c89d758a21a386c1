"""Ids of the Hugging Face hub to folders. Needs the optional package huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from jaxlm.interop.mapping import BadModel

# Only these are fetched, and the msgpack where there is no safetensors: no pickles, and no code.
PATTERNS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "*.model",
)
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def fetch(source: str) -> tuple[Path, str]:
    """(folder, commit) of a folder, or of 'ID[@revision]' on the hub; a folder has the commit ''.

    Raises:
      BadModel: if it is neither a folder nor an id.
      ImportError: if it is an id and huggingface_hub is missing.
    """
    if source and Path(source).is_dir():
        return Path(source), ""
    name, _, revision = source.partition("@")
    if not _ID.fullmatch(name) or ".." in name:
        raise BadModel(
            f"{source!r}: found no such folder, and it is no id of the hub (NAME or OWNER/NAME, with @REVISION)"
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{source!r} is no folder here; an id of the hub needs: pip install 'jaxlm[hf]'"
        ) from error

    def download(*patterns: str) -> Path:
        try:
            folder = huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        except OSError as error:
            raise OSError(
                f"hf:{source}: no such folder here, and the hub does not give it: {error}\n"
                "Check the id and the network (HF_TOKEN for models that ask for a licence), or download it elsewhere and give "
                "its folder, hf:FOLDER"
            ) from error
        return Path(folder)

    folder = download(*PATTERNS)
    if not any(folder.glob("*.safetensors")):
        folder = download(*PATTERNS, "flax_model.msgpack")
    return folder, folder.name  # the cache names a snapshot's folder after its commit
