"""What becomes of a pretrained ELECTRA: fine-tuning and export take its discriminator and leave the generator."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxlm import build, config_files, program, tuning
from jaxlm.interop import export
from jaxlm.interop.arrays import open_item
from jaxlm.interop.source import open_source
from jaxlm.models import BERT, ELECTRA, Head, TransformerConfig
from jaxlm.parallel import mesh as meshes
from jaxlm.tokenizers import make_tokenizer
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.state import TrainState
from tests import tiny
from tests.models.tiny import init_params


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """As a run leaves it, but with parameters that nothing has trained."""
    folder = tmp_path_factory.mktemp("electra") / "run"
    changes = tiny.OVERRIDES | {"model.embed_factor_dim": 12}
    config = config_files.read_config(str(tiny.ROOT / "configs/electra.py:tiny"), changes)
    tokenizer = make_tokenizer("bytes", num_sentinels=0)
    tokenizer.save(folder / "tokenizer")
    model = ELECTRA(TransformerConfig(**config.model), **config.generator)
    params = init_params(model, {"tokens": jnp.zeros((1, 4), jnp.int32)})
    state = TrainState(jnp.int32(0), params, {}, skipped=jnp.int32(0))
    about = {"config": json.loads(config.to_json()), "tokenizer_sha256": tokenizer.sha256}
    checkpoints = Checkpoints(folder)
    checkpoints.save(0, state, about, None)
    checkpoints.wait()
    checkpoints.close()
    build.write_config(config, folder / "config.json")
    return folder


def stored(workdir):
    arrays = open_item(workdir / "checkpoints" / "0" / "params")
    return {path: array.read() for path, array in arrays.items()}


def check_export(workdir, target, against):
    config = config_files.saved_config(workdir / "config.json")
    certificate = export.to_hf(workdir / "checkpoints" / "0", target, config, against=against)
    about = json.loads((target / "config.json").read_text())
    assert about["architectures"] == ["ElectraForPreTraining"] and about["embedding_size"] == 12
    theirs, ours = open_source(target).tensors, stored(workdir)
    np.testing.assert_array_equal(
        theirs["discriminator_predictions.dense.weight"].read(), ours["rtd_head/dense"].T
    )
    table = ours["embed/embedding"]
    found = theirs["electra.embeddings.word_embeddings.weight"].read()
    np.testing.assert_array_equal(found, table[: len(found)])
    assert not [name for name in theirs if "generator" in name]
    return certificate


def test_an_export_is_the_discriminator(workdir, tmp_path):
    assert check_export(workdir, tmp_path / "hf", "round_trip")["passed"]


@pytest.mark.oracles
def test_an_exported_discriminator_has_the_logits_of_transformers(workdir, tmp_path):
    pytest.importorskip("torch", reason="torch is missing: bash tools/check.sh --oracles")
    certificate = check_export(workdir, tmp_path / "hf", "transformers")
    assert certificate["compared"] == "head" and certificate["max_abs_difference"] < 1e-4


def test_fine_tuning_starts_from_the_discriminators_body_with_electras_heads(workdir):
    source = tuning.open_source(str(workdir))
    assert (source.family, source.hf_family) == ("bert", "electra")
    config = TransformerConfig(**source.model)
    model = BERT(config, head=Head(config, 3, pooling="first", transform="gelu"))
    boxed = program.abstract_params(model, program.ONE_TOKEN)
    wanted = program.sharded_shapes(meshes.make_mesh(devices=jax.devices()[:1]), boxed)
    arrays, repair, _ = tuning.read_weights(source, wanted)
    body = {path for path in flatten_dict(wanted, sep="/") if not path.startswith("head/")}
    assert set(repair.restored) == set(arrays) == body and not repair.mismatched
    assert all(path.startswith("head/") for path in repair.new)
    assert all(path.startswith(("generator/", "rtd_head/")) for path in repair.dropped)
    np.testing.assert_array_equal(arrays["embed/embedding"], stored(workdir)["embed/embedding"])
