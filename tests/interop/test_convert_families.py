"""Folders of every family, with their heads, become workdirs and folders again."""

import json

import numpy as np
import pytest

from jaxlm import config_files
from jaxlm.interop import FAMILIES, convert, export, parity
from jaxlm.interop.mapping import BadModel
from jaxlm.interop.source import open_source
from tests.interop import tiny_hf
from tests.interop.test_convert import TEMPLATES
from tests.oracles.tiny_families import TINY, Twin
from tests.oracles.tiny_models import random_weights

# One of each kind of table and head; the oracle lane takes them all.
NAMES = ["roberta", "electra_discriminator", "modernbert", "gemma3", "albert"]
NAMES += ["modernbert_sequence", "llama_spans", "xlnet"]


def both_ways(folder, name, *, against="round_trip", weights=None):
    """The two certificates of folder/hf -> folder/w -> folder/out, and the weights that went in."""
    twin = Twin(name)
    weights = weights or random_weights(twin.shapes)
    tiny_hf.write_source(folder / "hf", twin.hf, weights)
    into = convert.from_hf(str(folder / "hf"), folder / "w", TEMPLATES, against=against)
    config = config_files.saved_config(folder / "w" / "config.json")
    step_dir = folder / "w" / "checkpoints" / "0"
    out = export.to_hf(step_dir, folder / "out", config, against=against)
    return into, out, weights


def check_return(folder, name, **options):
    into, out, weights = both_ways(folder, name, **options)
    assert into["passed"] and out["passed"]
    exported = open_source(folder / "out")
    assert exported.tensors.keys() - exported.family.repeats.keys() == weights.keys()
    for key, tensor in weights.items():
        np.testing.assert_array_equal(exported.tensors[key].read(), tensor, err_msg=key)
    written = json.loads((folder / "out" / "config.json").read_text())
    assert written["architectures"] == [TINY[name].architecture]
    for key in written.keys() & TINY[name].config.keys():
        assert written[key] == TINY[name].config[key], key
    return into, out


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_comes_back_with_every_tensor_its_class_and_its_labels(name, tmp_path):
    check_return(tmp_path, name)


@pytest.mark.oracles
@pytest.mark.parametrize("name", TINY)
def test_the_certificate_of_a_family_holds_against_transformers(name, tmp_path):
    pytest.importorskip("torch", reason="torch is missing: bash tools/check.sh --oracles")
    for certificate in check_return(tmp_path, name, against="transformers"):
        assert certificate["compared"] == ("head" if Twin(name).head else "logit")
        assert certificate["max_abs_difference"] < 1e-4


@pytest.mark.oracles
@pytest.mark.parametrize("name", ["roberta", "llama_sequence"])
def test_the_certificate_fails_if_padding_is_another_id_than_theirs(name, tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="torch is missing: bash tools/check.sh --oracles")
    make_batch = parity.make_batch
    monkeypatch.setattr(parity, "make_batch", lambda t, v, m, pad_id: make_batch(t, v, m, 0))
    with pytest.raises(parity.Failed):
        both_ways(tmp_path, name, against="transformers")


def test_a_missing_part_of_a_head_is_listed_and_nothing_stays(tmp_path):
    weights = random_weights(Twin("bert_sequence").shapes)
    del weights["classifier.bias"]
    with pytest.raises(BadModel, match=r"classifier.bias: missing, expected \[3\]"):
        both_ways(tmp_path, "bert_sequence", weights=weights)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_pooler_that_a_class_does_not_use_is_passed_over(tmp_path):
    weights = random_weights(Twin("bert_tokens").shapes)
    extra = {"bert.pooler.dense.weight": np.zeros((32, 32), np.float32)}
    into, out, _ = both_ways(tmp_path, "bert_tokens", weights=weights | extra)
    assert into["passed"] and extra.keys() & open_source(tmp_path / "out").tensors.keys() == set()


BASES = {
    "RobertaModel": "roberta",
    "ElectraModel": "electra_generator",
    "DistilBertModel": "distilbert",
    "ModernBertModel": "modernbert",
    "MistralModel": "mistral",
    "Gemma2Model": "gemma2",
    "Gemma3TextModel": "gemma3",
    "AlbertModel": "albert",
    "AlbertForPreTraining": "albert",
}


@pytest.mark.oracles
@pytest.mark.parametrize("name", BASES)
def test_a_base_model_with_its_pooler_comes_back_as_it_was(name, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is missing: bash tools/check.sh --oracles")
    transformers = pytest.importorskip("transformers")
    twin = Twin(BASES[name])
    about = {k: v for k, v in twin.hf.items() if k not in ("model_type", "architectures")}
    config = transformers.AutoConfig.for_model(twin.tiny.model_type, **about)
    model = getattr(transformers, name)(config).eval()
    weights = random_weights({key: tuple(p.shape) for key, p in model.named_parameters()})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[key]))
    model.save_pretrained(tmp_path / "hf")
    into = convert.from_hf(str(tmp_path / "hf"), tmp_path / "w", TEMPLATES, against="transformers")
    run_config = config_files.saved_config(tmp_path / "w" / "config.json")
    step_dir = tmp_path / "w" / "checkpoints" / "0"
    out = export.to_hf(step_dir, tmp_path / "out", run_config, against="transformers")
    assert into["max_abs_difference"] < 1e-4 and out["max_abs_difference"] < 1e-4
    again, about = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"]
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


def test_a_head_that_no_class_has_is_refused():
    with pytest.raises(BadModel, match="no class with the heads.*nsp"):
        FAMILIES["roberta"].architecture({"mlm", "pooler", "nsp"})
