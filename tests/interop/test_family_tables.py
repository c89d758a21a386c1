"""Every family's table and config translation, both ways, in numpy alone."""

import dataclasses
import json

import numpy as np
import pytest

from jaxlm.interop import FAMILIES
from jaxlm.interop.mapping import BadModel, bind, config_from_hf, config_to_hf
from jaxlm.interop.task_heads import TASKS, head_fields, head_to_hf, task_of, with_head
from jaxlm.interop.windows import shortest_period
from jaxlm.models import HEADS, TransformerConfig
from tests.oracles.tiny_families import TINY, Twin
from tests.oracles.tiny_models import random_weights


def check_weights_return(twin):
    """Every tensor of theirs is bitwise the same after ours."""
    weights = random_weights(twin.shapes)
    back = twin.back(twin(weights))
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        assert back[name].dtype == tensor.dtype and np.array_equal(back[name], tensor), name


@pytest.mark.parametrize("name", TINY)
def test_every_tensor_of_a_family_returns_bit_by_bit(name):
    check_weights_return(Twin(name))


def test_the_return_check_fails_for_a_transform_that_is_not_invertible():
    twin = Twin("gemma2")
    wrong = lambda arrays: (
        (arrays[0] + np.float32(1)) - np.float32(1)
    )  # as a table that shifts scales
    twin.pieces = [
        dataclasses.replace(p, transform=dataclasses.replace(p.transform, merge=wrong))
        if p.name.endswith("layernorm.weight")
        else p
        for p in twin.pieces
    ]
    with pytest.raises(AssertionError, match="layernorm"):
        check_weights_return(twin)


@pytest.mark.parametrize("name", TINY)
def test_a_config_means_the_same_after_both_ways(name):
    twin = Twin(name)
    family = FAMILIES[twin.tiny.model_type]
    written = json.loads(json.dumps(config_to_hf(family, twin.config)))
    again = TransformerConfig(**config_from_hf(family, written))
    assert again == twin.config
    if twin.head is not None:
        architecture, about = head_to_hf(family, twin.head, twin.kind)
        assert architecture == twin.tiny.architecture == task_of(family, twin.hf)
        assert head_fields(family, architecture, written | about) == twin.head


# What each family cannot express, and the word that its refusal has to hold.
INEXPRESSIBLE = {
    "mistral": (dict(attention_windows=(5, 0)), "attention_windows"),
    "roberta": (dict(position_offset=0), "position_offset=0"),
    "electra_generator": (dict(embed_factor_dim=32), "embed_factor_dim=32"),
    "distilbert": (dict(num_token_types=2), "num_token_types=2"),
    "modernbert": (dict(attention_windows=(0, 4, 6)), "attention_windows"),
    "modernbert_biased": (dict(first_norm=True), "first_norm"),
    "gemma2": (dict(rope_local_theta=100.0), "rope_local_theta"),
    "gemma3": (dict(rope_scaling=(8.0, 1.0, 4.0, 16.0)), "rope_scaling"),
    "albert": (dict(share_layers=False), "share_layers=False"),
}


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_a_family_refuses_by_name_what_it_cannot_express(name):
    changes, word = INEXPRESSIBLE[name]
    twin = Twin(name)
    family = FAMILIES[twin.tiny.model_type]
    for fields in (changes, changes | dict(norm_position="post", scale_embeddings=None)):
        fields = {k: not getattr(twin.config, k) if v is None else v for k, v in fields.items()}
        if fields.get("norm_position") == "post" and not twin.config.first_norm:
            del fields["norm_position"]
        with pytest.raises(BadModel) as error:
            config_to_hf(family, dataclasses.replace(twin.config, **fields))
        for part in (word, *(["scale_embeddings"] if "scale_embeddings" in fields else [])):
            assert part in str(error.value)


