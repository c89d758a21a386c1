"""Damage to token stores, and kills while one is made: nothing that is read is silently wrong, nothing is left half-made."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from jaxlm import build
from jaxlm.data.pipeline import TrainBatches
from jaxlm.data.prepare import prepare
from jaxlm.data.store_check import problems
from jaxlm.data.token_store import TokenStore
from jaxlm.exits import DAMAGED, Damaged
from jaxlm.objectives import OBJECTIVES
from jaxlm.tokenizers import load_tokenizer, train_tokenizer
from tests import tiny
from tests.fixtures.make import as_schema_1

REFUSALS = (Damaged, ValueError, FileNotFoundError)


def texts(count):
    words = "the a cat sat on mat ، 你好 世界 مرحبا and then it was so".split()
    draw = random.Random(0)
    return [f"{i}: {' '.join(draw.choices(words, k=12))}. Yes.\n" for i in range(count)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "web.jsonl"
    lines = [json.dumps({"text": text}) for text in texts(6000)]
    file.write_text("\n".join([*lines, '{"text": ']))
    return file


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("unigram", texts(300), 420)


@pytest.fixture
def store(source, tokenizer, tmp_path):
    """Of several shards, each of several blocks, with every kind of file that a store has."""
    options = dict(validation_fraction=0.1, num_workers=0, shard_tokens=60_000, progress=False)
    prepare(str(source), tokenizer, tmp_path / "store", **options)
    return tmp_path / "store"


def read(path):
    """All that training reads of a store, through what training reads it with."""
    tokenizer = load_tokenizer(path / "tokenizer")
    found = {"tokenizer": tokenizer.sha256, "ids": tokenizer.encode(texts(1)[0]).tolist()}
    for split in ("train", "validation"):
        store = TokenStore(path, split)
        found[split] = [
            (store.manifest, store.fingerprint, store.num_bytes),
            store.tokens(0, store.num_tokens).tobytes(),
            [store.document_span(i) for i in range(0, store.num_documents, 50)],
            [store.document_of(i) for i in range(0, store.num_tokens, 997)],
            store.document_starts().tobytes(),
        ]
        for name in ("mlm_sop", "causal"):
            objective = OBJECTIVES[name](tokenizer=tokenizer)
            batches = TrainBatches({"web": store}, {"web": 1.0}, objective, 256, 8, seed=1)
            found[split] += [{k: v.tobytes() for k, v in batches[n].items()} for n in range(10)]
    return found


def flip(path, seed):
    """Flips one bit of one file below `path`; gives the file and what undoes it. Small files are as likely as large ones."""
    draw = random.Random(seed)
    file = draw.choice(sorted(file for file in path.rglob("*") if file.is_file()))
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    file.write_bytes(changed)
    return file, lambda: file.write_bytes(whole)


def flip_bit(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def check_no_flip_is_silent(path, seeds):
    """Whatever bit is flipped: what is read is refused, or is bit for bit what was written.

    Returns how many flips were refused, and how many changed nothing that is read.
    """
    expected, refused = read(path), 0
    for seed in seeds:
        file, undo = flip(path, seed)
        try:
            assert read(path) == expected, f"seed {seed}: {file} was read as if nothing were"
        except REFUSALS as error:
            assert str(path) in str(error), f"seed {seed}: {file}: no path in {error}"
            refused += 1
        undo()
    assert read(path) == expected
    return refused, len(seeds) - refused


def says_the_same(one, other):
    """Whether both are the same JSON: of spaces another one may have come."""
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def check_every_flip_is_named(path, seeds):
    """`problems` names the file in which a bit is flipped, whether it is read or not; of the manifest, if it says otherwise."""
    for seed in seeds:
        file, undo = flip(path, seed)
        said, changed = "\n".join(problems(path)), file.read_bytes()
        undo()
        if file.name != "manifest.json" or not says_the_same(changed, file.read_bytes()):
            assert file.name in said, f"seed {seed}: {file} is not among the problems: {said}"
    assert problems(path) == []


SEEDS = pytest.mark.parametrize(
    "seeds",
    [range(60), pytest.param(range(60, 660), marks=pytest.mark.slow)],
    ids=["60", "600"],
)


@SEEDS
def test_no_flipped_bit_of_a_store_is_silently_wrong(store, seeds):
    refused, harmless = check_no_flip_is_silent(store, seeds)
    print(f"{len(seeds)} flips: {refused} refused, {harmless} changed nothing that is read")
    assert refused > len(seeds) / 2


@SEEDS
def test_every_flipped_bit_of_a_store_is_found_by_reading_it_whole(store, seeds):
    check_every_flip_is_named(store, seeds)


def test_the_laws_of_flips_fail_for_a_store_without_sums_of_blocks(store):
    as_schema_1(store)
    with pytest.raises(AssertionError, match="was read as if nothing were"):
        check_no_flip_is_silent(store, range(60))
    with pytest.raises(AssertionError, match="quarantine.jsonl is not among the problems"):
        check_every_flip_is_named(store, range(60))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_that_training_reads_ends_it_with_its_status_and_no_traceback(num_workers, tmp_path):
    store = tiny.make_store(tmp_path / "store")
    flip_bit(store / "train-00000.tokens.npy", 500)
    config = tiny.tiny_config("configs/gpt.py:tiny", store, data__num_workers=num_workers)
    build.write_config(config, tmp_path / "config.json")
    ended = tiny.run(tiny.pretrain_command(tmp_path / "config.json", tmp_path / "run"), check=False)
    assert ended.returncode == DAMAGED, ended.stderr[-2000:]
    assert "train-00000.tokens.npy: bytes 0 to" in ended.stderr
    assert "Traceback" not in ended.stderr


# ---------------------------------------------------------------- kills


def prepare_command(source, tokenizer_folder, output):
    return [
        sys.executable,
        "tools/prepare_data.py",
        f"--sources={source}",
        f"--tokenizer={tokenizer_folder}",
        f"--output={output}",
        "--shard_tokens=60000",
        "--num_workers=1",
    ]


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check_whole_or_not_there(output):
    assert not output.exists() or problems(output) == []


def check_killed_preparation(command, output, seconds, resume):
    """Killed after so many seconds: no store is there, or a whole one; the same command then makes the unbroken one's bytes,
    and nothing else is left."""
    child = subprocess.Popen(
        command, cwd=tiny.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.wait()
    check_whole_or_not_there(output)
    resume(command)
    assert problems(output) == []
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name]


def run(command):
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def unbroken(source, tokenizer, tmp_path_factory):
    """(the store, seconds that it took from the start of the process)"""
    folder = tmp_path_factory.mktemp("unbroken")
    tokenizer.save(folder / "tokenizer")
    start = time.monotonic()
    run(prepare_command(source, folder / "tokenizer", folder / "store"))
    return folder / "store", time.monotonic() - start


@pytest.mark.parametrize(
    "seed",
    [
        *range(5),
        pytest.param(5, marks=[pytest.mark.slow, pytest.mark.smoke]),
        *(pytest.param(n, marks=pytest.mark.slow) for n in range(6, 50)),
    ],
)
def test_a_preparation_killed_at_any_time_leaves_nothing_half_made(
    seed, source, unbroken, tmp_path
):
    whole, seconds = unbroken
    output = tmp_path / "out" / "store"
    output.parent.mkdir()
    after = random.Random(seed).uniform(0.3, 1.0) * seconds
    command = prepare_command(source, whole.parent / "tokenizer", output)
    check_killed_preparation(command, output, after, run)
    assert files_of(output) == files_of(whole), f"killed after {after:.2f} s"


def test_the_law_of_kills_fails_for_a_store_that_is_written_in_its_place(
    source, unbroken, tmp_path
):
    """One that lacks a file already has its name."""
    whole, _ = unbroken
    output = tmp_path / "store"
    output.mkdir()
    for name, data in files_of(whole).items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_bytes(data)
    check_whole_or_not_there(output)
    os.unlink(output / "train-00001.tokens.npy")
    with pytest.raises(AssertionError):
        check_whole_or_not_there(output)
