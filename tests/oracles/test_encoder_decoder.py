"""Texts of T5 and BART, from a tokenizer's files to a text, are those of transformers' `generate`."""

import dataclasses
import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf

from jaxlm import api, look
from tests.oracles.tiny_models import random_weights

pytestmark = pytest.mark.oracles
MISSING = "missing: bash tools/check.sh --oracles"
torch = pytest.importorskip("torch", reason=MISSING)
transformers = pytest.importorskip("transformers", reason=MISSING)

TEXTS = ["the cat sat on the mat and ran", "a dog ran away from the rain", "to see it again, now!"]
PROMPTS = ["the cat sat", "a dog ran away from the rain", "it", "to see the mat now! the cat ran"]
NEW = 10
# transformers 5.23 cannot generate with more layers in the decoder than in the encoder.
T5 = dict(d_model=24, d_kv=10, d_ff=20, num_layers=2, num_decoder_layers=1, num_heads=3)
T5 |= dict(pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
BART = dict(encoder_layers=1, decoder_layers=2, encoder_attention_heads=3, encoder_ffn_dim=20)
BART |= dict(decoder_attention_heads=3, decoder_ffn_dim=20, d_model=24, max_position_embeddings=40)


def write_t5_tokenizer(folder):
    """The published files: a SentencePiece model, after which T5's class puts the sentinels."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 30),
        model_writer=written,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(written.getvalue())
    return transformers.T5Tokenizer.from_pretrained(folder)


def write_bart_tokenizer(folder):
    model = hf.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    model.train_from_iterator(TEXTS * 20, 300, special_tokens=special)
    model.save_model(str(folder))
    return transformers.BartTokenizer.from_pretrained(folder)


# name: (tokenizer, options of its config)
CASES = {
    "t5": (write_t5_tokenizer, T5 | dict(num_layers=3, num_decoder_layers=2)),
    "t5_11": (
        write_t5_tokenizer,
        T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "bart": (write_bart_tokenizer, BART),  # whose last token is eos, come what may
    "bart_cnn": (write_bart_tokenizer, BART | dict(forced_eos_token_id=None)),
}


@pytest.fixture(scope="module", params=CASES)
def both(request, tmp_path_factory):
    """(our model, transformers' tokenizer, its model): random weights with which eos comes now and then."""
    folder, name = tmp_path_factory.mktemp(request.param), request.param.split("_")[0]
    write, options = CASES[request.param]
    (folder / "config.json").write_text(json.dumps({"model_type": name}))
    tokenizer = write(folder)
    config = transformers.AutoConfig.for_model(name, vocab_size=len(tokenizer) + 3, **options)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    if not options.get("tie_word_embeddings", True):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.all_tied_weights_keys.pop("lm_head.weight")
    weights = random_weights({name: p.shape for name, p in model.named_parameters()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
        model.get_output_embeddings().weight[config.eos_token_id] *= 3
    if request.param == "bart_cnn":
        model.generation_config.forced_bos_token_id = 0
    model.eval().save_pretrained(folder)
    return api.load(f"hf:{folder}"), tokenizer, model


def their_texts(both, prompt, num_return=1, **options):
    _, tokenizer, model = both
    made = model.generate(
        **tokenizer(prompt, return_tensors="pt"),
        max_new_tokens=NEW,
        do_sample=False,
        num_return_sequences=num_return,
        **options,
    )
    decode = lambda ids: (ids.tolist(), tokenizer.decode(ids, skip_special_tokens=True))
    return [decode(made[i, 1:]) for i in range(num_return)]


def check_texts(both, generate, **options):
    """Each prompt's texts, and their tokens before eos."""
    lm, _, model = both
    eos, seen = model.config.eos_token_id, set()
    found = generate(lm, PROMPTS, max_new_tokens=NEW)
    for prompt, texts in zip(PROMPTS, found, strict=True):
        expected = their_texts(both, prompt, len(texts), **options)
        for ours, (ids, text) in zip(texts, expected, strict=True):
            ids = ids[: ids.index(eos)] if eos in ids else ids
            assert ours.tokens.tolist() == ids, "other tokens"
            assert ours.text.strip() == text.strip()
            seen.add(tuple(ids))
    assert len(seen) > 1, "all texts are one"
    return {len(ids) for ids in seen}


def greedy(lm, prompts, **options):
    return api.generate(lm, prompts, temperature=0, **options)


BEAMS = dict(num_beams=4, length_penalty=2.0)


def search(lm, prompts, **options):
    return api.generate(lm, prompts, num_samples=3, **BEAMS, **options)


def test_greedy_text_is_transformers(both):
    lengths = check_texts(both, greedy)
    if not getattr(
        both[2].config, "scale_decoder_outputs", True
    ):  # of T5 1.1 some end, some do not
        assert len(lengths) > 1


def test_beams_are_transformers(both):
    check_texts(both, search, **BEAMS)


def test_the_check_of_texts_fails_for_another_start(both):
    lm, *theirs = both
    wrong = dataclasses.replace(lm, writing={**lm.writing, "start_id": 5, "first_id": -1})
    with pytest.raises(AssertionError, match="other tokens"):
        check_texts((wrong, *theirs), greedy)


def test_attention_maps_are_transformers(both):
    lm, tokenizer, model = both
    found = look.attention_maps(lm, PROMPTS[0], target="a dog ran")
    read = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    wrote = tokenizer("a dog ran", return_tensors="pt", add_special_tokens=False)["input_ids"]
    start = torch.tensor([[lm.writing["start_id"]]])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(
            input_ids=read, decoder_input_ids=torch.cat([start, wrote], 1), output_attentions=True
        )
    kinds = (out.encoder_attentions, out.decoder_attentions, out.cross_attentions)
    assert [maps.name for maps in found] == ["encoder", "decoder", "cross"]
    for maps, theirs in zip(found, kinds, strict=True):
        expected = torch.cat(theirs).numpy()
        np.testing.assert_allclose(maps.probs_LNTS, expected, atol=2e-5, err_msg=maps.name)
