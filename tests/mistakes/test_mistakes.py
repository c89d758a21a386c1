"""The commonest mistakes, as users type them: one message that says what was found and what to do, without a traceback."""

import json
import subprocess
import sys

import pytest

from jaxlm.identity import OtherRun
from jaxlm.workdir import accept_config
from tests import tiny
from tests.mistakes.places import BERT, GPT, PRETRAIN, make_places, tune

START, TUNE = "jaxlm.pretrain", "jaxlm.finetune"
WRITE, EVALUATE = "jaxlm.generate", "jaxlm.evaluate"

# What was done wrong -> the program, its arguments, and what the message says of it, in this order.
MISTAKES = {
    "a path of text that is not there": (
        START,
        [*PRETRAIN, "--config.data.sources=('word.txt',)", "--workdir=N"],
        [
            "no text was found",
            "word.txt: no such file",
            "did you mean words.txt?",
            "expected 'stdlib'",
        ],
    ),
    "a path of a checkpoint that is not there": (
        WRITE,
        ["--checkpoint=WW", "--prompt=a"],
        [
            "no checkpoint in WW: there is no such folder; did you mean W?",
            "expected a run's workdir",
        ],
    ),
    "a step that was not saved": (
        WRITE,
        ["--checkpoint=W@7", "--prompt=a"],
        ["no checkpoint of step 7 in W: found steps [0]"],
    ),
    "a workdir that is a file": (
        START,
        [*GPT, "--workdir=words.txt/W"],
        ["found: words.txt is a file", "expected: --workdir=FOLDER"],
    ),
    "a config file that is not there": (
        START,
        ["--config=configs/gtp.py:tiny", "--workdir=N"],
        [
            "no config file 'configs/gtp.py'; did you mean",
            "configs/gpt.py?",
            "expected configs/NAME.py:VARIANT",
        ],
    ),
    "a field that is misspelt": (
        START,
        [*GPT, "--config.optimizer.learning_rat=1e-3", "--workdir=N"],
        [
            "--config.optimizer.learning_rat: the config has no such field",
            "mean optimizer.learning_rate?",
        ],
    ),
    "a field of another group, and one more mistake": (
        START,
        [*GPT, "--config.learning_rate=1e-3", "--config.batchsize=8", "--workdir=N"],
        ["did you mean optimizer.learning_rate?", "--config.batchsize", "did you mean batch_size?"],
    ),
    "a variant that is misspelt": (
        START,
        ["--config=configs/gpt.py:tinny", "--workdir=N"],
        ["unknown variant 'tinny' (did you mean tiny?); known: tiny,"],
    ),
    "a choice that is misspelt": (
        START,
        ["--config=configs/gpt.py:tiny,optimzer=lion,schedule=cosin", "--workdir=N"],
        [
            "unknown 'optimzer=lion' (did you mean optimizer?)",
            "expected one of constant",
            "mean cosine?",
        ],
    ),
    "a value of the wrong type": (
        START,
        [*GPT, "--config.batch_size=eight", "--workdir=N"],
        ["--config.batch_size=eight: expected a whole number, as 8 is"],
    ),
    "a learning rate that is no number": (
        START,
        [*GPT, "--config.optimizer.learning_rate=nan", "--workdir=N"],
        ["--config.optimizer.learning_rate=nan: expected a finite number, as 0.03 is"],
    ),
    "values out of their ranges": (
        START,
        [*GPT, "--config.batch_size=0", "--config.dtype=fp16", "--workdir=N"],
        ["this config cannot run", "batch_size 0: set", "to 1 or more", "dtype 'fp16'", "bfloat16"],
    ),
    "a flag that is misspelt": (
        START,
        [*GPT, "--workdri=N"],
        ["Unknown command line flag 'workdri'. Did you mean: workdir ?"],
    ),
    "no workdir": (START, GPT, ["missing: --workdir=FOLDER"]),
    "brackets that the shell has taken apart": (
        START,
        [*PRETRAIN, "--config.data.sources=('a.txt',)", "'b.txt')", "--workdir=N"],
        ["'b.txt'): no flags; expected --name=value, in quotes"],
    ),
    "a workdir of another config": (
        START,
        [*GPT, "--config.model.emb_dim=32", "--workdir=W"],
        [
            "W holds another run",
            "model.emb_dim: 16 -> 32",
            "another --workdir",
            "--allow_config_change",
        ],
    ),
    "a vocabulary smaller than the tokenizer's": (
        START,
        [*GPT, "--config.model.vocab_size=200", "--workdir=N"],
        [
            "model.vocab_size 200 is smaller than the tokenizer's 263 ids",
            "--config.model.vocab_size=263",
        ],
    ),
    "another tokenizer than the run has that training starts from": (
        START,
        [
            *PRETRAIN,
            "--config.data.sources=('words.txt',)",
            "--config.tokenizer.kind=chars",
            "--config.init_from=W",
            "--workdir=N",
        ],
        [
            "init_from=W does not fit",
            "its tokenizer is another",
            "--config.tokenizer.path=",
            "W/tokenizer",
        ],
    ),
    "another size than the run has that training starts from": (
        START,
        [*GPT, "--config.model.emb_dim=32", "--config.init_from=W", "--workdir=N"],
        [
            "init_from=W does not fit",
            "model.emb_dim is 16 there and 32 here: set --config.model.emb_dim=16",
        ],
    ),
    "a fine-tuned run to pretrain from": (
        START,
        [*BERT, "--config.init_from=F", "--workdir=N"],
        [
            "init_from=F does not fit",
            "a head for sequence_classification: name what it was tuned from",
        ],
    ),
    "text that is empty": (
        START,
        [*PRETRAIN, "--config.data.sources=('empty.txt',)", "--workdir=N"],
        ["1 of 1 documents cannot be used", "empty.txt: empty_file", "repair or remove"],
    ),
    "text that is shorter than a row": (
        START,
        [*PRETRAIN, "--config.data.sources=('short.txt',)", "--workdir=N"],
        ["data.sources: short has", "tokens to train on, and a row takes 32: give more text"],
    ),
    "text that is none": (
        START,
        [*PRETRAIN, "--config.data.sources=('binary.txt',)", "--workdir=N"],
        ["binary.txt: invalid_utf8", "repair or remove"],
    ),
    "a file of labels that is not there": (
        TUNE,
        tune("--config.init_from=E", "--workdir=N", train="mine.csv"),
        ["found: nothing at mine.csv", "did you mean my.csv?"],
    ),
    "a column of labels that is missing": (
        TUNE,
        tune("--config.init_from=E", "--workdir=N", train="unlabelled.csv"),
        ["unlabelled.csv", "label: no column is it", "'text'", "--config.data.label_column=NAME"],
    ),
    "rows longer than the model's positions": (
        START,
        [*BERT, "--config.seq_len=128", "--workdir=N"],
        ["seq_len 128 is longer than model.max_len 64", "set --config.seq_len"],
    ),
    "rows longer than the tuned model's positions": (
        TUNE,
        tune("--config.seq_len=128", "--config.init_from=E", "--workdir=N"),
        ["seq_len 128: the model has 64 positions; set --config.seq_len"],
    ),
    "a mesh that the devices do not make": (
        START,
        [*GPT, "--config.mesh.tensor=3", "--workdir=N"],
        ["does not cover", "devices (cpu)", "--config.mesh.AXIS"],
    ),
    "a model that no memory here holds": (
        START,
        [*GPT, "--config.model.num_layers=1000000", "--config.model.mlp_dim=65536", "--workdir=N"],
        ["this run does not fit", "GiB of each device", "--config.mesh.fsdp=N", "jaxlm-tool plan"],
    ),
    "the other entrypoint": (
        START,
        [*tune(), "--workdir=N"],
        ["this config is for python -m jaxlm.finetune, and this is jaxlm.pretrain"],
    ),
    "nothing to start fine-tuning from": (
        TUNE,
        tune("--workdir=N"),
        ["init_from is empty: set --config.init_from to a pretrained run's workdir or to hf:"],
    ),
    "a model of the hub without network": (
        WRITE,
        ["--checkpoint=hf:gpt2", "--prompt=a"],
        [
            "hf:gpt2: no such folder here, and the hub does not give it",
            "give its folder, hf:FOLDER",
        ],
    ),
    "an extra that is not installed": (
        WRITE,
        ["--checkpoint=hf:gpt2", "--prompt=a"],
        ["an id of the hub needs: pip install 'jaxlm[hf]'"],
    ),
    "an encoder that shall write": (
        WRITE,
        ["--checkpoint=E", "--task=generate", "--prompt=a"],
        ["E is an encoder: it fills masks, and does not continue texts"],
    ),
    "a decoder that shall fill masks": (
        WRITE,
        ["--checkpoint=W", "--task=fill_mask", "--prompt=a [MASK]"],
        ["W is a decoder: it continues texts, and fills no masks"],
    ),
    "no prompt": (WRITE, ["--checkpoint=W"], ["give --prompt or --prompts_file"]),
    "text to evaluate that is not there": (
        EVALUATE,
        ["--checkpoint=W", "--data=word.txt"],
        ["word.txt: no such file", "did you mean words.txt?"],
    ),
}
WITHOUT = {"an extra that is not installed": "huggingface_hub"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    make_places(folder)
    return folder


@pytest.fixture(scope="module")
def ends(folder):
    """What became of each call; each has a new workdir for its N."""
    calls = []
    for number, (name, (module, arguments, _)) in enumerate(MISTAKES.items()):
        own = [f"--workdir=N{number}" if word == "--workdir=N" else word for word in arguments]
        calls.append({"module": module, "arguments": own, "without": WITHOUT.get(name, "")})
    done = child("-m", "tests.mistakes.many", folder=folder, stdin=json.dumps(calls))
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(MISTAKES, json.loads(done.stdout), strict=True))


