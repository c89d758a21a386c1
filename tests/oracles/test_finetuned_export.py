"""What transformers makes of an exported fine-tuned model: the logits of ours with its adapters apart."""

import jax
import numpy as np
import pytest

from tests.interop.finetuned_run import LABELS, FineTuned

pytestmark = pytest.mark.oracles
MISSING = "missing: bash tools/check.sh --oracles"
torch = pytest.importorskip("torch", reason=MISSING)
transformers = pytest.importorskip("transformers", reason=MISSING)


@pytest.mark.parametrize("name", ["bert_sequence", "distilbert_sequence", "gpt2_sequence"])
def test_an_exported_classifier_with_merged_adapters_gives_the_same_logits(name, tmp_path):
    run = FineTuned(name)
    certificate, folder = run.export(tmp_path, against="transformers")
    assert certificate["passed"] and certificate["compared"] == "head"
    theirs, about = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not about["missing_keys"] and not about["unexpected_keys"]
    assert theirs.config.id2label == dict(enumerate(LABELS))
    theirs.config.pad_token_id = run.twin.hf.get("pad_token_id", 0)
    batch = run.twin.batch
    with torch.no_grad():
        logits = theirs.eval()(
            input_ids=torch.from_numpy(batch["tokens"]).long(),
            attention_mask=torch.from_numpy(batch["segment_ids"]).long(),
            token_type_ids=None
            if "token_types" not in batch
            else torch.from_numpy(batch["token_types"]).long(),
        ).logits
    apply = jax.jit(lambda p, b: run.model.apply({"params": p}, b).head_logits)
    ours = np.asarray(apply(run.params, batch))[:, 0]
    np.testing.assert_allclose(ours, logits.numpy(), atol=1e-4, rtol=1e-4)
