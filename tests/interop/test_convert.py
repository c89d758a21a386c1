"""Conversion both ways, against outputs and config files that transformers wrote (recorded, so without torch)."""

import dataclasses
import json

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from jaxlm import config_files, interop
from jaxlm.interop import convert, export, mapping, parity
from jaxlm.interop.arrays import open_item
from jaxlm.interop.safetensors_io import BadFile
from jaxlm.interop.source import open_source
from jaxlm.tokenizers import make_tokenizer
from tests.interop import tiny_hf
from tests.oracles import tiny_families
from tests.oracles.recorded import get_logits
from tests.oracles.recorded import read_recorded as read_logits
from tests.tiny import ROOT

TEMPLATES = {
    "gpt": config_files.read_config(str(ROOT / "configs/gpt.py:gpt2")),
    "bert": config_files.read_config(str(ROOT / "configs/bert.py:base")),
    "encoder_decoder": config_files.read_config(str(ROOT / "configs/t5.py:tiny")),
    "bart": config_files.read_config(str(ROOT / "configs/bart.py:tiny")),
    "xlnet": config_files.read_config(str(ROOT / "configs/xlnet.py:base")),
}


# Keys that say one thing in several ways; T5's tie_word_embeddings is always true in transformers 5.
OTHERWISE = ("sliding_window", "max_window_layers", "tie_word_embeddings")


def from_hf(source, target, **options):
    return convert.from_hf(str(source), target, TEMPLATES, against="round_trip", **options)


def to_hf(workdir, target, **options):
    config = config_files.saved_config(workdir / "config.json")
    step_dir = workdir / "checkpoints" / "0"
    return export.to_hf(step_dir, target, config, against="round_trip", **options)


def outputs_of(workdir, family, is_base):
    """What `tiny_hf.run_theirs` gives, by our model of a converted checkpoint."""
    config = config_files.saved_config(workdir / "config.json")
    pairs = 2 if config.objective.name == "mlm_nsp" else 0
    model = convert.make_model(interop.FAMILIES[family], convert.model_config(config), pairs)
    params = parity.load_float32(open_item(workdir / "checkpoints" / "0" / "params"))
    run = parity.run_states if is_base else parity.run_logits
    return run(model, params, tiny_hf.make_batch())


def check_outputs(name, workdir, tolerance=1e-4):
    """float32 outputs are the recorded ones of transformers."""
    recorded = tiny_hf.read_recorded()[name]
    ours = outputs_of(workdir, recorded["config"]["model_type"], name.endswith("_base"))
    for place, theirs in zip(recorded["places"], recorded["outputs"], strict=True):
        np.testing.assert_allclose(ours[tuple(place)], theirs, atol=tolerance, rtol=tolerance)


def check_round_trip(weights, exported):
    """Every tensor of the source is in the export, bit by bit, and nothing else that is no repetition."""
    found = open_source(exported)
    wanted = {
        new: weights[old] for new, old in mapping.canonical_names(found.family, weights).items()
    }
    repeats = tiny_hf.tied_names(found.family)
    assert set(found.tensors) - repeats == set(wanted) - repeats
    for tensor in set(found.tensors) & set(wanted):
        np.testing.assert_array_equal(found.tensors[tensor].read(), wanted[tensor], err_msg=tensor)


@pytest.mark.parametrize("name", tiny_hf.CASES)
def test_outputs_are_transformers_and_every_tensor_comes_back(name, tmp_path):
    source, weights = tiny_hf.write_recorded(tmp_path / "hf", name)
    from_hf(source, tmp_path / "w")
    certificate = to_hf(tmp_path / "w", tmp_path / "out")
    assert certificate["passed"] and certificate["round_trip"]["tensors"] > 10
    check_round_trip(weights, tmp_path / "out")
    recorded = tiny_hf.read_recorded()[name]["config"]
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported["architectures"] == recorded["architectures"]
    for key in exported.keys() & recorded.keys():
        if recorded[key] is not None and key not in OTHERWISE:
            assert exported[key] == recorded[key], key
    check_outputs(name, tmp_path / "w")


