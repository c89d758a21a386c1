"""Every shipped config trains, and no field of a config is decoration."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import bart, bert, gpt, t5, transformer
from jaxlm import config_files, tuning
from jaxlm.finetune import finetune
from jaxlm.pretrain import pretrain
from tests import tiny


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny.make_store(tmp_path_factory.mktemp("text") / "store")


MODULES = {"gpt": gpt, "bert": bert, "t5": t5, "bart": bart, "transformer": transformer}
OF_WIDTH = ("logit_scale", "embed_init_std")
# Span corruption needs some sentinels; the ids of bytes are then 8 more. Two stacks take long to compile unrolled.
SENTINELS = {"tokenizer__num_sentinels": 8, "model__vocab_size": 272, "unroll": 1}


@pytest.fixture(scope="module")
def store_with_sentinels(tmp_path_factory):
    return tiny.make_store(tmp_path_factory.mktemp("text") / "store", num_sentinels=8)


def distinct_configs():
    """Variants that differ in sizes and rates only are one config once they are shrunk: 'names' -> its spec."""
    specs: dict[str, tuple[str, list[str]]] = {}
    for name, module in MODULES.items():
        for variant in module.VARIANTS:
            spec = f"configs/{name}.py:{variant}"
            config = tiny.tiny_config(spec, Path("store"))
            key = ConfigDict({k: config[k] for k in ("family", "model", "objective")})
            key.model = {
                k: v > 0 if k.endswith("dropout_rate") else v
                for k, v in config.model.items()
                if k not in OF_WIDTH
            }
            key.optimizer = {k: v for k, v in config.optimizer.items() if not isinstance(v, float)}
            specs.setdefault(key.to_json_best_effort(sort_keys=True), (spec, []))[1].append(
                f"{name}:{variant}"
            )
    return {"+".join(variants): spec for spec, variants in specs.values()}


SPECS = distinct_configs()


def test_every_variant_is_covered():
    covered = {name for names in SPECS for name in names.split("+")}
    every = {f"{name}:{variant}" for name in MODULES for variant in MODULES[name].VARIANTS}
    assert covered == every


@pytest.mark.parametrize("names", SPECS)
def test_every_config_trains_two_steps(tmp_path, store, store_with_sentinels, names):
    reads_sentinels = names.startswith(("t5", "bart", "transformer"))
    config = tiny.tiny_config(
        SPECS[names],
        store_with_sentinels if reads_sentinels else store,
        **SENTINELS if reads_sentinels else {},
        num_train_steps=2,
        log_every_steps=1,
        eval__num_batches=1,
        eval__prompts=(),
    )
    metrics = pretrain(config, tmp_path / "run")
    assert 4.0 < metrics["loss"] < 7.5
    assert not any(line.get("skipped") for line in tiny.learned(tmp_path / "run"))


def leaves(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


class Reads(set):
    """Names, and `watch`."""


def record_reads(monkeypatch, *configs):
    """The set of names of leaves that are read from now on; reading a group as a dict reads all of it.

    `read.watch(config)` watches another config, too.
    """
    paths, read = {}, Reads()

    def walk(group, prefix=""):
        for key, value in group.items():
            if isinstance(value, ConfigDict):
                walk(value, f"{prefix}{key}.")
        paths[id(group)] = prefix  # after its items were read here

    read.watch = walk
    for config in configs:
        walk(config)
    get, to_dict = ConfigDict.__getitem__, ConfigDict.to_dict

    def recording_get(self, key):
        if id(self) in paths:
            read.add(paths[id(self)] + str(key))
        return get(self, key)

    def recording_to_dict(self, *args, **kwargs):
        if paths.get(id(self)):  # not the whole config, which is only written to a file
            read.update(paths[id(self)] + name for name in leaves(self))
        with monkeypatch.context() as unpatched:
            unpatched.setattr(ConfigDict, "__getitem__", get)
            return to_dict(self, *args, **kwargs)

    def silently(name):
        original = getattr(ConfigDict, name)

        def quiet(self, *args, **kwargs):
            with monkeypatch.context() as unpatched:
                unpatched.setattr(ConfigDict, "__getitem__", get)
                return original(self, *args, **kwargs)

        monkeypatch.setattr(ConfigDict, name, quiet)

    for whole in ("to_json", "copy_and_resolve_references"):
        silently(whole)
    monkeypatch.setattr(ConfigDict, "__getitem__", recording_get)
    monkeypatch.setattr(ConfigDict, "to_dict", recording_to_dict)
    return read


def check_every_leaf_is_read(tmp_path, monkeypatch, spec, extra=()):
    """A run from raw text and a run from that run's checkpoint together read every leaf."""
    text = tmp_path / "text"
    text.mkdir()
    library = sorted(Path(json.__file__).parent.glob("*.py"))
    for file in library:
        (text / file.name).write_text(file.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    config = tiny.tiny_config(
        spec, text, num_train_steps=2, data__split="tail", data__validation_fraction=0.3
    )
    with config.unlocked():
        for name in extra:
            config[name] = 1
    wanted = set(leaves(config))
    with monkeypatch.context() as patch:
        read = record_reads(patch, config)
        pretrain(config, tmp_path / "run")
    fork = config.copy_and_resolve_references()
    fork.init_from = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        again = record_reads(patch, fork)
        pretrain(fork, tmp_path / "fork")
    unread = sorted(wanted - read - again)
    assert not unread, unread


@pytest.mark.parametrize("spec", ["configs/gpt.py:tiny", "configs/bert.py:tiny"])
def test_every_leaf_of_a_config_is_read(tmp_path, monkeypatch, spec):
    check_every_leaf_is_read(tmp_path, monkeypatch, spec)


def test_the_leaf_law_fails_for_a_field_that_nothing_reads(tmp_path, monkeypatch):
    with pytest.raises(AssertionError, match="decoration"):
        check_every_leaf_is_read(
            tmp_path, monkeypatch, "configs/gpt.py:tiny,optimizer=sgd", extra=("decoration",)
        )


def check_every_leaf_of_fine_tuning_is_read(tmp_path, monkeypatch, store, extra=()):
    """A run with adapters reads every leaf of its config, or of the one that this is completed to."""
    source = tmp_path / "source"
    tiny.save_untrained(tiny.tiny_config("configs/gpt.py:tiny", store), source)
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "aaa,x\nzzz,y\n" * 12, encoding="utf-8")
    config = config_files.read_config(
        f"{tiny.ROOT}/configs/finetune/classification.py:train={rows},num_epochs=1,seq_len=32",
        {"init_from": str(source), "tuning.train": "lora", "log.progress": False},
    )
    with config.unlocked():
        for name in extra:
            config[name] = 1
    prepare = tuning.prepare
    with monkeypatch.context() as patch:
        read = record_reads(patch, config)

        def watched(*args):
            prepared = prepare(*args)
            read.watch(prepared.config)
            return prepared

        patch.setattr(tuning, "prepare", watched)
        finetune(config, tmp_path / "tuned")
    assert not (unread := sorted(set(leaves(config)) - read)), unread


def test_every_leaf_of_a_fine_tuning_config_is_read(tmp_path, monkeypatch, store):
    check_every_leaf_of_fine_tuning_is_read(tmp_path, monkeypatch, store)


def test_the_leaf_law_of_fine_tuning_fails_for_a_field_that_nothing_reads(
    tmp_path, monkeypatch, store
):
    with pytest.raises(AssertionError, match="decoration"):
        check_every_leaf_of_fine_tuning_is_read(tmp_path, monkeypatch, store, ("decoration",))
