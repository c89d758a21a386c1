"""Laws of preparation: nothing lost, nothing doubled, the same bytes whatever the workers and interruptions."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data import prepare as preparation
from jaxlm.data import runs, store_writer, workers
from jaxlm.data.prepare import prepare
from jaxlm.data.store_check import problems
from jaxlm.data.token_store import TokenStore
from jaxlm.tokenizers import make_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = make_tokenizer("bytes", num_sentinels=0)
OPTIONS = dict(validation_fraction=0.1, piece_bytes=10_000, shard_tokens=20_000, progress=False)
WORDS = "the a cat sat on mat ، 你好 世界 مرحبا and then it was so".split()


def make_texts(count):
    random.seed(0)
    lengths = [random.randint(1, 40) for _ in range(count)]
    return [f"{i}: " + " ".join(random.choices(WORDS, k=n)) + ".\n" for i, n in enumerate(lengths)]


TEXTS = make_texts(1500)


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "web.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def documents_of(path, split, tokenizer=TOKENIZER):
    store = TokenStore(path, split)
    spans = [store.document_span(i) for i in range(store.num_documents)]
    return [tokenizer.decode(store.tokens(*span)) for span in spans]


def files_of(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()
    }


def check_every_document_is_there_once(path, texts):
    train, validation = documents_of(path, "train"), documents_of(path, "validation")
    assert Counter(train + validation) == Counter(texts)
    assert 0.05 * len(texts) < len(validation) < 0.2 * len(texts)
    sizes = [TokenStore(path, split).num_bytes for split in ("train", "validation")]
    assert sum(sizes) == sum(len(text.encode()) for text in texts)


def check_is_shuffled(path, texts):
    """The order is neither the sources' nor nearly so: a document's neighbours were far away."""
    place = {text: i for i, text in enumerate(texts)}
    order = np.array([place[text] for text in documents_of(path, "train")])
    assert np.abs(np.diff(order)).mean() > len(texts) / 4


def test_every_document_is_in_one_split_once_and_shuffled(source, tmp_path):
    manifest = prepare(str(source), TOKENIZER, tmp_path / "s", num_workers=0, **OPTIONS)
    check_every_document_is_there_once(tmp_path / "s", TEXTS)
    check_is_shuffled(tmp_path / "s", TEXTS)
    assert len(manifest["splits"]["train"]["shards"]) > 1
    assert problems(tmp_path / "s") == []
    assert not (tmp_path / "s.partial").exists()


def test_a_store_that_lost_or_did_not_shuffle_documents_fails(tmp_path):
    documents = [TOKENIZER.encode(text) for text in TEXTS]
    splits = {"train": documents[:1400], "validation": documents[1400:1499]}
    store_writer.write_store(tmp_path / "s", splits, TOKENIZER)
    with pytest.raises(AssertionError):
        check_every_document_is_there_once(tmp_path / "s", TEXTS)
    with pytest.raises(AssertionError):
        check_is_shuffled(tmp_path / "s", TEXTS)


def test_workers_runs_and_buckets_do_not_change_a_byte(source, tmp_path, monkeypatch):
    prepare(str(source), TOKENIZER, tmp_path / "one", num_workers=0, **OPTIONS)
    prepare(str(source), TOKENIZER, tmp_path / "two", num_workers=2, **OPTIONS)
    monkeypatch.setattr(runs, "RUN_TOKENS", 2_500)
    monkeypatch.setattr(runs, "BUCKET_TOKENS", 20_000)
    prepare(str(source), TOKENIZER, tmp_path / "small", num_workers=0, **OPTIONS)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") == files_of(tmp_path / "small")


def test_of_more_text_more_is_sorted_at_once_so_that_runs_are_opened_seldom(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "BUCKET_TOKENS", 10)
    run = runs.Runs(tmp_path, 0, "train", np.dtype(np.uint16))
    for key in range(1000):
        run.add(key << 54, np.zeros(10, np.int32), 10)
    run.flush()
    opened, load = [], np.load
    monkeypatch.setattr(np, "load", lambda path, **how: opened.append(path) or load(path, **how))
    summary = {"number": 0, "splits": {"train": {"num_runs": 1, "num_tokens": 10_000}}}
    assert len(list(runs.in_order_of_keys(tmp_path, [summary], "train"))) == 1000
    assert len(opened) <= 2 * 65  # two files for each of 65 buckets, not of 1,001


def test_the_seed_changes_the_order_but_not_the_split(source, tmp_path):
    for seed in (0, 1):
        prepare(str(source), TOKENIZER, tmp_path / str(seed), seed=seed, num_workers=0, **OPTIONS)
    for split in ("train", "validation"):
        first, second = documents_of(tmp_path / "0", split), documents_of(tmp_path / "1", split)
        assert first != second and sorted(first) == sorted(second)


def test_equal_texts_are_on_one_side(tmp_path):
    texts = TEXTS[:100] * 3
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    prepare(str(tmp_path / "a.jsonl"), TOKENIZER, tmp_path / "s", num_workers=0, **OPTIONS)
    check_every_document_is_there_once(tmp_path / "s", texts)
    assert not set(documents_of(tmp_path / "s", "train")) & set(
        documents_of(tmp_path / "s", "validation")
    )


def test_tail_holds_out_the_last_characters_of_every_document(tmp_path):
    texts = {"a.txt": "0123456789" * 7 + "x", "b.txt": "你" * 33, "c.txt": "z"}
    for name, text in texts.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    prepare(str(tmp_path / "in"), TOKENIZER, tmp_path / "s", split="tail", num_workers=0, **OPTIONS)
    cut = {text: int(len(text) * 0.9) for text in texts.values()}
    assert sorted(documents_of(tmp_path / "s", "train")) == sorted(
        t[:c] for t, c in cut.items() if c
    )
    assert sorted(documents_of(tmp_path / "s", "validation")) == sorted(
        t[c:] for t, c in cut.items()
    )


def test_no_validation_fraction_makes_no_validation_split(source, tmp_path):
    options = OPTIONS | {"validation_fraction": 0}
    manifest = prepare(str(source), TOKENIZER, tmp_path / "s", num_workers=0, **options)
    assert list(manifest["splits"]) == ["train"]
    assert sorted(documents_of(tmp_path / "s", "train")) == sorted(TEXTS)


def test_an_empty_split_is_an_error_that_names_the_way_out(tmp_path):
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(ValueError, match="split='tail'"):
        prepare(str(tmp_path / "one.txt"), TOKENIZER, tmp_path / "s", num_workers=0, **OPTIONS)


@pytest.mark.parametrize("kind", ["byte_bpe", "unigram"])
def test_trained_tokenizers_prepare_in_workers_and_the_store_keeps_them(kind, source, tmp_path):
    tokenizer = train_tokenizer(kind, TEXTS, 420, num_sentinels=10)
    tokenizer.save(tmp_path / "tokenizer")
    prepare(str(source), tmp_path / "tokenizer", tmp_path / "s", num_workers=2, **OPTIONS)
    train = documents_of(tmp_path / "s", "train", tokenizer)
    assert Counter(train + documents_of(tmp_path / "s", "validation", tokenizer)) == Counter(TEXTS)
    store = TokenStore(tmp_path / "s")
    assert store.manifest["tokenizer_sha256"] == tokenizer.sha256
    assert tokenizer.num_bytes[store.tokens(0, store.num_tokens)].sum() == store.num_bytes


KILLED = """
import json, os, sys
from jaxlm.data import prepare as preparation
from jaxlm.data.workers import Workers