@pytest.mark.parametrize("name", tiny_families.TINY)
def test_every_family_and_head_of_a_task_goes_both_ways(name, tmp_path):
    """The cases of the oracles: the recorded logits from the converted checkpoint, and every tensor back."""
    twin = tiny_families.Twin(name)
    weights = tiny_hf.make_weights(twin.shapes)
    from_hf(tiny_hf.write_source(tmp_path / "hf", twin.hf, weights), tmp_path / "w")
    to_hf(tmp_path / "w", tmp_path / "out")
    check_round_trip(weights, tmp_path / "out")
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported["architectures"] == twin.hf["architectures"]
    params = parity.load_float32(open_item(tmp_path / "w" / "checkpoints" / "0" / "params"))
    logits = get_logits(twin.model, params, twin.batch)
    for row, position, *theirs in read_logits()["families"][name]:
        ours = logits[row, position, : len(theirs)]
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def swap(family, one, other):
    """`family` with the names of two rows exchanged: the round trip cannot see that."""
    names = {one: other, other: one}
    rows = tuple(r._replace(theirs=names.get(r.theirs, r.theirs)) for r in family.rows)
    return dataclasses.replace(family, rows=rows)


WRONG = {
    "gate and up exchanged": lambda f: swap(
        f, "model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"
    ),
    "two norms exchanged": lambda f: swap(
        f,
        "model.layers.{layer}.input_layernorm.weight",
        "model.layers.{layer}.post_attention_layernorm.weight",
    ),
    "heads reversed": lambda f: dataclasses.replace(
        f,
        rows=tuple(
            r._replace(transform=reversed_heads()) if r.ours == "layers/attention/query" else r
            for r in f.rows
        ),
    ),
    "another epsilon": lambda f: dataclasses.replace(
        f,
        fields=tuple(
            x._replace(theirs="layer_norm_eps", default=0.1) if x.ours == "norm_eps" else x
            for x in f.fields
        ),
    ),
}


def reversed_heads():
    linear = mapping.linear()
    return dataclasses.replace(
        linear,
        merge=lambda arrays: linear.merge([arrays[0][:, ::-1]]),
        split=lambda tensor, shapes: [linear.split(tensor, shapes)[0][:, ::-1]],
    )


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_table_is_caught(wrong, tmp_path, monkeypatch):
    monkeypatch.setitem(interop.FAMILIES, "llama", WRONG[wrong](interop.FAMILIES["llama"]))
    source, _ = tiny_hf.write_recorded(tmp_path / "hf", "llama")
    from_hf(source, tmp_path / "w")
    with pytest.raises(AssertionError):
        check_outputs("llama", tmp_path / "w")


