"""How each command of the pages is run small: what stands for the reader's things, which flags shrink it, what is there before.

A command is found here by the longest beginning that it shares with a key. What only begins with flags is joined to the
command of BASES first, so it is found by that.
"""

import re
import shlex
from typing import NamedTuple, TypeVar

Value = TypeVar("Value")

PRETRAIN = "python -m jaxlm.pretrain --config=configs/gpt.py:tiny --workdir=W "
FINETUNE = "python -m jaxlm.finetune --config=configs/finetune/classification.py{} --config.init_from=W --workdir=F "
CLASSIFY = FINETUNE.format(":train=my.csv")
TRANSLATE = (
    "python -m jaxlm.finetune --config=configs/finetune/translation.py:train=a.en+a.de,dev=b.en+b.de "
    "--config.init_from=W --workdir=T "
)
MASKED = "python -m jaxlm.pretrain --config=configs/bert.py:tiny --workdir=W "
GENERATE = "python -m jaxlm.generate --checkpoint=W "

# Flags alone belong to one of these commands: at its end, or where it has {}.
BASES = {
    "… ": PRETRAIN,
    "… --config.init_from": "python -m jaxlm.pretrain --config=configs/gpt.py:tiny --workdir=W2 ",
    "…:train=": FINETUNE,
    "--allow_host": "python tools/demo.py --checkpoint=W --host=0.0.0.0 ",
    "--checkpoint=": "python -m jaxlm.generate --prompt=def ",
    "--config.": PRETRAIN,
    "--config.checkpoint.best_metric=bleu": TRANSLATE + "--config.eval.dev_texts=100 ",
    "--config.data.augment": CLASSIFY,
    "--config.eval.": TRANSLATE,
    "--config.objective.": PRETRAIN,
    "--config.objective.max_ngram": MASKED,
    "--config.objective.rate": MASKED,
    "--config.objective.whole_word": MASKED,
    "--config.patience": CLASSIFY,
    "--config.tuning.": CLASSIFY,
    "--config=": "python -m jaxlm.pretrain --workdir=W2 ",
    "--coordinator": PRETRAIN,
    "--diff": "python tools/inspect_checkpoint.py ",
    "--host": "python tools/demo.py --checkpoint=W --allow_host=NAME ",
    "--num_processes": PRETRAIN,
    "--ours": "python tools/baselines.py --work=B --datasets=clinc150 --sides=ours --seeds=0 ",
    "--profile_steps": PRETRAIN,
    "--prompt": GENERATE,
    "--search": "python tools/plan.py --config=configs/gpt.py:tiny --topology=v5e-1 --output=P ",
    "--task": GENERATE,
    "--text": "bash tools/quickstart.sh ",
    "--workdir=": "python -m jaxlm.pretrain --config=configs/gpt.py:tiny ",
}

# What a page leaves to the reader, and what the reader has here. Longer ones go first.
STANDS_FOR = {
    "hf:DIR_OR_HUB_ID[@REVISION]": "hf:hub/decoder",
    "hf:google/flan-t5-small": "hf:hub/encoder_decoder",
    "hf:sentence-transformers/all-MiniLM-L6-v2": "hf:hub/encoder",
    "DIR_OR_HUB_ID": "hub/decoder",
    "WORKDIR_OR_STORE": "W",
    "FILE_OR_DIR": "text",
    "jaxlm.NAME": "jaxlm.pretrain --config=configs/gpt.py:tiny --workdir=W",
    "tools/NAME.py": "tools/fsck.py W",
    "W@1000": "W@12",
    "W@STEP": "W@12",
    "gs://BUCKET/": "runs/",
    "gs://bucket/": "runs/",
    "--checkpoint=…": "--checkpoint=W",
    "--config=… --workdir=S": "--config=configs/finetune/classification.py:train=my.csv --workdir=S",
    "--config=…": "--config=configs/gpt.py:tiny",
    "--query='…'": "--query='a text'",
    "--config=FILE.py": "--config=configs/gpt.py",
    "--num_processes=N": "--num_processes=2",
    "--process_id=I": "--process_id=0",
    "--search=N": "--search=2",
    "HOST:PORT": "localhost:8476",
    "=FILE": "=text/1.txt",
}