def die(*arguments, **options):
    os.kill(os.getpid(), 9)

def die_after(pieces, run=Workers.map):
    def map(self, requests):
        for number, summary in enumerate(run(self, requests)):
            if number == pieces:
                die()
            yield summary
    return map

source, tokenizer, output, options, pieces = sys.argv[1:]
if pieces == "all":
    preparation.store_writer.finish_store = die
else:
    Workers.map = die_after(int(pieces))
preparation.prepare(source, tokenizer, output, num_workers=2, **json.loads(options))
"""


def kill_after(pieces, source, tmp_path):
    """A run with two workers that gets SIGKILL after so many pieces, or before the store is whole."""
    TOKENIZER.save(tmp_path / "tokenizer")
    arguments = [source, tmp_path / "tokenizer", tmp_path / "s", json.dumps(OPTIONS), pieces]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,  # its workers have it, too: this waits for their end
    )
    assert done.returncode == -signal.SIGKILL


def check_resumes(tmp_path, source, resume):
    """After a kill, the run ends with the unbroken run's bytes, without doing finished pieces again."""
    finished = set((tmp_path / "s.partial").glob("piece-*.json"))
    assert finished and not (tmp_path / "s").exists()
    made = []

    def counted(work, number, *rest):
        made.append(work / f"piece-{number:05d}.json")
        return prepare_piece(work, number, *rest)

    prepare_piece = workers.prepare_piece
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "prepare_piece", counted)
        resume(str(source), TOKENIZER, tmp_path / "s", num_workers=0, **OPTIONS)
    assert not finished & set(made)
    prepare(str(source), TOKENIZER, tmp_path / "unbroken", num_workers=0, **OPTIONS)
    assert files_of(tmp_path / "s") == files_of(tmp_path / "unbroken")


