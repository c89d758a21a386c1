"""Learns a tokenizer from text and saves it to a folder.

python tools/train_tokenizer.py --kind=byte_bpe --sources=stdlib --vocab_size=2048 --output=TOKENIZER
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxlm.data.sources import Bad, read_documents
from jaxlm.exits import with_status
from jaxlm.flags import parse
from jaxlm.tokenizers import TRAINERS, train_tokenizer

_KIND = flags.DEFINE_enum(
    "kind", "byte_bpe", sorted(TRAINERS), "unigram and bpe are SentencePiece's"
)
_SOURCES = flags.DEFINE_list(
    "sources", None, "'stdlib', files, folders or globs, with commas", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "folder of the tokenizer to make", required=True)
_VOCAB = flags.DEFINE_integer("vocab_size", 0, "all ids, reserved ones included", 0)
_SENTINELS = flags.DEFINE_integer("num_sentinels", 100, "reserved sentinel ids", 0)
_MAX_BYTES = flags.DEFINE_integer("max_bytes", 1 << 28, "text that is read to learn from", 1)
_FIELD = flags.DEFINE_string("text_field", "text", "the text's name in JSON lines and Parquet")


@with_status
def main(argv: list[str]) -> None:
    del argv
    bad = Counter[str]()

    def texts() -> Iterator[str]:
        for item in read_documents(_SOURCES.value, text_field=_FIELD.value):
            if isinstance(item, Bad):
                bad[item.reason] += item.count
            else:
                yield item.text

    tokenizer = train_tokenizer(
        _KIND.value, texts(), _VOCAB.value, _SENTINELS.value, _MAX_BYTES.value
    )
    tokenizer.save(_OUTPUT.value)
    print(f"{_OUTPUT.value}: {tokenizer.kind}, {tokenizer.vocab_size:,} ids")
    for reason, count in sorted(bad.items()):
        print(f"left out: {count:,} {reason}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