class Run(NamedTuple):
    """A command that is run.

    add: flags that it does not have and gets, so that it is small. put: parts of it that are replaced, for the same.
    after: what stands before the added flags. has: what a name of it is, where that is not NAMES'. devices: simulated
    ones. serves: whether it is a server, which is ended once it answers. lane: the marker of its test.
    reads: whether its flags can be read without running it.
    """

    add: dict[str, object] = {}
    put: dict[str, str] = {}
    after: str = ""
    has: dict[str, str] = {}
    devices: int = 1
    serves: bool = False
    lane: str = "slow"
    reads: bool = True


class Read(NamedTuple):
    """A command that is not run here, and why; its flags and its config are read as it would read them."""

    why: str


class Shell(NamedTuple):
    """A command for another machine or of another program, and why; bash parses it, and ours within it is read.

    devices: of that machine; the config within must fit them.
    """

    why: str
    devices: int = 0


# The reader's folders by their names: keys of MADE.
NAMES = {
    **dict.fromkeys(("W", "W1", "W2", "W3", "A", "B", "runs/quickstart"), "decoder"),
    "F": "classifier",
    "T": "tokenizer",
    "S": "sweep",
    "hub/decoder": "hub/decoder",
    "hub/encoder": "hub/encoder",
    "hub/encoder_decoder": "hub/encoder_decoder",
}


class Made(NamedTuple):
    """A folder that a command of the pages leaves: the command, the folder's name there, what it needs under another name."""

    command: str
    folder: str
    has: dict[str, str] = {}


EXPORT = "python tools/convert_checkpoint.py to_hf --source W --target DIR"
MADE = {
    "decoder": Made(PRETRAIN, "W"),
    "encoder": Made("python -m jaxlm.pretrain --config=configs/bert.py:tiny --workdir=W", "W"),
    "encoder_decoder": Made(
        "python -m jaxlm.pretrain --config=configs/t5.py:v1_1_small --workdir=W", "W"
    ),
    "hub/decoder": Made(EXPORT, "DIR"),
    "hub/encoder": Made(EXPORT, "DIR", {"W": "encoder"}),
    "hub/encoder_decoder": Made(EXPORT, "DIR", {"W": "encoder_decoder"}),
    "classifier": Made(CLASSIFY, "F"),
    "dialogue": Made(
        "python -m jaxlm.finetune --config=configs/finetune/instructions.py:train=chats.jsonl "
        "--config.init_from=W --workdir=F",
        "F",
    ),
    "translator": Made(TRANSLATE, "T"),
    "embedder": Made(
        "python -m jaxlm.finetune --config=configs/finetune/embedding.py:train=similar.jsonl "
        "--config.init_from=W --workdir=F",
        "F",
        {"W": "encoder"},
    ),
    "tokenizer": Made(
        "python tools/train_tokenizer.py --kind=unigram --sources='text/*.txt' --vocab_size=8000 --output=T",
        "T",
    ),
    "sweep": Made(
        "python tools/sweep.py --entrypoint=jaxlm.finetune --config=configs/finetune/demo.py:package --workdir=S "
        "--grid init=params,random -- --config.init_from=runs/quickstart",
        "S",
    ),
}

