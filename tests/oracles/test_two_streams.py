"""XLNet's query stream gives transformers' logits, in any order."""

import json

import numpy as np
import pytest

from jaxlm.interop import convert
from tests.interop.test_convert_families import TEMPLATES
from tests.oracles import tiny_families as families
from tests.oracles import two_streams
from tests.oracles.recorded import get_logits

pytestmark = pytest.mark.oracles
pytest.importorskip("torch", reason="torch is missing: bash tools/check.sh --oracles")
pytest.importorskip("transformers", reason="transformers is missing: bash tools/check.sh --oracles")


@pytest.mark.parametrize("use_types", [False, True])
def test_the_query_stream_has_hugging_faces_logits(use_types):
    batch, twin = two_streams.make_batch(use_types), families.Twin("xlnet")
    weights, theirs = two_streams.run_theirs(batch)
    ours = get_logits(twin.model, twin(weights), batch)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_classifier_that_reads_the_last_place_has_a_certificate(tmp_path):
    import transformers

    options = families.XLNET | families.THREE
    config = transformers.XLNetConfig(**options, initializer_range=0.3)
    transformers.XLNetForSequenceClassification(config).save_pretrained(tmp_path / "hf")
    certificate = convert.from_hf(
        str(tmp_path / "hf"), tmp_path / "w", TEMPLATES, against="transformers"
    )
    assert certificate["compared"] == "head" and certificate["max_abs_difference"] < 1e-4


def test_the_recorded_logits_are_still_what_transformers_gives():
    _, theirs = two_streams.run_theirs(two_streams.make_batch())
    recorded = np.array(json.loads(two_streams.PATH.read_text()))
    theirs = theirs.reshape(-1, theirs.shape[-1])[:, : recorded.shape[1]]
    np.testing.assert_allclose(theirs, recorded, atol=1e-5, rtol=1e-4)
