"""A resume is the same run: what would make it another one is refused with the difference, or allowed by the flag."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from jaxlm import build, config_files, identity
from jaxlm.exits import Damaged
from jaxlm.finetune import finetune
from jaxlm.parallel.mesh import make_mesh
from jaxlm.pretrain import pretrain
from jaxlm.sealed import seal
from jaxlm.tokenizers import make_tokenizer
from jaxlm.training.checkpoints import Checkpoints, find_step
from jaxlm.workdir import manifest
from tests import tiny

TEXT = "def area(side):\n    return side * side\n\n\n"
STEPS = 4


def config_of(folder, spec="configs/gpt.py:tiny,schedule=constant", **changes):
    """Of a run over a text and a token store, on one device."""
    options = dict(
        num_train_steps=STEPS,
        log_every_steps=1,
        checkpoint_every_steps=2,
        eval_every_steps=STEPS,
        eval__num_batches=1,
        eval__prompts=(),
        data__sources=(f"web={folder}/web.txt", f"books={folder}/books"),
        data__split="tail",
        data__validation_fraction=0.3,
    )
    return tiny.tiny_config(spec, folder / "books", **options | changes)


@pytest.fixture(scope="module")
def one_device():
    one = make_mesh(devices=jax.devices()[:1])  # compiles in half the time of eight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxlm.parallel.mesh.make_mesh", lambda **_: one)
        yield one


@pytest.fixture(scope="module")
def trained(one_device, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "web.txt").write_text(TEXT * 20)
    tiny.make_store(folder / "books")
    pretrain(config_of(folder), folder / "run")
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """The text, the store and the run, to change them."""
    shutil.copytree(trained, tmp_path / "copy")
    config = json.loads((tmp_path / "copy/run/config.json").read_text())
    config["data"]["sources"] = config_of(tmp_path / "copy").data.sources
    (tmp_path / "copy/run/config.json").write_text(json.dumps(config))
    return tmp_path / "copy"


def held(workdir):
    """All that a run is, without what says how a process fared."""
    return {
        path.relative_to(workdir): path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file() and path.name not in ("goodput.jsonl", ".lock", "environment.json")
    }


def check_is_refused(config, workdir, *says, error=identity.OtherRun, **options):
    """One message has each difference and what to do, and the workdir is as it was."""
    before = held(workdir)
    with pytest.raises(error) as refused:
        pretrain(config, workdir, **options)
    for line in says:
        assert re.search(line, str(refused.value)), f"{line} is not in {refused.value}"
    assert held(workdir) == before


def check_is_allowed(config, workdir):
    """The run goes on from its checkpoint, and config.json says what it goes on with."""
    pretrain(config, workdir, allow_config_change=True)
    saved = config_files.saved_config(workdir / "config.json")
    assert not identity.config_changes(saved, config)
    assert find_step(workdir).name == str(config.num_train_steps)


FLAG = "pass --allow_config_change"
# What is changed -> what the message says, and what it says although the flag is given (None: then it goes on).
CHANGES = {
    "seed": (dict(seed=7), "seed: 0 -> 7", None),
    "batch": (dict(batch_size=4), "batch_size: 8 -> 4", None),
    "length": (dict(seq_len=16), "seq_len: 32 -> 16", None),
    "mixture": (dict(data__weights=("3,1",)), r"data.weights: \[\] -> \['3,1'\]", None),
    "objective": (
        dict(objective__name="prefix_lm"),
        "objective.name: causal -> prefix_lm",
        None,
    ),
    "learning rate": (dict(optimizer__learning_rate=0.5), "learning_rate: .* -> 0.5", None),
    "dtype": (dict(dtype="bfloat16"), "dtype: auto -> bfloat16", None),
    "optimizer": (
        dict(spec="configs/gpt.py:tiny,schedule=constant,optimizer=lion"),
        "optimizer.name: muon -> lion",
        r"opt_state/.*: stored .*, expected nothing",
    ),
    "stored dtype": (
        dict(param_dtype="bfloat16"),
        "param_dtype: float32 -> bfloat16",
        r"params/.*: stored float32.*, expected bfloat16",
    ),
    "model": (
        dict(model__mlp_dim=48),
        "model.mlp_dim: 32 -> 48",
        r"params/.*: stored float32\[2, 16, 32\], expected float32\[2, 16, 48\]",
    ),
    "tokenizer": (dict(tokenizer__kind="chars"), "kind: bytes -> chars", "kind: bytes -> chars"),
    "start": (dict(init_from="elsewhere"), "init_from:  -> elsewhere", None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_field_is_refused_with_the_difference_or_allowed(name, folder):
    changes, says, says_also = CHANGES[name]
    config = config_of(folder, **changes)
    check_is_refused(config, folder / "run", says, *([] if says == says_also else [FLAG]))
    if says_also is None:
        check_is_allowed(config, folder / "run")
    else:
        options = dict(error=ValueError, allow_config_change=True)
        check_is_refused(config, folder / "run", says_also, **options)


def test_the_guide_lists_every_field_that_may_change_on_a_resume():
    page = (tiny.ROOT / "docs" / "guide" / "robustness.md").read_text("utf-8")
    (row,) = re.findall(r"^\| execution \|.*$", page, re.M)
    named = {
        *re.findall(r"`([\w.]+)`", row),
        *(f"{x}_every_steps" for x in ("log", "eval", "checkpoint")),
    }
    assert "intervals" in row and named == {*identity.EXECUTION_FIELDS}


def test_the_law_fails_for_a_field_that_nobody_compares(folder, monkeypatch):
    forgotten = (*identity.EXECUTION_FIELDS, "batch_size")
    monkeypatch.setattr(identity, "EXECUTION_FIELDS", forgotten)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_is_refused(config_of(folder, batch_size=4), folder / "run", "batch_size: 8 -> 4")


def test_the_law_fails_for_a_run_that_writes_its_config_before_it_is_refused(folder):
    with pytest.raises(AssertionError):
        config = config_of(folder, model__mlp_dim=48)
        build.write_config(config, folder / "run" / "config.json")
        check_is_refused(config_of(folder), folder / "run", "mlp_dim: 32 -> 48")


def test_other_files_are_refused_or_allowed(folder):
    shutil.copy(folder / "web.txt", folder / "news.txt")
    sources = (f"news={folder}/news.txt", f"books={folder}/books")
    config = config_of(folder, data__sources=sources)
    check_is_refused(config, folder / "run", r"data.sources: .*web=.* -> .*news=", FLAG)
    check_is_allowed(config, folder / "run")


def test_text_that_has_changed_is_refused_or_the_stored_text_is_read_on(folder, caplog):
    config, store = config_of(folder), folder / "run/store/web"
    before = held(store)
    (folder / "web.txt").write_text(TEXT * 20 + "more\n")
    check_is_refused(config, folder / "run", "data of web: source_fingerprint: .* -> ", FLAG)
    check_is_allowed(config, folder / "run")
    assert held(store) == before
    assert "web is used as it is" in caplog.text


def test_a_store_whose_content_has_changed_is_refused_or_allowed(folder):
    shutil.rmtree(folder / "books")
    tiny.make_store(folder / "books", size=500)
    config = config_of(folder)
    check_is_refused(config, folder / "run", r"data of books \(fingerprint\): .* -> ", FLAG)
    check_is_allowed(config, folder / "run")


def test_another_computing_dtype_is_found_though_the_config_leaves_it_to_the_machine(folder):
    """As on a resume of a TPU's run on a CPU; here the checkpoint is made to say so."""
    path = find_step(folder / "run") / "manifest/metadata"
    path.write_text(json.dumps(seal(json.loads(path.read_text()) | {"dtype": "bfloat16"})))
    check_is_refused(config_of(folder), folder / "run", "dtype: bfloat16 -> float32", FLAG)
    check_is_allowed(config_of(folder), folder / "run")


