"""Turns text into a token store. Stopped or killed, the same command goes on where it was.

python tools/prepare_data.py --sources=stdlib --tokenizer=TOKENIZER --output=STORE
python tools/prepare_data.py --sources='books/*.txt,web.jsonl.zst' --tokenizer=TOKENIZER --output=STORE
"""

import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxlm.data.prepare import prepare
from jaxlm.data.token_store import TokenStore
from jaxlm.exits import with_status
from jaxlm.flags import parse

_SOURCES = flags.DEFINE_list(
    "sources", None, "'stdlib', files, folders or globs, with commas", required=True
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "folder of tools/train_tokenizer.py, or a foreign tokenizer", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "folder of the token store to make", required=True)
_SPLIT = flags.DEFINE_enum(
    "split", "hash", ["hash", "tail"], "hold out whole documents, or the end of each"
)
_FRACTION = flags.DEFINE_float("validation_fraction", 0.05, "share that is held out", 0, 1)
_SEED = flags.DEFINE_integer("seed", 0, "of the documents' order")
_WORKERS = flags.DEFINE_integer("num_workers", -1, "processes; -1 = one per core, 0 = none")
_SHARD = flags.DEFINE_integer("shard_tokens", 1 << 24, "tokens in a shard", 1)
_BAD = flags.DEFINE_float("max_bad_fraction", 0.01, "share of unusable documents allowed", 0, 1)
_FIELD = flags.DEFINE_string("text_field", "text", "the text's name in JSON lines and Parquet")


@with_status
def main(argv: list[str]) -> None:
    del argv
    manifest = prepare(
        _SOURCES.value,
        _TOKENIZER.value,
        _OUTPUT.value,
        split=_SPLIT.value,
        validation_fraction=_FRACTION.value,
        seed=_SEED.value,
        num_workers=_WORKERS.value,
        shard_tokens=_SHARD.value,
        max_bad_fraction=_BAD.value,
        text_field=_FIELD.value,
    )
    for split in manifest["splits"]:
        store = TokenStore(_OUTPUT.value, split)
        rate = store.num_bytes / store.num_tokens
        print(
            f"{split}: {store.num_documents:,} documents, {store.num_tokens:,} tokens, "
            f"{store.num_bytes:,} bytes of text ({rate:.2f} a token)"
        )
    for reason, count in manifest.get("source", {}).get("bad", {}).items():
        print(f"left out: {count:,} {reason} (see {_OUTPUT.value}/quarantine.jsonl)")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