def test_a_transform_that_loses_something_fails_its_certificate(tmp_path, monkeypatch):
    llama = interop.FAMILIES["llama"]
    lossy = dataclasses.replace(mapping.SAME, merge=lambda arrays: np.round(arrays[0], 1))
    rows = tuple(
        r._replace(transform=lossy) if r.theirs == "model.norm.weight" else r for r in llama.rows
    )
    monkeypatch.setitem(interop.FAMILIES, "llama", dataclasses.replace(llama, rows=rows))
    source, _ = tiny_hf.write_recorded(tmp_path / "hf", "llama")
    with pytest.raises(parity.Failed, match="model.norm.weight"):
        from_hf(source, tmp_path / "w")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_shards_and_half_precision_come_through(tmp_path):
    import ml_dtypes

    recorded = tiny_hf.read_recorded()["qwen3"]
    weights = tiny_hf.make_weights(recorded["shapes"])
    for dtype in (ml_dtypes.bfloat16, np.float16):
        folder = tmp_path / np.dtype(dtype).name
        half = {n: w.astype(dtype) for n, w in weights.items()}
        source = tiny_hf.write_source(folder / "hf", recorded["config"], half, max_shard_bytes=4000)
        assert len(list(source.glob("*.safetensors"))) > 3
        from_hf(source, folder / "w")
        assert (
            config_files.saved_config(folder / "w" / "config.json").param_dtype
            == np.dtype(dtype).name
        )
        to_hf(folder / "w", folder / "out", max_shard_bytes=4000)
        check_round_trip(half, folder / "out")
        index = json.loads((folder / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(w.nbytes for w in half.values())
        names = sorted(p.name for p in (folder / "out").glob("*.safetensors"))
        assert names == sorted(set(index["weight_map"].values()))
        assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"


def test_a_flax_msgpack_is_read_like_the_safetensors(tmp_path):
    import flax.serialization

    for name in ("gpt2", "bert"):
        recorded = tiny_hf.read_recorded()[name]
        weights = tiny_hf.make_weights(recorded["shapes"])
        flat = {}
        for (
            key,
            array,
        ) in weights.items():  # transformers' own conversion: every matrix is transposed
            stem, leaf = key.rsplit(".", 1)
            is_table = stem.endswith(("wte", "wpe")) or "embeddings." in stem and "Norm" not in stem
            if leaf == "weight":
                leaf = "embedding" if is_table else "kernel" if array.ndim == 2 else "scale"
            flat[f"{stem}.{leaf}".replace(".", "/")] = array.T if leaf == "kernel" else array
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(recorded["config"]))
        blob = flax.serialization.msgpack_serialize(unflatten_dict(flat, sep="/"))
        (folder / "flax_model.msgpack").write_bytes(blob)
        from_hf(folder, tmp_path / f"{name}_w")
        check_outputs(name, tmp_path / f"{name}_w")


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_exported_model_writes_and_ends_dialogues_as_the_tuned_run_does(tmp_path):
    """The template goes along; the end is in config.json, and in the generation_config.json that the source came with."""
    source, _ = tiny_hf.write_recorded(tmp_path / "hf", "gpt2")
    from_hf(source, tmp_path / "w")
    (tmp_path / "w" / "task.json").write_text(json.dumps({"end_id": 7, "template": "{{ é }}"}))
    to_hf(tmp_path / "w", tmp_path / "plain")
    make_tokenizer("bytes", num_sentinels=0).save(tmp_path / "w" / "tokenizer")
    kept = tmp_path / "w" / "tokenizer" / "huggingface"
    kept.mkdir()
    (kept / "generation_config.json").write_text('{"eos_token_id": [2, 3], "top_k": 5}')
    to_hf(tmp_path / "w", tmp_path / "kept")
    for folder, others in (
        ("plain", dict(bos_token_id=1, pad_token_id=0)),
        ("kept", dict(top_k=5)),
    ):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        generation = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert config["eos_token_id"] == 7 and generation == {**others, "eos_token_id": 7}
        template = tmp_path / folder / "chat_template.jinja"
        assert template.read_text(encoding="utf-8") == "{{ é }}"
    rewrite(tmp_path / "w" / "task.json", end_id=tiny_hf.V)
    with pytest.raises(mapping.BadModel, match="answers end with the id 37, which was appended"):
        to_hf(tmp_path / "w", tmp_path / "refused")


def test_a_tokenizer_whose_ids_mean_another_model_is_refused(tmp_path):
    """RoBERTa counts positions from pad_token_id + 1: written beside a tokenizer with another pad it would read other rows."""
    twin = tiny_families.Twin("roberta")
    weights = tiny_hf.make_weights(twin.shapes)
    from_hf(tiny_hf.write_source(tmp_path / "hf", twin.hf, weights), tmp_path / "w")
    manifest = tmp_path / "w" / "checkpoints" / "0" / "manifest" / "metadata"
    came_from = json.loads(manifest.read_text())["huggingface"]
    pad = came_from["token_ids"]["pad_token_id"]
    other = came_from | {"token_ids": dict(pad_token_id=pad + 1, eos_token_id=3)}
    rewrite(manifest, huggingface=other)
    with pytest.raises(mapping.BadModel, match=f"has pad_token_id {pad + 1}, not {pad} as the"):
        to_hf(tmp_path / "w", tmp_path / "out")


@pytest.mark.parametrize("source, target", [("w", "gs://bucket/model"), ("gs://bucket/w", "out")])
def test_a_bucket_is_refused_and_not_taken_for_a_folder(source, target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        mapping.BadModel, match="gs://bucket/.* is on a bucket: name a local folder"
    ):
        export.to_hf(source, target, None)
    if "://" in target:
        with pytest.raises(mapping.BadModel, match="is on a bucket"):
            convert.from_hf(source, target, {})
    assert not list(tmp_path.iterdir())


# --- what cannot be converted -----------------------------------------------------------------------------------------


def broken(tmp_path, name="llama", *, config=None, weights=None):
    """Converts a recorded case with changes; returns the error's text after a look at what is left behind."""
    recorded = tiny_hf.read_recorded()[name]
    tensors = tiny_hf.make_weights(recorded["shapes"])
    source = tiny_hf.write_source(
        tmp_path / "hf", recorded["config"] | (config or {}), (weights or (lambda w: w))(tensors)
    )
    with pytest.raises((mapping.BadModel, BadFile)) as error:
        from_hf(source, tmp_path / "w")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    return str(error.value)


def test_an_unknown_architecture_lists_the_known_ones(tmp_path):
    message = broken(tmp_path, config={"model_type": "mamba"})
    assert "mamba" in message and all(family in message for family in interop.FAMILIES)


def test_every_missing_extra_and_misshaped_tensor_is_listed(tmp_path):
    def change(w):
        w = dict(w)
        del w["model.norm.weight"], w["model.layers.1.mlp.up_proj.weight"]
        w["model.layers.0.self_attn.q_proj.weight"] = w[
            "model.layers.0.self_attn.q_proj.weight"
        ].T.copy()
        w["model.layers.3.mlp.up_proj.weight"] = w["lm_head.weight"]
        return w

    message = broken(tmp_path, weights=change)
    for line in (
        "model.norm.weight: missing",
        "model.layers.1.mlp.up_proj.weight: missing, expected [20, 24]",
        "model.layers.0.self_attn.q_proj.weight: found [24, 40], expected [40, 24]",
        "model.layers.3.mlp.up_proj.weight: [37, 24] has no place",
    ):
        assert line in message, message


@pytest.mark.parametrize(
    "key", ["vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size"]
)
@pytest.mark.parametrize("value", [10**12, -1, 1.5, True, "8", [3], {"a": 1}])
def test_absurd_sizes_are_refused_before_anything_is_allocated(key, value, tmp_path):
    assert key in broken(tmp_path, config={key: value})


def test_large_sizes_that_the_tensors_do_not_have_are_refused(tmp_path):
    message = broken(tmp_path, config={"hidden_size": 1 << 26, "intermediate_size": 1 << 26})
    assert "expected [67108864, 67108864]" in message


def test_everything_that_a_config_asks_for_in_vain_is_listed(tmp_path):
    message = broken(
        tmp_path,
        "gpt2",
        config={
            "activation_function": "mish",
            "scale_attn_by_inverse_layer_idx": True,
            "n_layer": None,
        },
    )
    for part in ("mish", "scale_attn_by_inverse_layer_idx=True", "n_layer: missing"):
        assert part in message


def test_an_output_table_that_should_be_tied_and_is_not_is_refused(tmp_path):
    def add(w):
        return w | {"lm_head.weight": w["model.embed_tokens.weight"] + 1}

    assert "lm_head.weight: should repeat" in broken(tmp_path, "qwen3", weights=add)


def test_an_output_table_that_is_equal_and_buffers_are_taken(tmp_path):
    recorded = tiny_hf.read_recorded()["qwen3"]
    weights = tiny_hf.make_weights(recorded["shapes"])
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    from_hf(tiny_hf.write_source(tmp_path / "hf", recorded["config"], weights), tmp_path / "w")
    check_outputs("qwen3", tmp_path / "w")


def test_old_names_of_berts_norms_are_read(tmp_path):
    recorded = tiny_hf.read_recorded()["bert_pretraining"]
    weights = tiny_hf.make_weights(recorded["shapes"])
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): w
        for n, w in weights.items()
    }
    from_hf(tiny_hf.write_source(tmp_path / "hf", recorded["config"], old), tmp_path / "w")
    check_outputs("bert_pretraining", tmp_path / "w")


