"""The command line of conversion, end to end: what it writes is what the entrypoints take."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxlm import build, config_files
from jaxlm.interop import convert
from jaxlm.interop.mapping import BadModel
from jaxlm.interop.source import open_source
from jaxlm.tokenizers import load_tokenizer, train_tokenizer
from tests.interop import tiny_hf
from tests.interop.test_convert import check_round_trip
from tests.tiny import make_store, tiny_config
from tools import convert_checkpoint, fsck

TEXT = "def main(argument):\n    return argument\n" * 20
TOKENIZER = train_tokenizer("byte_bpe", [TEXT], 300, num_sentinels=0)
SIZE = TOKENIZER.vocab_size


def make_source(folder, name="qwen3"):
    """A recorded case with a tokenizer, and as many rows as that has ids."""
    recorded = tiny_hf.read_recorded()[name]
    shapes = {
        key: [SIZE if size == tiny_hf.V else size for size in shape]
        for key, shape in recorded["shapes"].items()
    }
    weights = tiny_hf.make_weights(shapes)
    tiny_hf.write_source(folder, recorded["config"] | {"vocab_size": SIZE}, weights)
    TOKENIZER.save(folder)
    (folder / "jaxlm_tokenizer.json").unlink()
    return folder, weights


def run(capsys, *arguments):
    code = convert_checkpoint.main([*map(str, arguments), "--certificate=round_trip"])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_there_and_back_by_the_command_line(tmp_path, capsys):
    source, weights = make_source(tmp_path / "hf")
    code, out = run(capsys, "from_hf", "--source", source, "--target", tmp_path / "w")
    assert code == 0 and "equal bit by bit" in out
    code, out = run(capsys, "to_hf", "--source", tmp_path / "w", "--target", tmp_path / "out")
    assert code == 0, out
    check_round_trip(weights, tmp_path / "out")
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "README.md"} <= written
    assert {"tokenizer.json", "tokenizer_config.json", "parity.json"} <= written
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["passed"] is True
    assert "Qwen3ForCausalLM" in (tmp_path / "out" / "README.md").read_text()


def test_a_damaged_checkpoint_is_not_converted(tmp_path, capsys):
    source, _ = make_source(tmp_path / "hf")
    run(capsys, "from_hf", "--source", source, "--target", tmp_path / "w")
    assert fsck.main([str(tmp_path / "w")]) == 0
    assert "without checksums" not in capsys.readouterr().out
    item = tmp_path / "w" / "checkpoints" / "0" / "params"
    data = max((p for p in item.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(SystemExit) as end:
        run(capsys, "to_hf", "--source", tmp_path / "w", "--target", tmp_path / "out")
    assert end.value.code == 65 and not (tmp_path / "out").exists()


def test_what_comes_in_is_a_workdir_that_generates(tmp_path, capsys):
    source, weights = make_source(tmp_path / "hf")
    assert run(capsys, "from_hf", "--source", source, "--target", tmp_path / "w")[0] == 0
    loaded = build.load_checkpoint(tmp_path / "w")
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(loaded.params))
    table = np.asarray(loaded.params["embed"]["embedding"])
    np.testing.assert_array_equal(table, weights["model.embed_tokens.weight"])
    assert (
        loaded.tokenizer.encode("def main").tolist()
        == load_tokenizer(source).encode("def main").tolist()
    )
    config = config_files.read_config(str(tmp_path / "w" / "config.json"))
    assert config.init_from == str(tmp_path / "w") and config.seq_len <= config.model.max_len


@pytest.mark.parametrize("name", ["qwen3", "bert_base"])
def test_pretraining_starts_from_a_folder_and_from_what_was_converted(name, tmp_path, capsys):
    """init_from=hf:FOLDER and init_from=W give one state, with the source's tensors in it."""
    source, weights = make_source(tmp_path / "hf", name)
    assert run(capsys, "from_hf", "--source", source, "--target", tmp_path / "w")[0] == 0
    config = config_files.read_config(str(tmp_path / "w" / "config.json"))
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number}\n{TEXT}")
    overrides = {
        "data.sources": (f"text={tmp_path / 'text'}",),
        "data.validation_fraction": 0.3,
        "batch_size": 8,
        "eval.batch_size": 8,
        "seq_len": 16,
        "log.progress": False,
        "num_train_steps": 2,
    }
    states = []
    for start in (f"hf:{source}", str(tmp_path / "w")):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(overrides | {"init_from": start, "tokenizer.path": ""})
        if not start.startswith("hf:"):
            changed.tokenizer.path = str(tmp_path / "w" / "tokenizer")
        made = build.make_run(changed, tmp_path / f"run{len(states)}")
        states.append(build.initial_state(made))
    one, other = (jax.tree.leaves(s.params) for s in states)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    tables = [
        w
        for n, w in weights.items()
        if n.endswith(("embed_tokens.weight", "word_embeddings.weight"))
    ]
    table = states[0].params["embed"]["embedding"]
    np.testing.assert_array_equal(np.asarray(table)[:SIZE], tables[0])


