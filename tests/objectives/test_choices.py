"""The objectives that configs offer by a word are made, with the sentinels they need, and rows of their sizes."""

import pytest

from jaxlm import config_files
from jaxlm.planning.compiling import stand_in_tokenizer
from jaxlm.program import dummy_batch, make_objective, target_len
from tests.tiny import ROOT

GPT = [f"gpt.py:tiny,objective={name}" for name in ("causal", "prefix_lm", "fim", "mixture")]
T5 = [f"t5.py:tiny,objective={name}" for name in ("span_corruption", "ul2", "mixture")]


@pytest.mark.parametrize(
    "spec", [*GPT, *T5, "t5.py:tiny,objective=seq2seq_prefix_lm", "bart.py:tiny"]
)
def test_an_objective_is_chosen_by_a_word(spec):
    config = config_files.read_config(str(ROOT / "configs" / spec), {})
    tokenizer = stand_in_tokenizer(config.model.vocab_size, config.tokenizer.num_sentinels)
    objective = make_objective(config, tokenizer)
    batch = dummy_batch(objective, config.seq_len)
    targets = target_len(objective, config.seq_len)
    assert objective.window(config.seq_len).length >= config.seq_len
    assert batch["labels"].shape == (1, targets or config.seq_len)
    assert batch["labels"].shape[1] == objective.num_predictions(config.seq_len)
    assert ("encoder_tokens" in batch) == (targets > 0)
