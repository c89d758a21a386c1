"""Sound files of models and tokenizers, of a search index and of prompts, and their readers."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.faults.data_files import JSONL, TEXTS, Kind, write

PROBE = "A cat, 3.14!\n\t<extra_id_0> é世"


def make_safetensors(folder: Path, **options) -> Path:
    import numpy as np

    from jaxlm.interop import safetensors_io

    arrays = {"a.weight": np.ones((3, 4), np.float32), "b": np.arange(5, dtype=np.float16)}
    planned = [
        safetensors_io.Planned(name, x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()
    ]
    safetensors_io.write_folder(folder, planned, **options)
    return folder / (safetensors_io.INDEX if options else safetensors_io.SINGLE)


def read_safetensors(path: Path) -> int:
    from jaxlm.interop.safetensors_io import read_folder

    for tensor in read_folder(path.parent).values():
        assert tensor.read().shape == tensor.shape
    return 0


def make_model_folder(folder: Path, case: str = "gpt2") -> Path:
    from tests.interop.tiny_hf import write_recorded

    shutil.rmtree(folder)
    write_recorded(folder, case)
    return folder / "config.json"


def read_model(path: Path) -> int:
    from jaxlm.interop.convert import read_source

    read_source(str(path.parent))
    return 0


def make_msgpack(folder: Path) -> Path:
    import flax.serialization
    import numpy as np

    tree = {"a": {"kernel": np.ones((3, 4), np.float32), "bias": np.ones(4, np.float16)}}
    return write("flax_model.msgpack", flax.serialization.msgpack_serialize(tree))(folder)


def read_msgpack(path: Path) -> int:
    from jaxlm.interop.source import read_msgpack

    for tensor in read_msgpack(path).values():
        assert tensor.read().shape == tensor.shape
    return 0


@functools.cache
def trained(kind: str):
    from jaxlm.tokenizers import train_tokenizer

    return train_tokenizer(kind, TEXTS, 420, num_sentinels=10)


def make_sentencepiece(kind: str) -> Callable[[Path], Path]:
    return lambda folder: write("tokenizer.model", trained(kind).blob)(folder)


def make_tokenizer_json(folder: Path) -> Path:
    return write("tokenizer.json", trained("byte_bpe").blob)(folder)


def make_wordpiece_json(folder: Path) -> Path:
    from tests.tasks.tokens import wordpiece

    return write("tokenizer.json", wordpiece().blob)(folder)


def make_saved(folder: Path) -> Path:
    trained("unigram").save(folder)
    return folder / "jaxlm_tokenizer.json"


def make_settings(folder: Path) -> Path:
    make_tokenizer_json(folder)
    settings = {f"{role}_token": f"<{role}>" for role in ("bos", "eos", "pad")}
    return write("tokenizer_config.json", json.dumps(settings | {"extra_ids": 0}))(folder)


def make_slow_files(folder: Path) -> Path:
    blob = json.loads(trained("byte_bpe").blob)["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in blob["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    return write("vocab.json", json.dumps(blob["vocab"] | {"<|endoftext|>": 419}))(folder)


def read_tokenizer(path: Path) -> int:
    """Loaded as a run's own or a stranger's, and used."""
    from jaxlm.interop import tokenizer_files
    from jaxlm.tokenizers import is_saved, load_tokenizer

    folder = path.parent
    load = load_tokenizer if is_saved(folder) else tokenizer_files.read_tokenizer
    tokenizer = load(folder)
    for text in (PROBE, "", *TEXTS):
        ids, spans = tokenizer.encode_with_offsets(text)
        assert len(ids) == len(spans)
        tokenizer.decode(ids)
    tokenizer.decode(range(tokenizer.vocab_size))
    return 0


def make_index(folder: Path) -> Path:
    import numpy as np

    from jaxlm.inference.search import Index

    Index(np.eye(4, 3), list("abcd")).save(folder / "index.npz")
    return folder / "index.npz"


def read_index(path: Path) -> int:
    import numpy as np

    from jaxlm.inference.search import Index

    Index.load(path).search(np.ones((1, 3), np.float32), 2)
    return 0


def read_prompts(path: Path) -> int:
    from jaxlm.inputs import read_prompts

    read_prompts(path)
    return 0


MODEL_KINDS: dict[str, Callable[[], Kind]] = {
    "safetensors": lambda: Kind(make_safetensors, read_safetensors),
    "safetensors index": lambda: Kind(
        functools.partial(make_safetensors, max_shard_bytes=50), read_safetensors
    ),
    "config.json": lambda: Kind(make_model_folder, read_model),
    "config.json of experts": lambda: Kind(
        functools.partial(make_model_folder, case="mixtral"), read_model
    ),
    "msgpack": lambda: Kind(make_msgpack, read_msgpack),
    "SentencePiece unigram": lambda: Kind(make_sentencepiece("unigram"), read_tokenizer),
    "SentencePiece BPE": lambda: Kind(make_sentencepiece("bpe"), read_tokenizer),
    "tokenizer.json of BPE": lambda: Kind(make_tokenizer_json, read_tokenizer),
    "tokenizer.json of WordPiece": lambda: Kind(make_wordpiece_json, read_tokenizer),
    "vocab.txt": lambda: Kind(
        write("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\ncat\n##s\n.\n"), read_tokenizer
    ),
    "vocab.json": lambda: Kind(make_slow_files, read_tokenizer),
    "tokenizer_config.json": lambda: Kind(make_settings, read_tokenizer),
    "saved tokenizer": lambda: Kind(make_saved, read_tokenizer),
    "index.npz": lambda: Kind(make_index, read_index),
    "prompts.jsonl": lambda: Kind(
        write("p.jsonl", JSONL.replace('"label"', '"prompt"')), read_prompts
    ),
}