@pytest.mark.slow
def test_labelled_rows_that_have_changed_are_refused_or_allowed(folder):
    rows = folder / "rows.csv"
    rows.write_text("text,label\n" + "a cat,animal\na rose,plant\n" * 8)
    config = config_files.read_config(
        f"{tiny.ROOT}/configs/finetune/classification.py:train={rows},num_epochs=1",
        {
            "init_from": str(folder / "run"),
            "batch_size": 8,
            "seq_len": 32,
            "data.dev_fraction": 0.5,
            "log.progress": False,
            "log.tensorboard": False,
        },
    )
    finetune(config, folder / "tuned")
    rows.write_text(rows.read_text().replace("a cat", "a dog"))
    with pytest.raises(
        identity.OtherRun, match=r"data of train \(fingerprint\): .* -> "
    ) as refused:
        finetune(config, folder / "tuned")
    assert FLAG in str(refused.value)
    finetune(config, folder / "tuned", allow_config_change=True)


def test_a_tokenizer_that_was_replaced_is_refused_also_with_the_flag(folder):
    """Even where all ids fit: they mean something else."""
    other = make_tokenizer("chars", characters="".join(map(chr, range(97, 123))), num_sentinels=0)
    shutil.rmtree(folder / "run/tokenizer")
    other.save(folder / "run/tokenizer")
    for allowed in (False, True):
        check_is_refused(
            config_of(folder),
            folder / "run",
            "tokenizer",
            error=ValueError,
            allow_config_change=allowed,
        )


