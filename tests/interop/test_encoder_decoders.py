"""T5's and BART's tables: what published config files mean, what is refused, what old files hold beside the model."""

import dataclasses
import io
import json

import numpy as np
import pytest
import sentencepiece
from ml_collections import ConfigDict

from jaxlm.interop import FAMILIES, convert, export
from jaxlm.interop import tokenizer_files as files
from jaxlm.interop.mapping import BadModel, config_from_hf, config_to_hf
from jaxlm.models import TransformerConfig
from tests.interop import tiny_hf
from tests.interop.test_convert import check_outputs, from_hf

T5, BART = FAMILIES["t5"], FAMILIES["bart"]
# As their config.json have them, without what says nothing about the model.
T5_SMALL = dict(d_ff=2048, d_kv=64, d_model=512, num_heads=8, num_layers=6, vocab_size=32128)
FLAN_SMALL = dict(d_ff=1024, d_kv=64, d_model=512, num_heads=6, num_layers=8, vocab_size=32128)
FLAN_SMALL |= dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_decoder_layers=8)
BART_BASE = dict(d_model=768, encoder_layers=6, decoder_layers=6, vocab_size=50265)
BART_BASE |= dict(encoder_attention_heads=12, decoder_attention_heads=12, encoder_ffn_dim=3072)
BART_BASE |= dict(decoder_ffn_dim=3072, max_position_embeddings=1024, normalize_before=False)


@pytest.mark.parametrize(
    "family, hf, meant",
    [
        (T5, T5_SMALL, dict(tie_embeddings=True, logit_scale=512**-0.5, activation="relu")),
        (T5, FLAN_SMALL, dict(tie_embeddings=False, logit_scale=0.0, activation="geglu_tanh")),
        (BART, BART_BASE, dict(head_dim=64, position_offset=2, embed_norm=True)),
    ],
)
def test_a_published_config_means_the_same_after_both_ways(family, hf, meant):
    config = TransformerConfig(**config_from_hf(family, hf))
    assert {name: getattr(config, name) for name in meant} == meant
    written = json.loads(json.dumps(config_to_hf(family, config)))
    assert TransformerConfig(**config_from_hf(family, written)) == config
    assert {key: written[key] for key in hf.keys() & written.keys()} == {
        key: hf[key] for key in hf.keys() & written.keys()
    }


def test_what_transformers_5_makes_of_an_untied_t5_means_the_same():
    again = FLAN_SMALL | dict(tie_word_embeddings=True, scale_decoder_outputs=False)
    assert config_from_hf(T5, again) == config_from_hf(T5, FLAN_SMALL)


@pytest.mark.parametrize(
    "family, hf, word",
    [
        (T5, T5_SMALL | dict(feed_forward_proj="gated-relu"), "feed_forward_proj='gated-relu'"),
        (T5, T5_SMALL | dict(dense_act_fn="silu"), "dense_act_fn='silu'"),
        (T5, T5_SMALL | dict(is_encoder_decoder=False), "is_encoder_decoder=False"),
        (T5, T5_SMALL | dict(num_decoder_layers=1 << 30), "num_decoder_layers=1073741824"),
        (T5, T5_SMALL | dict(relative_attention_num_buckets=3), "relative_buckets=3"),
        (T5, T5_SMALL | dict(d_model="512"), "d_model='512'"),
        (BART, BART_BASE | dict(decoder_ffn_dim=1), "encoder_ffn_dim=3072, decoder_ffn_dim=1"),
        (BART, BART_BASE | dict(normalize_before=True), "normalize_before=True"),
        (BART, BART_BASE | dict(activation_function="swish"), "activation_function='swish'"),
        (BART, BART_BASE | dict(encoder_attention_heads=0), "encoder_attention_heads=0"),
    ],
)
def test_a_config_that_says_what_we_cannot_do_is_refused_by_name(family, hf, word):
    with pytest.raises(BadModel) as error:
        config_from_hf(family, hf)
    assert word in str(error.value)