LITTLE_TRAINING = {
    "config.batch_size": 8,
    "config.seq_len": 32,
    "config.num_train_steps": 12,
    "config.log_every_steps": 4,
    "config.eval_every_steps": 6,
    "config.checkpoint_every_steps": 5,
    "config.optimizer.schedule.warmup_steps": 2,
    "config.eval.batch_size": 8,
    "config.eval.num_batches": 2,
    "config.eval.sample_tokens": 4,
    "config.model.num_layers": 2,
    "config.log.tensorboard": False,
    "config.log.progress": False,
}
LITTLE_TEXT = LITTLE_TRAINING | {
    "config.data.sources": "('text/*.txt',)",
    "config.data.split": "tail",
    "config.tokenizer.vocab_size": 640,
    "config.model.vocab_size": 640,
}
LITTLE_MODEL = LITTLE_TEXT | {"config.model.emb_dim": 16, "config.model.mlp_dim": 32}
LITTLE_TUNING = {
    "config.batch_size": 8,
    "config.seq_len": 64,
    "config.dropout_rate": 0.0,
    "config.data.dev_fraction": 0.25,
    "config.eval.batch_size": 8,
    "config.log_every_steps": 1,
    "config.log.tensorboard": False,
    "config.log.progress": False,
}
LITTLE_WRITING = LITTLE_TUNING | {"config.task.target_len": 9}
LITTLE_PLAN = LITTLE_TRAINING | {  # that 64 chips can share
    "config.batch_size": 64,
    "config.eval.batch_size": 64,
    "config.model.emb_dim": 64,
    "config.model.mlp_dim": 128,
}
# Widths stay: transformers has no GPT-2 whose heads are not a part of its width.
LITTLE_BENCHMARK = LITTLE_TRAINING | {"steps": 2}

NEEDS_ACCELERATOR = "a cluster or a cloud is needed"
TRAINED_THERE = "tests/configs/test_networks.py and tests/objectives/test_learning.py train it"
INSTALLS = "it installs; extras and requirements are read"

