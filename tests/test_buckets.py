"""A workdir on a bucket, through the real entrypoints and clients: gcsfs, Orbax and tensorstore talk to an emulator."""

import hashlib
import importlib.util
import io
import json
import logging
import sys
import threading

import fsspec.config
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from ml_collections import config_flags

from jaxlm import api, build, config_files, doctor, evaluate, files
from jaxlm.data.positions import Rewind, read_rewinds
from jaxlm.data.store_check import problems
from jaxlm.data.token_store import TokenStore
from jaxlm.exits import Damaged, Diverged
from jaxlm.files import Appender, absolute, as_path, fetch, local_copy, new_folder, write_text
from jaxlm.finetune import finetune
from jaxlm.flags import through_reader
from jaxlm.parallel.mesh import make_mesh
from jaxlm.pretrain import pretrain
from jaxlm.rewind import until_done
from jaxlm.tokenizers import META, is_saved, make_tokenizer
from jaxlm.training.checkpoints import Checkpoints, find_step
from jaxlm.training.state import new_state
from jaxlm.workdir import manifest
from tests import tiny
from tests.test_finetune import write_rows
from tests.training.test_checkpoints import abstract
from tools import compare_runs, inspect_checkpoint, plot_run, report

emulator = pytest.importorskip("gcp_storage_emulator.server")  # in the dev extra only