@pytest.mark.parametrize(
    "family, hf, changes, word",
    [
        (T5, T5_SMALL, dict(logit_scale=0.0), "logit_scale=0.0 with tie_embeddings=True"),
        (T5, T5_SMALL, dict(activation="gelu_tanh"), "activation='gelu_tanh'"),
        (T5, T5_SMALL, dict(position="learned"), "position='learned'"),
        (T5, T5_SMALL, dict(query_scale=0.0), "query_scale=0.0"),
        (BART, BART_BASE, dict(embed_norm=False), "embed_norm=False"),
        (BART, BART_BASE, dict(position_offset=0), "position_offset=0"),
        (BART, BART_BASE, dict(norm_eps=1e-6), "norm_eps=1e-06"),
        (BART, BART_BASE, dict(logit_scale=0.5), "logit_scale=0.5"),
    ],
)
def test_a_family_refuses_by_name_what_it_cannot_express(family, hf, changes, word):
    config = dataclasses.replace(TransformerConfig(**config_from_hf(family, hf)), **changes)
    with pytest.raises(BadModel) as error:
        config_to_hf(family, config)
    assert word in str(error.value)
    assert convert.usual_family("encoder_decoder", config) == ""


def test_a_model_of_ours_is_exported_as_the_first_family_that_has_it():
    for family, hf in ((T5, FLAN_SMALL), (BART, BART_BASE)):
        config = TransformerConfig(**config_from_hf(family, hf))
        assert export.choose_family("", "encoder_decoder", config) is family


def write_old(folder, name, **extra):
    recorded = tiny_hf.read_recorded()[name]
    weights = tiny_hf.make_weights(recorded["shapes"])
    return tiny_hf.write_source(folder, recorded["config"], {**weights, **extra}), weights


def test_what_old_files_hold_beside_the_model_is_passed_over(tmp_path):
    zeros = np.zeros((1, tiny_hf.V), np.float32)
    table = tiny_hf.make_weights(tiny_hf.read_recorded()["bart"]["shapes"])["model.shared.weight"]
    copies = {f"model.{stack}.embed_tokens.weight": table for stack in ("encoder", "decoder")}
    copies |= {"lm_head.weight": table, "final_logits_bias": zeros}
    source, _ = write_old(tmp_path / "hf", "bart", **copies)
    assert convert.read_source(str(source)).absent == []
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    source, _ = write_old(tmp_path / "t5", "t5", **{unused: zeros})
    assert convert.read_source(str(source)).absent == []


@pytest.mark.parametrize(
    "name, extra, word",
    [
        ("bart", {"final_logits_bias": np.eye(1, tiny_hf.V, dtype=np.float32)}, "other values"),
        ("bart", {"lm_head.weight": np.ones((tiny_hf.V, 24), np.float32)}, "should repeat"),
        ("t5", {"encoder.embed_tokens.weight": np.ones((37, 24), np.float32)}, "should repeat"),
        ("t5", {"lm_head.bias": np.ones(37, np.float32)}, "no place in this model"),
    ],
)
def test_a_file_that_holds_more_than_the_model_is_refused_by_name(name, extra, word, tmp_path):
    source, _ = write_old(tmp_path / "hf", name, **extra)
    with pytest.raises(BadModel) as error:
        convert.read_source(str(source))
    (tensor,) = extra
    assert tensor in str(error.value) and word in str(error.value)


def test_an_untied_t5_without_its_output_table_is_refused(tmp_path):
    recorded = tiny_hf.read_recorded()["t5_11"]
    weights = tiny_hf.make_weights(recorded["shapes"])
    del weights["lm_head.weight"]
    source = tiny_hf.write_source(tmp_path / "hf", recorded["config"], weights)
    with pytest.raises(BadModel, match="lm_head.weight: missing"):
        convert.read_source(str(source))