HOW: dict[str, Run | Read | Shell] = {
    # entrypoints
    "python -m jaxlm.pretrain ": Run(LITTLE_MODEL),
    "python -m jaxlm.pretrain --config=configs/gpt.py:tiny,objective": Read(TRAINED_THERE),
    "python -m jaxlm.pretrain --config=configs/bert.py": Run(LITTLE_TEXT),
    "python -m jaxlm.pretrain --config=configs/bert.py:tiny,objective": Read(TRAINED_THERE),
    "python -m jaxlm.pretrain --config=configs/electra.py:tiny": Read(TRAINED_THERE),
    "python -m jaxlm.pretrain --config=configs/xlnet.py:tiny": Read(TRAINED_THERE),
    "python -m jaxlm.pretrain --config=configs/t5.py:tiny": Read(TRAINED_THERE),
    "python -m jaxlm.pretrain --config=configs/bart.py:tiny": Read(TRAINED_THERE),
    PRETRAIN + "--coordinator": Read("it waits for other processes: tests/parallel/test_processes.py"),
    PRETRAIN + "--num_processes": Read("it waits for other processes: tests/parallel/test_processes.py"),
    PRETRAIN + "--config.mesh": Run(LITTLE_MODEL, devices=8),
    PRETRAIN + "--config.mesh.fsdp=8 --config.mesh.tensor=4": Run(LITTLE_MODEL, put={"=8": "=4", "=4": "=2"}, devices=8),
    PRETRAIN + "--config.mesh.stage=4": Run(LITTLE_MODEL | {"config.model.num_layers": 4}, devices=8),
    PRETRAIN + "--profile_steps": Run(LITTLE_MODEL, put={"10:15": "5:7"}),
    "python -m jaxlm.pretrain --config=configs/gpt.py:nanogpt": Run(LITTLE_TRAINING),
    "python -m jaxlm.pretrain --config=configs/gpt.py:shakespeare": Run(LITTLE_TRAINING),
    "python -m jaxlm.pretrain --config=W/config.json": Run(),
    "python -m jaxlm.pretrain --workdir=W2 --config=W/config.json": Run(),
    "python -m jaxlm.pretrain --config=… --workdir=gs://BUCKET/run --num_processes=N": Read(NEEDS_ACCELERATOR),
    "python -m jaxlm.NAME": Read("it stands for several"),
    "python -m jaxlm.finetune ": Run(LITTLE_TUNING),
    CLASSIFY + "--config.tuning.frozen_layers": Run(LITTLE_TUNING, put={"layers=4": "layers=1"}),
    "python -m jaxlm.finetune --config=configs/finetune/instructions.py": Run(LITTLE_WRITING),
    "python -m jaxlm.finetune --config=configs/finetune/preferences.py": Run(LITTLE_WRITING, has={"F": "dialogue"}),
    "python -m jaxlm.finetune --config=configs/finetune/translation.py": Run(LITTLE_WRITING),
    "python -m jaxlm.finetune --config=configs/finetune/summarisation.py": Run(LITTLE_WRITING),
    "python -m jaxlm.evaluate ": Run(),
    "python -m jaxlm.evaluate --checkpoint=T": Run(has={"T": "translator"}),
    "python -m jaxlm.harness ": Run({"include_path": "lm_eval_tasks"}, put={"arc_easy": "tiny"}, lane="oracles", reads=False),
    "python -m jaxlm.generate ": Run({"max_new_tokens": 4}),
    "python -m jaxlm.generate --checkpoint=…": Run({"max_new_tokens": 4, "prompt": "def"}),
    GENERATE + "--task=fill_mask": Run(has={"W": "encoder"}),
    GENERATE + "--task=embed": Run(has={"W": "encoder"}),
    GENERATE + "--task=score": Run(),
    # tools
    "python tools/baseline": Read("it needs packages with data and a model: tests/tools/test_baselines.py"),
    "python tools/benchmark.py --config": Run(LITTLE_BENCHMARK, put={"steps=15": "steps=2", "steps=100": "steps=2"}, lane="oracles"),
    "python tools/benchmark.py --mode=checkpoints": Read("it takes minutes and a quiet machine: tests/tools/test_benchmark.py"),
    "python tools/benchmark.py --mode=cross_entropy": Read("it takes 6 GB: tests/tools/test_benchmark.py"),
    "python tools/benchmark.py --mode=decode": Run(LITTLE_BENCHMARK, lane="oracles"),
    "python tools/benchmark.py --mode=guards": Run(LITTLE_MODEL | {"steps": 2}),
    "python tools/compare_objectives.py ": Read("it pretrains and fine-tunes for hours: tests/tools/test_compare_objectives.py"),
    "python tools/compare_runs.py ": Run(),
    "python tools/convert_checkpoint.py ": Run(),
    "python tools/demo.py ": Run({"port": 0}, serves=True),
    "python tools/doctor.py ": Run(),
    "python tools/fsck.py ": Run(),
    "python tools/inspect_checkpoint.py ": Run(),
    "python tools/NAME.py": Read("it stands for several"),
    "python tools/look.py ": Run(),
    "python tools/parallel_text.py": Read("it needs a package registry: tests/tools/test_parallel_text.py"),
    "python tools/plan.py ": Run(LITTLE_PLAN, lane="plans"),
    "python tools/plan_table.py": Read("it compiles for hours: tests/plans/test_table.py"),
    "python tools/plot_run.py ": Run(),
    "python tools/prepare_data.py": Run({"sources": "text/*.txt", "tokenizer": "T", "output": "STORE"}, has={"T": "tokenizer"}),
    "python tools/report.py ": Run(),
    "python tools/search.py ": Run(has={"F": "embedder"}),
    "python tools/search.py --checkpoint=F --corpus=FILE --index=I.npz": Run({"query": "a text"}, has={"F": "embedder"}),
    "python tools/sweep.py ": Run(LITTLE_MODEL, put={"seed=0,1,2": "seed=0,1"}, after="--"),
    "python tools/sweep.py --entrypoint=jaxlm.finetune": Run(LITTLE_TUNING | {"config.init_from": "W"}, after="--"),
    "python tools/sweep.py --entrypoint=jaxlm.finetune --config=configs/finetune/demo.py:package": Run(
        LITTLE_TUNING, put={"demo.py:package": "classification.py:train=my.csv", "seed=0,1,2": "seed=0,1"},
    ),
    "python tools/train_tokenizer.py ": Run(put={"8000": "640"}),
    "python tools/train_tokenizer.py --kind=byte_bpe --sources=abstracts.jsonl": Run(put={"abstracts.jsonl": "train.jsonl", "4096": "640"}),
    # other programs
    "bash tools/quickstart.sh": Shell("tests/tools/test_quickstart.py runs it whole"),
    "bash tools/check.sh": Shell("it is what runs this test; tests/tools/test_shell_scripts.py"),
    "bash tools/first_hour.sh": Shell("it runs these tests"),
    "gcloud ": Shell(NEEDS_ACCELERATOR),
    "gcloud compute tpus tpu-vm ssh one": Shell(NEEDS_ACCELERATOR, devices=8),
    "gcloud compute tpus tpu-vm ssh pod": Shell(NEEDS_ACCELERATOR, devices=16),
    "xpk workload create --cluster=CLUSTER --workload=run1 --tpu-type=v5p-128 --num-slices=2": Shell(NEEDS_ACCELERATOR, devices=128),
    "mpirun --host node1:1,node2:1 -np 2": Shell(NEEDS_ACCELERATOR, devices=2),
    "srun ": Shell(NEEDS_ACCELERATOR, devices=32),
    "status=$?": Shell("the rest of a batch script"),
    "[ $status": Shell("the rest of a batch script"),
    "exit $status": Shell("the rest of a batch script"),
    "pip install ": Shell(INSTALLS),
    "sudo apt-get ": Shell(INSTALLS),
    "pip wheel ": Shell("tests/package builds and installs it"),
    "cd some/empty/folder": Shell("tests/package goes there"),
    "jaxlm-tool --help": Shell("tests/package runs it"),
    "git clone ": Shell("it needs a network"),
    "python3 -m venv ": Shell(INSTALLS),
    "python -c ": Shell("it looks at the machine"),
    "pytest ": Shell("it is a test"),
}  # fmt: skip