TEXT = "def area(side):\n    return side * side\n\n\nclass Square:\n    pass\n"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """'gs://bucket', whose server is a thread of this process, for every client in it and in its children."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    server = emulator.create_server("localhost", 0, in_memory=True, default_bucket="bucket")
    server.start()
    server._api._httpd.handle_error = lambda *_: None  # tensorstore hangs up before the last byte
    url = f"http://localhost:{server._api._httpd.server_address[1]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        # gcsfs would ask Google what kind of bucket it is, before each request.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        one = make_mesh(devices=jax.devices()[:1])  # which compiles in half the time of eight
        patch.setattr("jaxlm.parallel.mesh.make_mesh", lambda **_: one)
        yield "gs://bucket"
    server.stop()


@pytest.fixture
def copies(monkeypatch):
    """The names of what is copied to this host."""
    made, copy = [], files._copy
    monkeypatch.setattr(
        files, "_copy", lambda source, target: made.append(source.name) or copy(source, target)
    )
    return made


# ---------------------------------------------------------------- runs


def config_of(source, cache, steps):
    return tiny.tiny_config(
        "configs/gpt.py:tiny,schedule=constant",
        source,
        num_train_steps=steps,
        log_every_steps=1,
        eval_every_steps=2,
        checkpoint_every_steps=2,
        eval__num_batches=1,
        eval__prompts=("def ",),
        log__tensorboard=True,
        data__split="tail",
        data__validation_fraction=0.3,
        data__cache_dir=str(cache),
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("copies")


@pytest.fixture(scope="module")
def runs(bucket, cache, tmp_path_factory):
    """The same run of the same text to 4 steps: unbroken on this disk, and on the bucket with a stop after 2."""
    local = tmp_path_factory.mktemp("local")
    for folder in (local / "text", as_path(f"{bucket}/text")):
        folder.mkdir()
        for name in ("a.txt", "b.txt"):
            write_text(folder / name, TEXT * 20)
    pretrain(config_of(local / "text/*.txt", cache, 4), local / "run")
    remote = as_path(f"{bucket}/runs/first")
    for steps in (2, 4):
        pretrain(config_of(f"{bucket}/text/*.txt", cache, steps), remote)
    return local / "run", remote


def test_a_run_on_a_bucket_learns_and_leaves_what_one_on_a_disk_does(runs):
    local, remote = runs
    own = lambda name: "tfevents" in name or name == ".lock"  # a disk's lock stays there, unlocked
    names = lambda folder: {path.name for path in folder.iterdir() if not own(path.name)}
    for folder in ("", "plots", "tokenizer", "store/all"):
        assert names(remote / folder) == names(local / folder), folder
    assert tiny.learned(remote) == tiny.learned(local)
    samples = [(folder / "samples.jsonl").read_text() for folder in runs]
    assert samples[0] == samples[1] and samples[0].count("\n") == 2
    assert find_step(remote) == remote / "checkpoints" / "4"


def test_tensorboard_reads_the_events_of_both_starts(runs):
    events = [path for path in runs[1].iterdir() if "tfevents" in path.name]
    assert len(events) == 2
    assert all(b"train/loss" in path.read_bytes() for path in events)


def test_a_model_on_a_bucket_is_evaluated_and_used_as_one_on_a_disk(runs):
    local, remote = runs
    assert evaluate.evaluate(remote) == evaluate.evaluate(local)
    made = [api.generate(api.load(str(run)), ["def "], max_new_tokens=3, seed=1) for run in runs]
    assert [g.text for g in made[0][0]] == [g.text for g in made[1][0]]


def test_tools_take_workdirs_on_a_bucket(runs, capsys):
    local, remote = map(str, runs)
    assert plot_run.main([local, remote, f"--output={remote}/both"]) in (0, None)
    assert as_path(f"{remote}/both/loss.png").read_bytes().startswith(b"\x89PNG")
    assert compare_runs.main([local, remote]) in (0, None)
    assert inspect_checkpoint.main([remote]) in (0, None)
    assert f"{remote}/checkpoints/4" in capsys.readouterr().out
    assert report.main([remote]) == 0
    page = as_path(f"{remote}/report.html").read_text()
    assert page.count("data:image/png") == 3 and "This cannot be read" not in page


@pytest.mark.slow
def test_a_model_on_a_bucket_is_finetuned_there_and_predicts(runs, bucket, cache, tmp_path):
    data, workdir = as_path(f"{bucket}/rows.csv"), as_path(f"{bucket}/tuned")
    write_text(data, write_rows(tmp_path / "rows.csv").read_text())
    config = config_files.read_config(
        f"{tiny.ROOT}/configs/finetune/classification.py:train={data}",
        {
            "init_from": str(runs[1]),
            "batch_size": 16,
            "seq_len": 32,
            "num_epochs": 1.0,
            "data.dev_fraction": 0.25,
            "data.cache_dir": str(cache),
            "eval.batch_size": 16,
            "log.progress": False,
            "log.tensorboard": False,
        },
    )
    found = finetune(config, workdir)
    assert json.loads((workdir / "report.json").read_text()) == found
    assert report.main([str(workdir)]) == 0
    page = as_path(f"{workdir}/report.html").read_text()
    assert page.count("data:image/png") == 4 and "This cannot be read" not in page
    assert (workdir / "plots" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    scores = evaluate.evaluate_task(workdir, str(data), output=f"{bucket}/table.csv")
    assert scores["records"] == as_path(f"{bucket}/table.csv").read_text().count("\n") - 1 == 48


# ---------------------------------------------------------------- files


def check_a_resumed_file_keeps_its_lines(path, open_file):
    """What was written before a file was opened again is still there, before the new lines."""
    for line in (b"1\n", b"2\n"):
        file = open_file(path)
        file.write(line)
        file.close()
    assert path.read_bytes() == b"1\n2\n"


def test_a_file_that_grows_keeps_its_lines(bucket, tmp_path):
    for folder in (tmp_path, as_path(f"{bucket}/grows")):
        check_a_resumed_file_keeps_its_lines(folder / "lines", Appender)


def test_the_check_fails_for_append_of_the_file_system(bucket):
    with pytest.raises(AssertionError):
        check_a_resumed_file_keeps_its_lines(
            as_path(f"{bucket}/appended"), lambda path: path.open("ab")
        )


def test_lines_are_on_the_bucket_at_a_flush_and_now_and_then(bucket, monkeypatch):
    path = as_path(f"{bucket}/flushed")
    file = Appender(path)
    file.write(b"1\n")
    assert path.read_bytes() == b""
    file.flush()
    assert path.read_bytes() == b"1\n"
    monkeypatch.setattr(files.time, "monotonic", lambda: file._due)
    file.write(b"2\n")
    assert path.read_bytes() == b"1\n2\n"


def test_a_folder_on_a_bucket_is_there_when_its_last_file_is(bucket, monkeypatch):
    target, seen = as_path(f"{bucket}/tokenizer"), []
    create = files._creating
    monkeypatch.setattr(
        files, "_creating", lambda path: seen.append((path.name, is_saved(target))) or create(path)
    )
    with new_folder(target, last=META) as folder:
        make_tokenizer("bytes", num_sentinels=0).save(folder)
    assert len(seen) > 1 and seen[-1] == (META, False)
    assert is_saved(target)


def test_a_write_that_fails_leaves_the_object_as_it_was(bucket):
    path = as_path(f"{bucket}/whole")
    write_text(path, "before")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_whole(path, fail)
    assert path.read_text() == "before"


def test_processes_of_a_host_copy_a_shard_once(bucket, tmp_path, copies):
    shard, content = as_path(f"{bucket}/shard.npy"), b"tokens"
    shard.write_bytes(content)
    digest, found = hashlib.sha256(content).hexdigest(), []
    ask = lambda: found.append(fetch(shard, tmp_path, digest))
    threads = [threading.Thread(target=ask) for _ in range(4)]  # each opens the lock anew
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert copies == ["shard.npy"]
    assert {path.read_bytes() for path in found} == {content} and len(found) == 4
    assert list(tmp_path.iterdir()) == [tmp_path / f"sha256-{digest}"]


def test_a_store_on_a_bucket_is_copied_by_its_digests_and_checked(bucket, tmp_path, copies):
    local = tiny.make_store(tmp_path / "store")
    remote = as_path(f"{bucket}/store")
    files.upload(local, remote, last="manifest.json")
    cache = str(tmp_path / "cache")
    store = TokenStore(remote, "train", cache_dir=cache)
    assert copies == []  # nothing is read before it is asked for
    expected = TokenStore(local, "train").tokens(3, 40)
    np.testing.assert_array_equal(store.tokens(3, 40), expected)
    np.testing.assert_array_equal(
        TokenStore(remote, "train", cache_dir=cache).tokens(3, 40), expected
    )
    assert copies == ["train-00000.blocks.npy", "train-00000.tokens.npy"]

    assert problems(remote) == []
    shard = remote / "validation-00000.tokens.npy"
    changed = bytearray(shard.read_bytes())
    changed[-1] ^= 1
    shard.write_bytes(bytes(changed))
    with pytest.raises(Damaged, match=r"validation-00000.tokens.npy: its sha256 is .*, expected"):
        TokenStore(remote, "validation", cache_dir=cache).tokens(0, 4)
    assert problems(remote) == ["validation-00000.tokens.npy: its sha256 is not the manifest's"]
    shard.unlink()
    with pytest.raises(Damaged, match=r"validation-00000.tokens.npy: missing"):
        TokenStore(remote, "validation", cache_dir=cache)


def test_a_digest_that_is_a_path_is_no_name_of_a_copy(bucket, tmp_path):
    with pytest.raises(ValueError, match="expected 64 digits"):
        fetch(as_path(f"{bucket}/x"), tmp_path, "../" * 20 + "etcd")


def test_a_changed_object_is_copied_anew(bucket, tmp_path):
    path = as_path(f"{bucket}/rows.jsonl")
    for text in ("one", "another"):
        path.write_text(text)
        assert local_copy(path, str(tmp_path)).read_text() == text
    assert local_copy(tmp_path / "here") == tmp_path / "here"


def test_paths_say_what_is_known_and_what_to_install(monkeypatch):
    assert str(absolute("gs://bucket/a")) == "gs://bucket/a" == str(as_path("gs:/bucket/a"))
    with pytest.raises(ValueError, match=r"scheme ftp://, expected a local path or gs://"):
        as_path("ftp://host/run")
    find = importlib.util.find_spec
    missing = ("gcsfs", "tensorflow")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )
    with pytest.raises(ImportError, match="gs://bucket/run needs gcsfs: pip install"):
        as_path("gs://bucket/run")


@pytest.mark.slow
def test_a_run_on_a_bucket_goes_back_and_leaves_its_bad_batch_there(bucket, tmp_path):
    config = config_of(tiny.make_store(tmp_path / "store"), tmp_path, steps=9)
    config.guards.update(max_bad_steps=2, skip_batches=2)
    run = build.make_run(config, as_path(f"{bucket}/runs/back"))
    store = Checkpoints(run.workdir, **config.checkpoint)
    for step in (2, 4):
        store.save(step, run.init_state(), manifest(run, step), None)
    store.close()
    steps = []

    def attempt():
        steps.append(Checkpoints(run.workdir, **config.checkpoint).steps())
        if len(steps) == 1:
            raise Diverged("bad", [{"step": 4, "loss": "nan"}, {"step": 5, "loss": "nan"}])
        return run.rewinds

    assert until_done(run, attempt) == [Rewind(step=3, batch=5, bad_steps=(4, 5))]
    assert read_rewinds(run.workdir) == run.rewinds
    assert steps == [[2, 4], [2]]
    folder = run.workdir / "bad_steps" / "4-3"
    with (folder / "batch.npz").open("rb") as file:
        batch = np.load(io.BytesIO(file.read()), allow_pickle=False)
        np.testing.assert_array_equal(batch["tokens"], run.train_batches.whole(3)["tokens"])
    assert [entry["batch"] for entry in json.loads((folder / "documents.json").read_text())] == [
        3,
        4,
    ]


def test_a_config_on_a_bucket_is_one_for_the_command_line(runs, monkeypatch):
    values = flags.FlagValues()
    monkeypatch.setattr(
        sys,
        "argv",
        [*through_reader(["pretrain", f"--config={runs[1]}/config.json", "--config.seed=3"])],
    )
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(sys.argv)
    assert values.config.seed == 3
    assert values.config.to_dict() == config_files.saved_config(
        runs[1] / "config.json"
    ).to_dict() | {"seed": 3}


def small_state(step):
    return new_state({"w": jnp.arange(6.0)}, optax.identity()).replace(step=jnp.int32(step))


@pytest.mark.slow  # the emulator takes 35 s to delete what was copied
def test_a_damaged_step_on_a_bucket_is_set_aside_and_saved_again(bucket):
    workdir = as_path(f"{bucket}/runs/damaged")
    checkpoints = Checkpoints(workdir)
    for step in (10, 20):
        checkpoints.save(step, small_state(step), {"step": step}, None)
    checkpoints.close()
    manifest = workdir / "checkpoints" / "20" / "manifest" / "metadata"
    manifest.write_text(manifest.read_text().replace("20", "21", 1))

    again = Checkpoints(workdir)
    state, about = again.restore(abstract(small_state(0)))
    assert int(state.step) == about["step"] == 10 and again.steps() == [10]
    aside = workdir / "checkpoints.damaged" / "20-1"
    assert (aside / "manifest" / "metadata").is_file() and (
        aside / "params" / "_METADATA"
    ).is_file()
    assert "sha256" in aside.with_name("20-1.txt").read_text()
    again.save(20, small_state(20), {"step": 20}, None)
    again.close()
    assert again.steps() == [10, 20]


def test_the_doctor_writes_to_a_bucket_and_leaves_nothing(bucket):
    workdir = as_path(f"{bucket}/runs/examined")
    findings = list(doctor.examine(doctor.Patient(workdir)))
    assert not [finding for finding in findings if finding.verdict == doctor.FAIL]
    assert any("a checkpoint is written at" in f.found for f in findings if f.check == "workdir")
    assert not (workdir / doctor.SCRATCH).exists()