def swapped_gate(family):
    """wi_0 is the gate: with the other one every tensor still comes back."""
    names = {"wi_0": "wi_1", "wi_1": "wi_0"}
    swap = lambda name: ".".join(names.get(part, part) for part in name.split("."))
    return dataclasses.replace(
        family, rows=tuple(row._replace(theirs=swap(row.theirs)) for row in family.rows)
    )


def test_a_wrong_table_is_caught_by_the_outputs(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "t5", swapped_gate(T5))
    source, _ = tiny_hf.write_recorded(tmp_path / "hf", "t5_11")
    from_hf(source, tmp_path / "w")
    with pytest.raises(AssertionError):
        check_outputs("t5_11", tmp_path / "w")


def test_a_start_that_no_role_has_is_refused(tmp_path):
    recorded = tiny_hf.read_recorded()["t5"]
    weights = tiny_hf.make_weights(recorded["shapes"])
    for start in (None, 7):
        config = recorded["config"] | dict(decoder_start_token_id=start)
        source = tiny_hf.write_source(tmp_path / f"hf{start}", config, weights)
        with pytest.raises(BadModel, match=f"decoder_start_token_id={start}"):
            from_hf(source, tmp_path / "w")


def test_a_start_that_the_exported_vocabulary_lacks_is_refused(tmp_path):
    tokenizer = files.read_tokenizer(write_spiece(tmp_path, model_type="t5"))
    config = ConfigDict(dict(family="encoder_decoder", objective=dict(decoder_start="bos")))
    size = files.num_model_ids(tokenizer)
    with pytest.raises(BadModel, match="begins with the id"):
        export.token_ids(config, {}, tokenizer, size)
    config.objective.decoder_start = "pad"
    ids = export.token_ids(config, {}, tokenizer, size)
    assert ids == dict(eos_token_id=1, pad_token_id=0, decoder_start_token_id=0)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def write_spiece(folder, **config):
    """T5's own: <pad>, </s> and <unk> first, no bos."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a dog ran away, now!"] * 30),
        model_writer=written,
        vocab_size=50,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(written.getvalue())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_t5s_sentinels_follow_the_pieces_the_last_one_first(tmp_path):
    tokenizer = files.read_tokenizer(write_spiece(tmp_path, model_type="t5"))
    size = files.num_model_ids(tokenizer)
    assert tokenizer.sentinel_ids == tuple(range(size + 99, size - 1, -1))
    assert tokenizer.token(size) == "<extra_id_99>" and tokenizer.token(size + 99) == "<extra_id_0>"
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    assert min(tokenizer.bos_id, tokenizer.mask_id) >= size + 100
    tokenizer.save(tmp_path / "saved")
    assert files.load_tokenizer(tmp_path / "saved").sha256 == tokenizer.sha256


def test_the_exported_t5_tokenizer_has_the_sentinels_at_their_ids(tmp_path):
    import tokenizers as hf

    tokenizer = files.read_tokenizer(write_spiece(tmp_path, model_type="t5"))
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "out").mkdir()
    ends = files.find_ends(T5)
    files.write_tokenizer(tokenizer, tmp_path / "saved", tmp_path / "out", ends=ends, max_len=9)
    theirs = hf.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    first, second = tokenizer.sentinel_ids[:2]
    assert theirs.token_to_id("<extra_id_0>") == first
    ids = theirs.encode("the cat <extra_id_0>the mat<extra_id_1>").ids
    assert (ids.count(first), ids.count(second), ids[-1]) == (1, 1, tokenizer.eos_id)


def test_another_models_file_of_the_same_name_has_as_many_sentinels_as_it_says(tmp_path):
    write_spiece(tmp_path, model_type="albert")
    assert files.read_tokenizer(tmp_path).sentinel_ids == ()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 3}))
    assert len(files.read_tokenizer(tmp_path).sentinel_ids) == 3
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 1 << 40}))
    with pytest.raises(BadModel, match="extra_ids=1099511627776"):
        files.read_tokenizer(tmp_path)