def test_a_run_of_another_shape_gets_a_repair_list(tmp_path):
    source, _ = make_source(tmp_path / "hf")
    config = tiny_config(
        "configs/gpt.py:tiny",
        make_store(tmp_path / "store"),
        init_from=f"hf:{source}",
        tokenizer__path="",
    )
    with config.unlocked():
        config.tokenizer.path = str(tmp_path / "store" / "tokenizer")
        config.model.vocab_size = 400
    made = build.make_run(config, tmp_path / "run")
    with pytest.raises(BadModel) as error:
        build.initial_state(made)
    for part in (
        "model.emb_dim=16: the source has 24",
        "num_layers",
        "up_proj.weight: found [20, 24], expected",
    ):
        assert part in str(error.value)


def test_rows_of_reserved_ids_are_added_on_the_way_in_and_cut_on_the_way_out(tmp_path, capsys):
    source, weights = make_source(tmp_path / "hf", "gpt2")
    path = source / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for entry, name in zip(
        tokenizer["added_tokens"], "abcdefg", strict=True
    ):  # no role is found by name
        del tokenizer["model"]["vocab"][entry["content"]]
        entry["content"] = f"|{name}|"
        tokenizer["model"]["vocab"][entry["content"]] = entry["id"]
    path.write_text(json.dumps(tokenizer))
    (source / "tokenizer_config.json").unlink()
    assert run(capsys, "from_hf", "--source", source, "--target", tmp_path / "w")[0] == 0
    loaded = build.load_checkpoint(tmp_path / "w")
    ours, theirs = (
        np.asarray(loaded.params["embed"]["embedding"]),
        weights["transformer.wte.weight"],
    )
    ids = load_tokenizer(source).vocab_size
    assert len(ours) == ids > len(theirs) == SIZE
    np.testing.assert_array_equal(ours[:SIZE], theirs)
    np.testing.assert_allclose(ours[SIZE:], np.tile(theirs.mean(0), (ids - SIZE, 1)), rtol=1e-5)
    assert run(capsys, "to_hf", "--source", tmp_path / "w", "--target", tmp_path / "out")[0] == 0
    check_round_trip(weights, tmp_path / "out")


def test_problems_are_one_message_and_exit_codes_and_leave_nothing(tmp_path, capsys):
    source, _ = make_source(tmp_path / "hf")
    code, out = run(capsys, "from_hf", "--source", tmp_path / "nowhere", "--target", tmp_path / "w")
    assert code == 2 and "no such folder" in out and "was not written" in out
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    code, out = run(capsys, "from_hf", "--source", source, "--target", tmp_path / "w")
    assert code == 2 and "mamba" in out and "qwen3" in out
    code, out = run(capsys, "to_hf", "--source", tmp_path / "hf", "--target", tmp_path / "out")
    assert code == 2 and "no checkpoint" in out
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_an_option_that_the_family_has_not_is_named(tmp_path, capsys):
    source, _ = make_source(tmp_path / "hf")
    assert run(capsys, "from_hf", "--source", source, "--target", tmp_path / "w")[0] == 0
    path = tmp_path / "w" / "config.json"
    config = json.loads(path.read_text())
    config["model"]["final_softcap"] = 15.0
    path.write_text(json.dumps(config))
    code, out = run(capsys, "to_hf", "--source", tmp_path / "w", "--target", tmp_path / "out")
    assert code == 2 and "final_softcap=15.0" in out
    assert not (tmp_path / "out").exists()


def test_a_failing_certificate_is_exit_code_1_and_nothing_stays(tmp_path, capsys, monkeypatch):
    source, _ = make_source(tmp_path / "hf")
    original = convert._write_parts

    def forgetful(piece, parts, *rest):
        original(piece, [p * (piece.layer != 1) for p in parts], *rest)

    monkeypatch.setattr(convert, "_write_parts", forgetful)
    code, out = run(capsys, "from_hf", "--source", source, "--target", tmp_path / "w")
    assert code == 1 and "model.layers.1.mlp.up_proj.weight" in out
    assert "model.layers.0.mlp.up_proj.weight" not in out
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_half_precision_is_written_when_it_is_asked_for(tmp_path, capsys):
    source, _ = make_source(tmp_path / "hf")
    arguments = ("from_hf", "--source", source, "--target", tmp_path / "w", "--dtype=bfloat16")
    assert run(capsys, *arguments)[0] == 0
    arguments = (
        "to_hf",
        "--source",
        tmp_path / "w",
        "--target",
        tmp_path / "out",
        "--max_shard_gb=0.00001",
    )
    assert run(capsys, *arguments)[0] == 0
    shutil.rmtree(tmp_path / "w")
    found = open_source(tmp_path / "out")
    assert {t.dtype.name for t in found.tensors.values()} == {"bfloat16"}
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