# Keys of config.json that we must refuse, and the word that the refusal has to hold.
REFUSED = [
    ("roberta", dict(pad_token_id=39), "none is left"),
    ("roberta", dict(pad_token_id="1"), "pad_token_id"),
    ("electra_generator", dict(hidden_act="relu"), "hidden_act='relu'"),
    ("electra_generator", dict(embedding_size=-3), "embedding_size=-3"),
    ("distilbert", dict(sinusoidal_pos_embds=True), "sinusoidal_pos_embds"),
    ("albert", dict(num_hidden_groups=2), "num_hidden_groups=2"),
    ("albert", dict(embedding_size=None, inner_group_num=2), "inner_group_num=2"),
    ("modernbert", dict(classifier_bias=True), "classifier_bias=True"),
    ("modernbert", dict(classifier_activation="relu"), "classifier_activation='relu'"),
    ("modernbert", dict(decoder_bias=False), "decoder_bias=False"),
    ("modernbert", dict(global_attn_every_n_layers=0), "global_attn_every_n_layers=0"),
    ("modernbert", dict(local_attention="wide"), "local_attention='wide'"),
    ("gemma2", dict(layer_types=["full_attention"]), "each of 3 layers"),
    ("gemma2", dict(layer_types=["full_attention", "chunked", "full_attention"]), "chunked"),
    ("gemma2", dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope scaling"),
    ("gemma2", dict(sliding_window=0), "sliding_window=0"),
    ("gemma2", dict(attn_logit_softcapping=-1.0), "attn_logit_softcapping=-1.0"),
    ("gemma2", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    ("gemma3", dict(rope_scaling={"rope_type": "yarn", "factor": 8.0}), "yarn"),
    ("gemma3", dict(rope_scaling={"rope_type": "linear"}), "factor=None"),
    ("gemma3", dict(query_pre_attn_scalar=0), "query_pre_attn_scalar=0"),
]


@pytest.mark.parametrize("name, keys, word", REFUSED)
def test_a_config_that_says_what_we_cannot_do_is_refused_by_name(name, keys, word):
    tiny = TINY[name]
    with pytest.raises(BadModel) as error:
        config_from_hf(FAMILIES[tiny.model_type], tiny.config | keys)
    assert word in str(error.value)


def read(name, **keys):
    tiny = TINY[name]
    return config_from_hf(FAMILIES[tiny.model_type], tiny.config | keys)


def test_both_spellings_of_layer_kinds_and_rotary_angles_mean_the_same():
    full, sliding = "full_attention", "sliding_attention"
    old = read("gemma3")
    assert old["attention_windows"] == (5, 5, 0)
    plain = {k: None for k in ("rope_theta", "rope_local_base_freq", "rope_scaling")}
    angles = {
        full: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        sliding: {"rope_type": "default", "rope_theta": 1e4},
    }
    kinds = [sliding, sliding, full, sliding]
    assert read("gemma3", **plain, rope_parameters=angles, layer_types=kinds) == old
    old = read("modernbert")
    assert old["attention_windows"] == (0, 4, 4) and old["rope_local_theta"] == 1e4
    angles = {full: {"rope_theta": 160000.0}, sliding: {"rope_theta": 10000.0}}
    kinds = [full, sliding, sliding, full, sliding]
    assert read("modernbert", rope_parameters=angles, layer_types=kinds) == old
    kinds = [full, full, sliding, full, sliding]
    assert read("modernbert", layer_types=kinds)["attention_windows"] == (0, 0, 4, 0, 4)


def test_the_windows_of_published_models():
    gemma2 = dict(num_hidden_layers=26, sliding_window=4096, head_dim=256)
    found = read("gemma2", **gemma2, query_pre_attn_scalar=256)
    assert found["attention_windows"] == (4096, 0) and found["query_scale"] == 0.0
    gemma3 = read("gemma3", num_hidden_layers=26, sliding_window=512, sliding_window_pattern=6)
    assert gemma3["attention_windows"] == (512,) * 5 + (0,)
    assert read("modernbert", num_hidden_layers=22, local_attention=128)["attention_windows"] == (
        0,
        65,
        65,
    )


@pytest.mark.parametrize(
    "windows, period",
    [((0, 0), ()), ((4, 4, 4), (4,)), ((4, 0, 4), (4, 0)), ((0, 4, 4), (0, 4, 4)), ((4,), (4,))],
)
def test_windows_are_written_as_their_shortest_period(windows, period):
    assert shortest_period(windows) == period


def test_every_class_with_a_head_has_a_table_whose_rows_are_the_heads_parameters():
    for model_type, tasks in TASKS.items():
        for name, task in tasks.items():
            assert task.kind in HEADS
            family = with_head(FAMILIES[model_type], name)
            assert not any(row.group for row in family.rows)
            paths = {path for row in family.rows for path in row.paths}
            assert "head/out/kernel" in paths and len(paths) == sum(
                len(row.paths) for row in family.rows
            )


def test_a_head_that_a_family_has_no_class_for_lists_those_it_has():
    with pytest.raises(
        BadModel, match="no class.*'pooling': 'mean'.*BertForSequenceClassification"
    ):
        head_to_hf(FAMILIES["bert"], dict(pooling="mean", transform="tanh", num_classes=2))
    with pytest.raises(BadModel, match="no class for question_answering"):
        head_to_hf(FAMILIES["gemma2"], dict(num_classes=2), "question_answering")


@pytest.mark.parametrize(
    "keys", [dict(num_labels=0), dict(num_labels="3"), dict(num_labels=1 << 40)]
)
def test_an_absurd_number_of_classes_is_refused(keys):
    with pytest.raises(BadModel, match="num_labels="):
        head_fields(FAMILIES["bert"], "BertForTokenClassification", keys)


def test_a_pooling_that_a_class_does_not_have_is_refused():
    with pytest.raises(BadModel, match="'classifier_pooling': 'cls'.*'mean'"):
        name = "ModernBertForSequenceClassification"
        head_fields(FAMILIES["modernbert"], name, dict(classifier_pooling="max"))


def test_a_model_with_a_part_that_the_table_lacks_is_refused():
    twin = Twin("distilbert")
    with pytest.raises(BadModel, match="no place for.*pooler/kernel"):
        bind(twin.family, {**twin.paths, "pooler/kernel": (32, 32)}, 43)