@pytest.mark.parametrize("name", ["bytes.txt", "jaxlm_tokenizer.json"])
def test_a_flipped_bit_of_a_runs_tokenizer_is_damage_to_all_that_read_it(name, folder):
    file = folder / "run/tokenizer" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    check_is_refused(config_of(folder), folder / "run", "run/tokenizer", error=Damaged)
    with pytest.raises(Damaged, match="run/tokenizer"):
        build.load_checkpoint(folder / "run")


def test_a_model_with_a_tokenizer_that_it_was_not_trained_with_is_not_used(folder):
    shutil.rmtree(folder / "run/tokenizer")
    make_tokenizer("bytes", num_sentinels=1).save(folder / "run/tokenizer")
    with pytest.raises(Damaged, match="was trained with another tokenizer"):
        build.load_checkpoint(folder / "run")


def test_a_source_named_as_a_path_is_refused():
    for name in ("../web", "a/b", "..", ""):
        with pytest.raises(ValueError, match="no names of folders"):
            build.named_sources((f"{name}=web.txt",))


def test_how_a_run_runs_may_be_changed_without_the_flag(folder, caplog):
    caplog.set_level("INFO", "jaxlm")
    config = config_of(folder, num_train_steps=STEPS + 2, data__prefetch=1, remat="full")
    pretrain(config, folder / "run")
    assert "config changed since this run began: data.prefetch: 2 -> 1" in caplog.text
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    steps = [(line["split"], line["step"]) for line in map(json.loads, lines)]
    assert len(set(steps)) == len(steps) and ("train", STEPS + 2) in steps


def restored(folder, workdir, mesh):
    run = build.make_run(config_of(folder), folder / "run", mesh=mesh)
    state, _ = Checkpoints(workdir).restore(run.state_shape)
    return run, state


def check_same_bits(state, other):
    """Every array of the one is that of the other, wherever their parts lie."""
    a, b = (jax.tree_util.tree_leaves_with_path(x) for x in (state, other))
    assert [path for path, _ in a] == [path for path, _ in b]
    for (path, x), (_, y) in zip(a, b, strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


@pytest.mark.parametrize(
    "axes", [dict(data=8), dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)], ids=str
)
def test_other_devices_restore_the_same_bits_there_and_back(axes, trained, one_device, tmp_path):
    _, one = restored(trained, trained / "run", one_device)
    run, many = restored(trained, trained / "run", make_mesh(**axes))
    check_same_bits(many, one)
    store = Checkpoints(tmp_path)
    store.save(STEPS, many, manifest(run, STEPS), None)
    store.close()
    _, back = restored(trained, tmp_path, one_device)
    check_same_bits(back, one)
    with pytest.raises(AssertionError):
        check_same_bits(back.replace(step=back.step + 1), one)
