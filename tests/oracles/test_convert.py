"""Conversion against transformers itself: both ways, and what AutoModel and AutoTokenizer make of the export."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import build, config_files, interop
from jaxlm.inference import decode
from jaxlm.inference.sampling import make_sampling
from jaxlm.interop import convert, export, mapping, parity
from jaxlm.interop.arrays import create_item
from jaxlm.models import GPT, TransformerConfig
from jaxlm.tokenizers import train_tokenizer
from tests.interop import tiny_hf
from tests.interop.test_convert import TEMPLATES, check_outputs
from tests.interop.test_tokenizer_files import TEXTS
from tests.models.tiny import init_params
from tests.oracles import tiny_families
from tests.oracles.tiny_models import random_weights

pytestmark = pytest.mark.oracles
MISSING = "missing: bash tools/check.sh --oracles"
torch = pytest.importorskip("torch", reason=MISSING)
transformers = pytest.importorskip("transformers", reason=MISSING)


def from_hf(source, target, against="transformers", **options):
    return convert.from_hf(str(source), target, TEMPLATES, against=against, **options)


def to_hf(workdir, target, **options):
    config = config_files.saved_config(workdir / "config.json")
    return export.to_hf(
        workdir / "checkpoints" / "0", target, config, against="transformers", **options
    )


def check_both_ways(original, tmp_path):
    """The certificates hold, and the exported model is, tensor by tensor, the original."""
    original.save_pretrained(tmp_path / "hf")
    into = from_hf(tmp_path / "hf", tmp_path / "w")
    out = to_hf(tmp_path / "w", tmp_path / "out")
    for certificate in (into, out):
        assert certificate["passed"] and certificate["max_abs_difference"] < 1e-4
        assert certificate["top1_agreement"] == 1.0
    again, about = type(original).from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not about["missing_keys"] and not about["unexpected_keys"]
    theirs, ours = original.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert torch.equal(tensor, ours[key]), key
    return again.eval()


def make_tiny_family(name):
    """transformers' model of a case of `tiny_families`, with weights that matter."""
    tiny = tiny_families.TINY[name]
    config = transformers.AutoConfig.for_model(tiny.model_type, **tiny.config)
    model = getattr(transformers, tiny.architecture)(config)
    weights = random_weights({key: p.shape for key, p in model.named_parameters()})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[key]))
    return model.eval()


@pytest.mark.parametrize("name", tiny_families.TINY)
def test_every_family_and_head_of_a_task_goes_both_ways(name, tmp_path):
    check_both_ways(make_tiny_family(name), tmp_path)


@pytest.mark.parametrize("name", tiny_hf.CASES)
def test_every_case_goes_both_ways(name, tmp_path):
    original = tiny_hf.make_theirs(name)
    again = check_both_ways(original, tmp_path)
    np.testing.assert_array_equal(tiny_hf.run_theirs(original), tiny_hf.run_theirs(again))
    check_outputs(name, tmp_path / "w")