@pytest.mark.parametrize("pieces", [0, 6])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(pieces, source, tmp_path):
    kill_after(pieces, source, tmp_path)
    check_resumes(tmp_path, source, prepare)


def test_a_run_killed_while_it_writes_the_store_leaves_no_half_store(source, tmp_path):
    kill_after("all", source, tmp_path)
    assert (tmp_path / "s.partial" / "store").exists()
    check_resumes(tmp_path, source, prepare)


def test_a_run_with_workers_goes_on_though_no_piece_is_left_for_them(source, tmp_path):
    kill_after("all", source, tmp_path)
    prepare(str(source), TOKENIZER, tmp_path / "s", num_workers=2, **OPTIONS)
    check_every_document_is_there_once(tmp_path / "s", TEXTS)


def test_a_resume_that_starts_over_fails(source, tmp_path):
    def start_over(*arguments, **options):
        for marker in (tmp_path / "s.partial").glob("piece-*"):
            marker.unlink()
        return prepare(*arguments, **options)

    kill_after(6, source, tmp_path)
    with pytest.raises(AssertionError):
        check_resumes(tmp_path, source, start_over)


def test_workers_do_not_import_jax_and_end_with_their_parent(source, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    TOKENIZER.save(work / "tokenizer")
    (work / "plan.json").write_text("{}")
    code = (
        "import sys, threading, time, os, runpy\n"
        "def watch():\n"
        "    time.sleep(1)\n"
        "    print('jax' in sys.modules, file=sys.stderr, flush=True)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        f"sys.argv = ['worker', {str(work)!r}]\n"
        "runpy.run_module('jaxlm.data.workers', run_name='__main__')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stderr.readline().strip() == b"False"
    process.stdin.close()
    assert process.wait(timeout=10) == 0
    process.stderr.close()


def test_a_worker_that_dies_is_reported(source, tmp_path, capfd):
    TOKENIZER.save(tmp_path / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "_start_or_resume", lambda *a: None)  # so workers find no plan
        with pytest.raises(RuntimeError, match="a worker process ended with code 1"):
            prepare(str(source), TOKENIZER, tmp_path / "s", num_workers=2, **OPTIONS)
    assert "plan.json" in capfd.readouterr().err


def test_a_finished_store_is_returned_at_once_and_another_one_is_not_touched(
    source, tmp_path, monkeypatch
):
    made = prepare(str(source), TOKENIZER, tmp_path / "s", num_workers=0, **OPTIONS)
    monkeypatch.setattr(preparation, "_tokenize", None)  # nothing is tokenized
    monkeypatch.setattr(preparation, "sha256_of", None)  # nor are unchanged sources read
    assert prepare(str(source), TOKENIZER, tmp_path / "s", num_workers=3, **OPTIONS) == made
    before = files_of(tmp_path / "s")
    with pytest.raises(FileExistsError, match="seed: 0 -> 1"):
        prepare(str(source), TOKENIZER, tmp_path / "s", seed=1, num_workers=0, **OPTIONS)
    assert files_of(tmp_path / "s") == before
    other = make_tokenizer("bytes", num_sentinels=5)
    with pytest.raises(FileExistsError, match="tokenizer_sha256: .* -> "):
        prepare(str(source), other, tmp_path / "s", num_workers=0, **OPTIONS)


def test_changed_text_is_another_store_but_a_changed_time_or_place_is_not(source, tmp_path):
    made = prepare(str(source), TOKENIZER, tmp_path / "s", num_workers=0, **OPTIONS)
    moved = source.rename(tmp_path / "moved.jsonl")
    os.utime(moved, (1, 1))
    assert prepare(str(moved), TOKENIZER, tmp_path / "s", num_workers=0, **OPTIONS) == made
    moved.write_text(moved.read_text() + '{"text": "one more"}\n')
    with pytest.raises(FileExistsError, match="source_fingerprint: .* -> "):
        prepare(str(moved), TOKENIZER, tmp_path / "s", num_workers=0, **OPTIONS)


def test_a_store_below_its_sources_does_not_read_itself(tmp_path, monkeypatch):
    (tmp_path / "web.jsonl").write_text('{"text": "a document"}\n' * 9)
    options = OPTIONS | {"num_workers": 0, "validation_fraction": 0}
    with monkeypatch.context() as patch:
        patch.setattr(preparation.store_writer, "publish", None)
        with pytest.raises(TypeError):
            prepare(str(tmp_path), TOKENIZER, tmp_path / "s", **options)
    assert list((tmp_path / "s.partial").glob("piece-*.json"))
    monkeypatch.setattr(workers, "prepare_piece", None)  # finished pieces are not done again
    made = prepare(str(tmp_path), TOKENIZER, tmp_path / "s", **options)
    assert made["source"] == {"num_documents": 9, "bad": {}}
    assert prepare(str(tmp_path), TOKENIZER, tmp_path / "s", **options) == made


def test_what_a_run_writes_below_its_text_is_no_text(tmp_path):
    (tmp_path / "web.jsonl").write_text('{"text": "a document"}\n' * 9)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    options = OPTIONS | {"num_workers": 0, "validation_fraction": 0, "left_out": [tmp_path / "run"]}
    made = prepare(str(tmp_path), TOKENIZER, tmp_path / "run" / "store", **options)
    assert made["source"] == {"num_documents": 9, "bad": {}}
    (tmp_path / "run" / "text.txt").write_text("asked for by its name")
    named = prepare(
        str(tmp_path / "run" / "text.txt"), TOKENIZER, tmp_path / "run" / "s", **options
    )
    assert named["source"]["num_documents"] == 1


def test_what_is_no_store_is_not_overwritten(source, tmp_path):
    (tmp_path / "s").mkdir()
    prepare(str(source), TOKENIZER, tmp_path / "s", num_workers=0, **OPTIONS)  # empty: fine
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="no token store"):
        prepare(str(source), TOKENIZER, tmp_path / "thesis", num_workers=0, **OPTIONS)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "dear"


def add_bad_input(folder):
    folder.mkdir()
    good = [json.dumps({"text": text}) for text in TEXTS[:500]]
    lines = [*good[:250], '{"text": ', '{"body": "x"}', *good[250:]]
    (folder / "web.jsonl").write_text("\n".join(lines))
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin.txt").write_bytes(b"caf\xe9")


def check_bad_input_is_accounted_for(manifest, store, folder):
    """Counted by class in the manifest, and listed in quarantine.jsonl with origin and reason."""
    counts = dict(broken_json=1, missing_field=1, empty_file=1, invalid_utf8=1)
    assert manifest["source"] == dict(num_documents=500, bad=counts)
    listed = [json.loads(line) for line in open(store / "quarantine.jsonl")]
    assert {(entry["reason"], entry["origin"]) for entry in listed} == {
        ("broken_json", f"{folder}/web.jsonl:251"),
        ("missing_field", f"{folder}/web.jsonl:252"),
        ("empty_file", f"{folder}/empty.txt"),
        ("invalid_utf8", f"{folder}/latin.txt"),
    }


def test_bad_input_is_counted_and_quarantined_with_its_origin(tmp_path):
    add_bad_input(tmp_path / "in")
    manifest = prepare(str(tmp_path / "in"), TOKENIZER, tmp_path / "s", num_workers=2, **OPTIONS)
    check_bad_input_is_accounted_for(manifest, tmp_path / "s", tmp_path / "in")
    check_every_document_is_there_once(tmp_path / "s", TEXTS[:500])


def test_a_preparation_that_drops_bad_input_silently_fails(tmp_path, monkeypatch):
    add_bad_input(tmp_path / "in")
    read = preparation.text_sources.read_span
    bad = workers.Bad
    monkeypatch.setattr(
        preparation.text_sources,
        "read_span",
        lambda *a: (i for i in read(*a) if not isinstance(i, bad)),
    )
    manifest = prepare(str(tmp_path / "in"), TOKENIZER, tmp_path / "s", num_workers=0, **OPTIONS)
    with pytest.raises(AssertionError):
        check_bad_input_is_accounted_for(manifest, tmp_path / "s", tmp_path / "in")


def test_too_much_bad_input_stops_the_run_with_the_list_and_a_higher_threshold_goes_on(tmp_path):
    add_bad_input(tmp_path / "in")
    source, store = str(tmp_path / "in"), tmp_path / "s"
    options = OPTIONS | {"piece_bytes": 1 << 20}  # one piece: it stops at the end
    with pytest.raises(ValueError) as error:
        prepare(source, TOKENIZER, store, num_workers=0, max_bad_fraction=0.001, **options)
    message = str(error.value)
    for part in ("broken_json: 1", "web.jsonl:251", "latin.txt", "quarantine.jsonl"):
        assert part in message
    assert not store.exists()
    assert (tmp_path / "s.partial" / "quarantine.jsonl").is_file()
    prepare(source, TOKENIZER, store, num_workers=0, max_bad_fraction=0.02, **options)
    check_every_document_is_there_once(store, TEXTS[:500])


def test_much_bad_input_stops_the_run_before_its_end(tmp_path):
    (tmp_path / "web.jsonl").write_text("broken\n" * 20_000)
    with pytest.raises(ValueError, match="broken_json"):
        prepare(str(tmp_path / "web.jsonl"), TOKENIZER, tmp_path / "s", num_workers=0, **OPTIONS)
    assert 1 <= len(list((tmp_path / "s.partial").glob("piece-*.json"))) < 5


def test_only_bad_input_is_an_error_even_if_all_is_allowed(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="'train' is empty"):
        prepare(
            str(tmp_path / "empty.txt"),
            TOKENIZER,
            tmp_path / "s",
            num_workers=0,
            max_bad_fraction=1.0,
            **OPTIONS,
        )


def test_wrong_options_are_named_all_at_once(source, tmp_path):
    options = OPTIONS | dict(split="random", validation_fraction=1.5)
    with pytest.raises(ValueError, match="(?s)'hash' or 'tail'.*0 <= fraction < 1"):
        prepare(str(source), TOKENIZER, tmp_path / "s", **options)


def test_two_runs_do_not_write_one_store(source, tmp_path):
    (tmp_path / "s.partial").mkdir()
    with preparation._lock(tmp_path / "s.partial"), pytest.raises(RuntimeError, match="another"):
        prepare(str(source), TOKENIZER, tmp_path / "s", num_workers=0, **OPTIONS)


def test_a_worker_that_outlives_its_run_keeps_the_lock(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer")
    (tmp_path / "plan.json").write_text("{}")
    with contextlib.ExitStack() as stack:
        with preparation._lock(tmp_path) as lock:
            stack.enter_context(workers.Workers(tmp_path, 1, lock))
        with pytest.raises(RuntimeError, match="another"), preparation._lock(tmp_path):
            pass
    with preparation._lock(tmp_path):
        pass


def test_a_file_that_changes_meanwhile_is_an_error(source, tmp_path, monkeypatch):
    tokenize = preparation._tokenize

    def meddle(*arguments):
        summaries = tokenize(*arguments)
        source.write_text(source.read_text() + '{"text": "late"}\n')
        return summaries

    monkeypatch.setattr(preparation, "_tokenize", meddle)
    with pytest.raises(ValueError, match="(?s)changed while.*web.jsonl"):
        prepare(str(source), TOKENIZER, tmp_path / "s", num_workers=0, **OPTIONS)
    assert not (tmp_path / "s").exists()


def test_both_tools_run_from_a_shell(tmp_path):
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"body": text}) + "\n" for text in TEXTS[:300])
    )

    def tool(name, *flags):
        command = [sys.executable, str(ROOT / "tools" / name), *flags, "--text_field=body"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    train = ("--kind=byte_bpe", "--sources=in.jsonl", "--vocab_size=400", "--output=tok")
    code, out, err = tool("train_tokenizer.py", *train, "--num_sentinels=5")
    assert code == 0 and "400 ids" in out, err
    flags = ("--sources=in.jsonl", "--tokenizer=tok", "--output=store")
    code, out, err = tool("prepare_data.py", *flags)
    assert code == 0 and "train: " in out and "validation: " in out, err
    assert "tokenizing" in err or os.environ.get("TQDM_DISABLE")
    code, out, err = tool("prepare_data.py", *flags, "--seed=3")
    assert code == 1 and "seed: 0 -> 3" in err and "Traceback" not in err