def child(*arguments, folder, stdin="", **variables):
    command = [sys.executable, *arguments]
    environment = tiny.environment() | variables
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )


def check_message(status, said, fragments):
    """One message has all of it, in its order; no traceback, and the status of an error."""
    assert status == 1, said
    assert "Traceback" not in said and "FATAL" not in said, said
    at = 0
    for fragment in fragments:
        assert fragment in said[at:], f"{fragment!r} is not in {said[at:]!r}"
        at = said.index(fragment, at)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_that_says_what_to_do(mistake, ends):
    check_message(**ends[mistake], fragments=MISTAKES[mistake][2])


def test_the_law_fails_for_a_traceback_and_for_a_message_that_says_too_little():
    with pytest.raises(AssertionError):
        check_message(1, "Traceback (most recent call last):\nValueError: no x", ["no x"])
    with pytest.raises(AssertionError):
        check_message(1, "no x", ["no x", "did you mean y?"])


def test_a_workdir_takes_another_config_until_it_has_a_checkpoint(folder, tmp_path):
    config = lambda **changes: tiny.tiny_config("configs/gpt.py:tiny", folder / "store", **changes)
    accept_config(config(batch_size=0), tmp_path, allow_change=False)
    accept_config(config(batch_size=8), tmp_path, allow_change=False)
    (tmp_path / "checkpoints/5").mkdir(parents=True)
    with pytest.raises(OtherRun, match="batch_size: 0 -> 8"):
        accept_config(config(batch_size=8), tmp_path, allow_change=False)