def test_a_target_that_exists_is_refused_and_left_as_it_is(tmp_path):
    source, _ = tiny_hf.write_recorded(tmp_path / "hf", "gpt2")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="exists"):
        from_hf(source, tmp_path / "w")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "w"]
    assert (tmp_path / "w" / "mine").read_text() == "precious"


def test_a_pickle_is_refused_and_the_reason_is_said(tmp_path):
    source, _ = tiny_hf.write_recorded(tmp_path / "hf", "gpt2")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(BadFile, match="can run any code.*--allow_pickle"):
        from_hf(source, tmp_path / "w")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_to_hf_refuses_every_option_that_the_family_has_not_by_name():
    options = dict(vocab_size=9, emb_dim=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4)
    ours = dict(qk_norm=True, final_softcap=30.0, position="rotary", norm="rms_norm")
    config = mapping.TransformerConfig(**options, mlp_dim=8, max_len=8, activation="swiglu", **ours)
    with pytest.raises(mapping.BadModel) as error:
        mapping.config_to_hf(interop.FAMILIES["gpt2"], config)
    for name in (*ours, "activation", "qkv_bias", "norm_bias", "mlp_bias", "out_bias"):
        assert name in str(error.value)
    with pytest.raises(mapping.BadModel, match="final_softcap"):
        mapping.config_to_hf(interop.FAMILIES["qwen3"], config)
    plain = dataclasses.replace(config, final_softcap=0.0)
    assert mapping.config_to_hf(interop.FAMILIES["qwen3"], plain)["num_key_value_heads"] == 1
    assert export.choose_family("", "gpt", plain).model_type == "qwen3"