@pytest.mark.parametrize("name", tiny_hf.CASES)
def test_the_recorded_cases_are_still_what_transformers_gives(name):
    from tests.interop import record

    now, recorded = record.record(name), tiny_hf.read_recorded()[name]
    assert now["shapes"] == recorded["shapes"]
    assert now["config"] | {"transformers_version": 0} == recorded["config"] | {
        "transformers_version": 0
    }
    np.testing.assert_allclose(now["outputs"], recorded["outputs"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_wrong_layer_fails_the_certificate_which_names_it(layer, tmp_path, monkeypatch):
    """A layer whose gate and up were exchanged comes back as it was, but computes something else."""
    tiny_hf.make_theirs("llama").save_pretrained(tmp_path / "hf")
    original = mapping.bind

    def exchanged(*args):
        names = {
            f"model.layers.{layer}.mlp.{a}_proj.weight": f"model.layers.{layer}.mlp.{b}_proj.weight"
            for a, b in (("gate", "up"), ("up", "gate"))
        }
        return [dataclasses.replace(p, name=names.get(p.name, p.name)) for p in original(*args)]

    monkeypatch.setattr(convert, "bind", exchanged)
    with pytest.raises(parity.Failed, match=f"first layer that diverges is {layer + 1}"):
        from_hf(tmp_path / "hf", tmp_path / "w")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("stack, part, layer", [("encoder", 1, 1), ("decoder", 2, 2)])
def test_a_wrong_layer_of_either_stack_is_named(stack, part, layer, tmp_path, monkeypatch):
    tiny_hf.make_theirs("t5_11").save_pretrained(tmp_path / "hf")
    original, where = mapping.bind, f"{stack}.block.{layer - 1}.layer.{part}.DenseReluDense."

    def exchanged(*args):
        names = {f"{where}wi_{a}.weight": f"{where}wi_{1 - a}.weight" for a in (0, 1)}
        return [dataclasses.replace(p, name=names.get(p.name, p.name)) for p in original(*args)]

    monkeypatch.setattr(convert, "bind", exchanged)
    with pytest.raises(parity.Failed, match=f"first layer that diverges is {stack} {layer}"):
        from_hf(tmp_path / "hf", tmp_path / "w")


def test_a_pickle_is_read_only_when_it_is_allowed(tmp_path):
    model = tiny_hf.make_theirs("gpt2")
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="allow_pickle"):
        from_hf(tmp_path / "hf", tmp_path / "w")
    from_hf(tmp_path / "hf", tmp_path / "w", allow_pickle=True)
    check_outputs("gpt2", tmp_path / "w")


# Of the shape of configs/gpt.py:tiny, whose exports are Qwen3s; with its own tokenizer.
QWEN3 = dict(
    emb_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    mlp_dim=40,
    max_len=64,
    norm="rms_norm",
    norm_eps=1e-6,
    position="rotary",
    activation="swiglu",
    qk_norm=True,
)


def make_workdir(folder, tokenizer, **options):
    """A run's folder with random parameters: what pretraining leaves."""
    config = TransformerConfig(vocab_size=tokenizer.vocab_size, init_std=0.3, **options)
    template = TEMPLATES["gpt"].copy_and_resolve_references()
    with template.unlocked():
        own = dataclasses.asdict(config)
        template.model = {k: v for k, v in own.items() if k not in convert.EXECUTION}
        template.seq_len = 64
    model = GPT(config)
    params = init_params(model, {"tokens": jnp.zeros((1, 4), jnp.int32)})
    flat = convert.flatten(params)
    step_dir = folder / "checkpoints" / "0"
    step_dir.mkdir(parents=True)
    arrays = create_item(step_dir / "params", {k: v.shape for k, v in flat.items()}, np.float32)
    for path, array in arrays.items():
        array.write(..., np.asarray(flat[path]))
    build.write_config(template, folder / "config.json")
    tokenizer.save(folder / "tokenizer")
    (step_dir / "manifest").mkdir()
    (step_dir / "manifest" / "metadata").write_text(json.dumps({"step": 0}))
    return model, params


EXPERTS = dict(num_experts=6, experts_per_token=2)


@pytest.mark.parametrize(
    "kind, experts", [("byte_bpe", {}), ("bytes", {}), ("unigram", {}), ("byte_bpe", EXPERTS)]
)
def test_an_exported_run_generates_the_same_greedy_text_in_transformers(kind, experts, tmp_path):
    tokenizer = train_tokenizer(kind, TEXTS, 500, num_sentinels=2)
    model, params = make_workdir(tmp_path / "w", tokenizer, **QWEN3 | experts)
    to_hf(tmp_path / "w", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == ("Qwen3MoeForCausalLM" if experts else "Qwen3ForCausalLM")
    for prompt in ("def main(", "import os\n\n", "class Ünïcode 漢字:"):
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
        batch = reader(prompt, return_tensors="pt")
        assert batch["input_ids"][0].tolist() == ids
        (continuation,) = decode.generate(
            decode.make_decoder(model, tokenizer.vocab_size),
            params,
            [np.array(ids, np.int32)],
            max_new_tokens=16,
            max_len=64,
            sampling=make_sampling(temperature=0),
            eos_id=tokenizer.eos_id,
        )
        new = continuation.tokens
        written = theirs.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=16,
            do_sample=False,
        )[0, len(ids) :]
        assert written[: len(new)].tolist() == new.tolist()
        if kind != "unigram":  # of bytes that are no UTF-8 it shows another number of U+FFFD
            assert reader.decode(written, skip_special_tokens=True) == tokenizer.decode(new)


def test_an_exported_run_comes_back_as_it_was(tmp_path):
    tokenizer = train_tokenizer("byte_bpe", TEXTS, 500, num_sentinels=0)
    _, params = make_workdir(tmp_path / "w", tokenizer, **QWEN3)
    to_hf(tmp_path / "w", tmp_path / "out")
    from_hf(tmp_path / "out", tmp_path / "w2")
    loaded = build.load_checkpoint(tmp_path / "w2")
    for path, array in convert.flatten(loaded.params).items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(convert.flatten(params)[path]))
    assert loaded.tokenizer.encode("def main(").tolist() == tokenizer.encode("def main(").tolist()
    assert interop.FAMILIES["qwen3"].model == loaded.config.family