# What stands before a block of Python of the pages, by how it begins, and the folders that it names.
PYTHON: dict[str, tuple[str, dict[str, str]]] = {
    "from jaxlm import api": ("from jaxlm import api\nencoder = api.load('E')\n", {"W": "decoder", "E": "encoder"}),
    "from jaxlm import api, look": ("texts, labels = ['a b', 'y z'] * 8, ['a', 'y'] * 8\n", {"W": "decoder"}),
    "from jaxlm import tuning": ("", {"F": "dialogue"}),
    "from jaxlm.tuning import": ("", {"F": "classifier"}),
    "config.objective = dict(": ("from configs import t5\nconfig = t5.get_config('tiny,objective=mixture')\n", {}),
}  # fmt: skip


def longest(table: dict[str, Value], text: str) -> Value | None:
    """The value of the longest key that `text` begins with, or None."""
    keys = [key for key in table if text.startswith(key)]
    return table[max(keys, key=len)] if keys else None


def whole(text: str) -> str:
    """A command's text: a console script as the module that it is, flags alone with the command of BASES that they are for."""
    text = re.sub(r"^jaxlm-(pretrain|finetune|evaluate|generate) ", r"python -m jaxlm.\1 ", text)
    text = re.sub(r"^jaxlm-tool (\w+)", r"python tools/\1.py", text)
    base = longest(BASES, text)
    if base is None:
        return text
    flags = text.removeprefix("…").lstrip()
    return base.format(flags) if "{}" in base else base + flags


def stood_for(text: str) -> str:
    """The text with what it leaves to the reader put in."""
    for name in sorted(STANDS_FOR, key=len, reverse=True):
        text = text.replace(name, STANDS_FOR[name])
    return text


def small(text: str, how: Run) -> str:
    """A whole command's text as it is run."""
    words = shlex.split(text)
    for old, new in how.put.items():
        text = text.replace(old, new)
    given = {word.removeprefix("--").split("=")[0] for word in words if word.startswith("--")}
    added = [
        shlex.quote(f"--{name}={value}") for name, value in how.add.items() if name not in given
    ]
    after = [how.after] if how.after and how.after not in words else []
    return " ".join([text, *after, *added]) if added else text
