"""ELECTRA's and XLNet's recipes are complete, are documented, and train."""

import dataclasses
import json

import pytest

from configs import common, electra, xlnet
from jaxlm import config_files, program
from jaxlm.models import TransformerConfig
from jaxlm.models.config import EXECUTION
from jaxlm.parallel import mesh as meshes
from jaxlm.pretrain import pretrain
from jaxlm.tokenizers import make_tokenizer
from tests import tiny

VARIANTS = [(module, v) for module in (electra, xlnet) for v in module.VARIANTS]


@pytest.mark.parametrize(("module", "variant"), VARIANTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_config_is_complete_and_survives_json(module, variant):
    config = module.get_config(variant)
    assert f"\n{variant} " in module.__doc__, "not documented"
    fields = {f.name for f in dataclasses.fields(TransformerConfig)}
    assert set(config.model) == fields - set(EXECUTION)
    generator = {"generator"} if config.family == "electra" else set()
    assert set(config) == set(common.base()) | generator
    assert json.loads(config.to_json())["family"] == config.family
    assert config.seq_len <= config.model.max_len
    assert config.optimizer.schedule.warmup_steps < config.num_train_steps
    assert config.tokenizer.vocab_size <= config.model.vocab_size


@pytest.mark.parametrize(("family", "key"), [("electra", "masked_positions"), ("xlnet", "order")])
def test_a_recipe_makes_a_program_of_its_model_and_objective(family, key):
    config = config_files.read_config(f"{tiny.ROOT}/configs/{family}.py:tiny", tiny.OVERRIDES)
    made = program.make_program(
        config, meshes.make_mesh(), make_tokenizer("bytes", num_sentinels=0)
    )
    assert type(made.model).__name__.lower() == family and made.step_flops > 0
    slots = made.objective.num_predictions(config.seq_len)
    assert made.batch_shape["labels"].shape == (config.batch_size, slots)
    assert key in made.batch_shape and made.num_params > 264 * 16


@pytest.mark.slow  # compiles for eight devices
@pytest.mark.parametrize("family", ["electra", "xlnet"])
def test_a_recipe_trains_and_fills_its_prompts(family, tmp_path):
    config = tiny.tiny_config(
        f"configs/{family}.py:tiny,optimizer=adamw",
        tiny.make_store(tmp_path / "store"),
        num_train_steps=2,
        unroll=1,  # compiles in half the time
        log_every_steps=1,
        eval_every_steps=2,
        eval__num_batches=1,
        eval__prompts=("import [MASK]",),
    )
    metrics = pretrain(config, tmp_path / "run")
    assert 4.0 < metrics["nll"] < 7.5
    assert not any(line.get("skipped") for line in tiny.learned(tmp_path / "run"))
    (sample,) = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert json.loads(sample)["prompt"] == "import [MASK]"
