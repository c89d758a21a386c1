"""The objectives that configs offer by a word are made, with the sentinels they need, and rows of their sizes."""

import jax
import pytest

from jaxlm import config_files
from jaxlm.models import MODELS
from jaxlm.objectives import OBJECTIVES
from jaxlm.parallel.mesh import make_mesh
from jaxlm.planning.compiling import stand_in_tokenizer
from jaxlm.program import dummy_batch, make_objective, make_program, target_len
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


@pytest.mark.parametrize(
    "spec, family, change",
    [
        ("gpt.py:tiny", "bert", "set --config.family to gpt, or take one of mlm, mlm_nsp, mlm_sop"),
        ("gpt.py:tiny,objective=mixture", "encoder_decoder", "set --config.family to gpt, or take"),
        ("t5.py:tiny,objective=mixture", "gpt", "set --config.family to encoder_decoder, or take"),
        ("bert.py:tiny", "gpt", "or take one of causal, prefix_lm, fim, mixture"),
        ("xlnet.py:tiny", "bert", "set --config.family to xlnet"),
        ("electra.py:tiny", "bert", "set --config.family to electra"),
    ],
)
def test_a_family_that_an_objective_is_not_made_for_is_refused(spec, family, change):
    config = config_files.read_config(str(ROOT / "configs" / spec), {"family": family})
    tokenizer = stand_in_tokenizer(config.model.vocab_size, config.tokenizer.num_sentinels)
    with pytest.raises(ValueError, match=f"is not for family '{family}'.*{change}"):
        make_program(config, make_mesh(devices=jax.devices()[:1]), tokenizer)


def test_the_families_of_objectives_are_those_of_models():
    assert {name for kind in OBJECTIVES.values() for name in kind.families} == set(MODELS)