def test_a_fault_of_the_program_keeps_its_traceback_and_so_does_everything_where_asked(folder):
    call = "from jaxlm import config_files, exits\nexits.with_status(lambda: {})()"
    wrong, fault = call.format("config_files.find_recipe('c.py')"), call.format("int('a fault')")
    said = child("-c", wrong, folder=folder)
    check_message(said.returncode, said.stderr, ["no config file 'c.py'"])
    for program, fragment in ((wrong, "no config file 'c.py'"), (fault, "'a fault'")):
        found = child("-c", program, folder=folder, JAXLM_TRACEBACK="1" if program == wrong else "")
        assert found.returncode == 1 and "Traceback" in found.stderr and fragment in found.stderr


@pytest.mark.parametrize("platform", ["tpu", pytest.param("cuda", marks=pytest.mark.slow)])
def test_a_device_that_is_not_there_is_named_with_what_to_install(platform, folder):
    done = child("-m", START, *GPT, "--workdir=D", folder=folder, JAX_PLATFORMS=platform)
    asked = f"jax finds no device, with JAX_PLATFORMS='{platform}'"
    check_message(done.returncode, done.stderr, [asked, "pip install 'jaxlm[tpu]'", "doctor"])


@pytest.mark.slow
@pytest.mark.smoke
def test_a_workdir_takes_the_mended_command(folder):
    """The first start failed by its config, before there was anything to lose."""
    steps = ["--config.num_train_steps=2", "--config.checkpoint_every_steps=2"]
    command = ["-m", START, *GPT, *steps, "--workdir=mended"]
    wrong = child(*command, "--config.batch_size=0", folder=folder)
    check_message(wrong.returncode, wrong.stderr, ["batch_size 0"])
    right = child(*command, folder=folder)
    assert right.returncode == 0, right.stderr
    assert "batch_size: 0 -> 8" in right.stderr and (folder / "mended/checkpoints/2").is_dir()


@pytest.mark.slow
@pytest.mark.smoke
def test_memory_that_runs_out_in_a_step_says_how_to_take_less(folder):
    """Scores of rows of 200,000 tokens take 7 TB, and the compiler's program asks for them."""
    (folder / "long.txt").write_text("to be or not to be, that is the question\n" * 10_000)
    flags = ["--config.data.sources=('long.txt',)", "--config.seq_len=200000", "--workdir=L"]
    done = child("-m", START, *PRETRAIN, *flags, folder=folder)
    asked = [
        "out of memory: RESOURCE_EXHAUSTED",
        "--config.batch_size",
        "--config.mesh.fsdp",
        "jaxlm-tool plan",
    ]
    check_message(done.returncode, done.stderr, asked)
