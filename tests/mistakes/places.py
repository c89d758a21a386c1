"""What users have lying about: runs, texts, tables, among them some that are no good."""

from jaxlm import build, config_files, tuning
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.workdir import manifest
from tests import tiny

TINY = [f"--config.{name}={value}" for name, value in tiny.OVERRIDES.items()]
STORE = "--config.data.sources=('store',)"
PRETRAIN = ["--config=configs/gpt.py:tiny", *TINY, "--config.data.split=tail"]
GPT = [*PRETRAIN, STORE]
BERT = ["--config=configs/bert.py:tiny", *TINY, STORE]
ROWS = [(f"book a table for {n}", "food") for n in range(9)]
ROWS += [(f"fly to city {n}", "travel") for n in range(9)]


def tune(*arguments, train="my.csv"):
    """The flags of a tiny fine-tuning run."""
    return [
        f"--config=configs/finetune/classification.py:train={train},seq_len=32,batch_size=8",
        *arguments,
    ]


def make_places(folder):
    """W, a decoder's run; E, an encoder's; F, tuned from E; and files."""
    store = tiny.make_store(folder / "store")
    tiny.save_untrained(tiny.tiny_config("configs/gpt.py:tiny", store), folder / "W")
    tiny.save_untrained(tiny.tiny_config("configs/bert.py:tiny", store), folder / "E")
    (folder / "words.txt").write_text("to be or not to be\n" * 40)
    (folder / "empty.txt").touch()
    (folder / "short.txt").write_text("to be")
    (folder / "binary.txt").write_bytes(bytes(range(128, 256)) * 40)
    (folder / "my.csv").write_text(
        "text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)
    )
    (folder / "unlabelled.csv").write_text("text\n" + "".join(f"{text}\n" for text, _ in ROWS))
    save_tuned(folder)


def save_tuned(folder):
    """F with a checkpoint of step 0, as `finetune` writes it."""
    spec = f"configs/finetune/classification.py:train={folder / 'my.csv'},seq_len=32,batch_size=8"
    config = config_files.read_config(spec, {"init_from": str(folder / "E")})
    prepared = tuning.prepare(config, folder / "F")
    run = tuning.make_run(prepared, folder / "F")
    build.write_config(prepared.config, folder / "F/config.json")
    store = Checkpoints(folder / "F")
    store.save(0, tuning.initial_state(run, prepared.source), manifest(run, 0), None)
    store.wait()
    store.close()