def test_two_options_that_share_a_key_must_agree():
    fields = dict(vocab_size=9, emb_dim=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8)
    classic = dict(norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True)
    config = mapping.TransformerConfig(**fields, mlp_dim=8, max_len=8, **classic)
    with pytest.raises(mapping.BadModel, match="head_dim=8"):
        mapping.config_to_hf(interop.FAMILIES["gpt2"], config)


TRANSFORMS = {
    "same": (mapping.SAME, [(3, 4)]),
    "flat": (mapping.FLAT, [(3, 4)]),
    "linear": (mapping.linear(), [(5, 3, 4)]),
    "linear from heads": (mapping.linear(2), [(3, 4, 5)]),
    "conv1d": (mapping.conv1d(), [(5, 3, 4)]),
    "fused": (mapping.fused(mapping.conv1d(), axis=1), [(5, 3, 4), (5, 1, 4), (5, 1, 4)]),
    "fused rows": (mapping.fused(mapping.linear()), [(5, 6), (5, 2)]),
    "fused biases": (mapping.fused(mapping.FLAT), [(3, 4), (1, 4)]),
}


def check_inverse(transform, shapes):
    """split undoes merge bit by bit, every element has one place, and the shape is the one foretold."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in shapes]
    theirs = transform.merge(arrays)
    assert theirs.shape == transform.shape(shapes)
    assert sorted(theirs.ravel()) == sorted(np.concatenate([a.ravel() for a in arrays]))
    for array, back in zip(arrays, transform.split(theirs, shapes), strict=True):
        np.testing.assert_array_equal(array, back)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_invertible(name):
    check_inverse(*TRANSFORMS[name])


def test_a_transform_that_is_none_would_be_caught():
    forgets = dataclasses.replace(
        mapping.linear(), split=lambda tensor, shapes: [tensor.reshape(shapes[0])]
    )
    with pytest.raises(AssertionError):
        check_inverse(forgets, [(5, 3, 4)])


# --- into a model that exists already ---------------------------------------------------------------------------------


def load(source, name, **head):
    """`load_params` of a folder into a new model with a task's head (or without one); (params, the twin)."""
    twin = tiny_families.Twin(name, **head)
    wanted = unflatten_dict(
        {p: np.broadcast_to(np.float32(0), shape) for p, shape in twin.paths.items()}, sep="/"
    )
    return convert.load_params(str(source), twin.config, wanted).params, twin


