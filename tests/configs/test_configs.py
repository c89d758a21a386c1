"""Every preset has the published size, only fields that are read, and a documented variant."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import bart, bert, common, gpt, t5, transformer
from jaxlm.models import BERT, GPT, EncoderDecoder, TransformerConfig
from jaxlm.models.config import EXECUTION
from jaxlm.parallel.mesh import make_mesh
from jaxlm.program import make_model

# Published counts. GPT-2: the sizes of OpenAI's released checkpoints (their paper's 117M and 345M are wrong, as its
# repository says). Llama and Qwen: the model.safetensors of the released checkpoints (meta-llama/Llama-3.2-1B,
# Llama-3.1-8B and -70B, Qwen/Qwen3-0.6B and -8B).
EXACT = {
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama3_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "mixtral_8x7b": 46_702_792_704,
    "qwen3_30b_a3b": 30_532_122_624,
}

# Parameters that a token meets: 12.9B in arXiv:2401.04088, abstract, and 3.3B in arXiv:2505.09388, table 3.
ACTIVE = {"mixtral_8x7b": 12_879_925_248, "qwen3_30b_a3b": 3_353_032_704}

# Millions, as rounded in table D.1 of arXiv:2005.14165.
GPT3 = {
    "gpt3_125m": 125,
    "gpt3_350m": 356,
    "gpt3_760m": 760,
    "gpt3_1_3b": 1320,
    "gpt3_2_7b": 2650,
    "gpt3_6_7b": 6660,
    "gpt3_13b": 12850,
    "gpt3_175b": 174600,
}

# The encoder with its pooler, without the heads: transformers' BertModel and RobertaModel of google/bert_uncased_L-*,
# bert-base-uncased, bert-large-uncased, roberta-base and roberta-large.
ENCODERS = {
    "tiny": 4_385_920,
    "mini": 11_170_560,
    "small": 28_763_648,
    "medium": 41_373_184,
    "base": 109_482_240,
    "large": 335_141_888,
    "roberta_base": 124_645_632,
    "roberta_large": 355_359_744,
}

# google-t5/t5-*, google/t5-v1_1-* (google/flan-t5-* are as large) and facebook/bart-*: transformers' num_parameters of the
# released checkpoints, without BART's final_logits_bias, which is none there.
ENCODER_DECODERS = {
    (t5, "small"): 60_506_624,
    (t5, "base"): 222_903_552,
    (t5, "large"): 737_668_096,
    (t5, "3b"): 2_851_598_336,
    (t5, "11b"): 11_307_321_344,
    (t5, "v1_1_small"): 76_961_152,
    (t5, "v1_1_base"): 247_577_856,
    (t5, "v1_1_large"): 783_150_080,
    (t5, "v1_1_xl"): 2_849_757_184,
    (t5, "v1_1_xxl"): 11_135_332_352,
    (bart, "base"): 139_420_416,
    (bart, "large"): 406_291_456,
}

# Millions, as in table 3 of arXiv:1706.03762, whose vocabulary is "about 37000" tokens.
TRANSFORMERS = {"base": 65, "big": 213}


def param_shapes(config, **model_fields):
    options = TransformerConfig(**{**config.model, **model_fields})
    pair = config.objective.name in ("mlm_nsp", "mlm_sop")
    make = {"gpt": GPT, "bert": lambda o: BERT(o, 2 if pair else 0)}
    model = {**make, "encoder_decoder": EncoderDecoder}[config.family](options)
    batch = dict.fromkeys(("tokens", "encoder_tokens"), jnp.zeros((1, 8), jnp.int32))
    return jax.eval_shape(model.init, jax.random.key(0), batch)["params"]


def count(tree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("variant", EXACT)
def test_a_decoder_has_its_published_size(variant):
    assert count(param_shapes(gpt.get_config(variant))) == EXACT[variant]


@pytest.mark.parametrize("variant", ACTIVE)
def test_a_mixture_has_its_published_active_size(variant):
    config = gpt.get_config(variant)
    shapes, c = param_shapes(config), config.model
    experts = count([shapes["layers"]["mlp"][name] for name in ("up", "gate", "down")])
    active = count(shapes) - experts * (c.num_experts - c.experts_per_token) // c.num_experts
    assert active == ACTIVE[variant]


@pytest.mark.parametrize("variant", GPT3)
def test_a_gpt3_has_its_published_size(variant):
    millions = count(param_shapes(gpt.get_config(variant))) / 1e6
    assert millions == pytest.approx(GPT3[variant], rel=0.004)


@pytest.mark.parametrize("variant", ENCODERS)
def test_an_encoder_with_its_pooler_has_its_published_size(variant):
    config = bert.get_config(f"{variant},objective=mlm_nsp")
    # The released RoBERTa's padding is id 1, so positions start at row 2. Our tiny has a vocabulary of its own.
    roberta = variant.startswith("roberta")
    fields = dict(position_offset=2) if roberta else dict(vocab_size=30522)
    shapes = param_shapes(config, **fields)
    assert count(shapes) - count([shapes["mlm_head"], shapes["pair_head"]]) == ENCODERS[variant]


@pytest.mark.parametrize(
    ("module", "variant"), ENCODER_DECODERS, ids=lambda v: getattr(v, "__name__", v)
)
def test_an_encoder_decoder_has_its_published_size(module, variant):
    assert count(param_shapes(module.get_config(variant))) == ENCODER_DECODERS[module, variant]


@pytest.mark.parametrize("variant", TRANSFORMERS)
def test_a_transformer_has_its_published_size(variant):
    millions = count(param_shapes(transformer.get_config(variant))) / 1e6
    assert millions == pytest.approx(TRANSFORMERS[variant], rel=0.035)


def test_the_small_models_have_the_sizes_that_their_docstring_says():
    assert count(param_shapes(gpt.get_config("tiny"))) == pytest.approx(2.6e6, rel=0.05)
    assert count(param_shapes(gpt.get_config("tiny_moe"))) == pytest.approx(6.7e6, rel=0.05)
    for variant in ("nanogpt", "shakespeare"):
        assert count(param_shapes(gpt.get_config(variant))) == pytest.approx(0.80e6, rel=0.02)
    for module, millions in ((t5, 3.4), (bart, 3.6), (transformer, 3.5)):
        assert f"({millions}M)" in module.__doc__
        found = count(param_shapes(module.get_config("tiny"))) / 1e6
        assert found == pytest.approx(millions, abs=0.05)


VARIANTS = [(module, v) for module in (gpt, bert, t5, bart, transformer) for v in module.VARIANTS]


@pytest.mark.parametrize(("module", "variant"), VARIANTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_config_is_complete_and_survives_json(module, variant):
    config = module.get_config(variant)
    assert variant.split("_")[0] in module.__doc__, "not documented"
    fields = {f.name for f in dataclasses.fields(TransformerConfig)}
    assert set(config.model) == fields - set(EXECUTION)
    flat = jax.tree.leaves(config.to_dict(), is_leaf=lambda x: isinstance(x, tuple))
    assert all(isinstance(leaf, (int, float, str, bool, tuple)) for leaf in flat)
    assert all(
        isinstance(x, (int, float, str)) for leaf in flat if isinstance(leaf, tuple) for x in leaf
    )
    assert json.loads(config.to_json())["family"] == config.family
    assert set(config) == set(common.base())
    assert config.seq_len <= config.model.max_len
    assert config.optimizer.schedule.warmup_steps < config.num_train_steps
    assert config.tokenizer.vocab_size <= config.model.vocab_size


@pytest.mark.parametrize("optimizer", common.OPTIMIZERS)
@pytest.mark.parametrize("schedule", [*common.SCHEDULES, "plateau"])
def test_an_argument_chooses_optimizer_and_schedule_with_the_fields_they_read(optimizer, schedule):
    group = gpt.get_config(f"tiny,optimizer={optimizer},schedule={schedule}").optimizer
    assert group.name == optimizer
    shared = {"name", "learning_rate", "grad_clip_norm", "schedule"}
    plateau = {"plateau"} if schedule == "plateau" else set()
    assert set(group) - shared == set(common.OPTIMIZERS[optimizer]) | plateau
    name = "constant" if schedule == "plateau" else schedule
    assert set(group.schedule) - {"name"} == set(common.SCHEDULES[name])


def test_the_optimizer_groups_are_what_the_optimizers_take():
    import inspect

    from jaxlm.training import optimizers, schedules

    def options(function):
        parameters = inspect.signature(function).parameters.values()
        return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}

    assert set(common.OPTIMIZERS) == set(optimizers.OPTIMIZERS)
    for name, function in optimizers.OPTIMIZERS.items():
        assert set(common.OPTIMIZERS[name]) == options(function), name
    assert set(common.SCHEDULES) == set(schedules.SCHEDULES)
    for name, function in schedules.SCHEDULES.items():
        assert set(common.SCHEDULES[name]) == options(function) | {"warmup_steps"}, name


def test_another_optimizer_scales_the_recipes_learning_rate():
    own = gpt.get_config("gpt2").optimizer
    lion = gpt.get_config("gpt2,optimizer=lion").optimizer
    assert lion.learning_rate == pytest.approx(0.2 * own.learning_rate)
    assert gpt.get_config("gpt2,optimizer=adamw").optimizer == own


def test_a_wrong_argument_lists_all_that_is_wrong_and_what_is_known():
    with pytest.raises(ValueError) as error:
        bert.get_config("bose,objectve=mlm,optimizer=adam")
    for part in ("'bose'", "roberta_large", "'objectve=mlm'", "objective", "mean adamw?"):
        assert part in str(error.value)


def test_a_text_is_taken_as_it_is_and_all_else_without_spaces():
    arg = " b , x= 3, z= true ,w=translate English to German: "
    found = common.parse_arg(arg, ("a", "b"), x=1, z=False, w="")
    assert found == dict(variant="b", x=3, z=True, w="translate English to German: ")


def test_arguments_take_the_type_of_their_default():
    found = common.parse_arg("b,x=3,y=0.5,z=false", ("a", "b"), x=1, y=1.0, z=True, w="one")
    assert found == dict(variant="b", x=3, y=0.5, z=False, w="one")
    assert common.parse_arg("x=2", ("a",), x=1)["variant"] == "a"
    with pytest.raises(ValueError, match="z=maybe.*true or false"):
        common.parse_arg("a,z=maybe", ("a",), z=True)


def test_an_unknown_model_field_raises():
    with pytest.raises(ValueError, match="unknown model fields.*num_head'.*num_heads"):
        common.make_model(emb_dim=8, num_heads=2, num_head=2)


def test_only_an_encoder_decoder_has_layers_of_a_decoder():
    config = gpt.get_config("tiny")
    config.model.num_decoder_layers = 2
    with pytest.raises(ValueError, match="family 'gpt' has one stack.*set it"):
        make_model(config, make_mesh(devices=jax.devices()[:1]))