def test_a_new_head_stands_on_a_body_of_published_parameters(tmp_path):
    """A masked-LM checkpoint into a classifier: its layers and its pooler, a new last layer, always the same one."""
    shapes = tiny_hf.read_recorded()["bert_pretraining"]["shapes"]
    body = tiny_families.Twin("bert_sequence")
    weights = tiny_hf.make_weights(body.shapes)
    del weights["classifier.weight"], weights["classifier.bias"]
    heads = {n: (20, 32) if "weight" in n else (20,) for n in shapes if n.startswith("cls.")}
    plain = body.hf | {"architectures": ["BertForPreTraining"]}
    source = tiny_hf.write_source(tmp_path / "hf", plain, weights | tiny_hf.make_weights(heads))
    params, twin = load(source, "bert_sequence")
    expected = twin(tiny_hf.make_weights(twin.shapes))
    flat, wanted = convert.flatten(params), convert.flatten(expected)
    assert flat.keys() == wanted.keys()
    for path in flat.keys() - {"head/out/kernel", "head/out/bias"}:
        np.testing.assert_array_equal(flat[path], wanted[path], err_msg=path)
    assert 0 < np.std(flat["head/out/kernel"]) < 0.1 and not flat["head/out/bias"].any()
    again, _ = load(source, "bert_sequence")
    np.testing.assert_array_equal(again["head"]["out"]["kernel"], flat["head/out/kernel"])


@pytest.mark.parametrize("name", ["bert_sequence", "modernbert_tokens", "llama_spans"])
def test_a_fine_tuned_head_comes_along_where_the_model_has_it(name, tmp_path):
    twin = tiny_families.Twin(name)
    weights = tiny_hf.make_weights(twin.shapes)
    params, _ = load(tiny_hf.write_source(tmp_path / "hf", twin.hf, weights), name)
    flat, wanted = convert.flatten(params), convert.flatten(twin(weights))
    for piece in twin.pieces:
        for path in piece.paths:
            if piece.layer in (None, 1):
                at = ... if piece.layer is None else piece.layer
                np.testing.assert_array_equal(flat[path][at], wanted[path][at], err_msg=path)


def test_a_head_for_another_number_of_classes_is_new_and_named(tmp_path):
    twin = tiny_families.Twin("bert_sequence")
    source = tiny_hf.write_source(tmp_path / "hf", twin.hf, tiny_hf.make_weights(twin.shapes))
    other = tiny_families.Twin("bert_sequence", num_classes=5)
    wanted = unflatten_dict({p: np.zeros(s, np.float32) for p, s in other.paths.items()}, sep="/")
    weights = convert.load_params(str(source), other.config, wanted)
    out = ["head/out/bias", "head/out/kernel"]
    assert weights.mismatched == out and weights.new == out and weights.commit == ""
    assert weights.dropped == ["classifier.bias", "classifier.weight"]
    assert "head/dense" in weights.restored and "embed/embedding" in weights.restored
    assert weights.params["head"]["out"]["kernel"].shape == (32, 5)


def test_a_missing_layer_is_not_initialised_in_silence(tmp_path):
    twin = tiny_families.Twin("bert_sequence")
    weights = tiny_hf.make_weights(twin.shapes)
    lost = next(name for name in weights if "layer.1.output.dense.weight" in name)
    del weights[lost]
    source = tiny_hf.write_source(tmp_path / "hf", twin.hf, weights)
    with pytest.raises(mapping.BadModel, match=f"{lost}: missing"):
        load(source, "bert_sequence")
