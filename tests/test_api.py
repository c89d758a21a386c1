"""jaxlm.api on tiny models: its own examples, batches of many texts, every kind of checkpoint, and what is refused."""

import dataclasses
import doctest
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as hf
from flax.traverse_util import flatten_dict

from jaxlm import api, build, config_files, inputs, tuning
from jaxlm import program as programs
from jaxlm.inference.fill_mask import encode_masked
from jaxlm.interop import convert, export
from jaxlm.interop.tokenizer_files import fetch_tokenizer, puts_bos
from jaxlm.parallel.mesh import make_mesh
from jaxlm.tokenizers import load_tokenizer, make_tokenizer
from jaxlm.tokenizers.kinds import JSONTokenizer
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.partition import split, trainable
from jaxlm.training.state import TrainState
from tests import tiny
from tests.interop import tiny_hf
from tests.models.tiny import get_logits, init_params
from tools.convert_checkpoint import ROOT, TEMPLATES

PROMPTS = ["def ", "import os", "", "class A:\n    ", "x"]  # of one bucket of lengths: few programs


def save(folder, config, params, train="all", **about):
    """A workdir with these parameters, of which `train` says what a fine-tuning run trained."""
    trained, frozen = split(params, trainable(train))
    state = TrainState(jnp.int32(0), trained, {}, frozen=frozen or None, skipped=jnp.int32(0))
    store = Checkpoints(folder)
    store.save(0, state, {"config": json.loads(config.to_json()), **about}, None)
    store.wait()
    store.close()
    build.write_config(config, folder / "config.json")
    make_tokenizer("bytes", num_sentinels=0).save(folder / "tokenizer")
    return folder


def random_params(config):
    """All parameters of a config's model, drawn so that every one matters."""
    model = programs.make_model(config, make_mesh(devices=jax.devices()[:1]))
    return init_params(model, {"tokens": jnp.zeros((1, 4), jnp.int32)})


def save_random(spec, folder):
    config = tiny.tiny_config(spec, "no store")
    return save(folder, config, random_params(config))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save_random("configs/gpt.py:tiny", tmp_path_factory.mktemp("gpt"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_random("configs/bert.py:tiny,objective=mlm_nsp", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def gpt(workdir):
    return api.load(workdir)


@pytest.fixture(scope="module")
def bert(encoder):
    return api.load(encoder)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run that was fine-tuned for embedding, with adapters; what it did not train lies in `frozen`."""
    config = tiny.tiny_config("configs/bert.py:tiny", "no store")
    with config.unlocked():
        config.update(packed=False, head=dict(num_classes=0, pooling="first", dropout_rate=0.1))
        config.model.update(lora_rank=2, lora_alpha=5.0, lora_targets=("query", "down"))
        config.task = dict(name="embedding", pooling="cls")
    folder = tmp_path_factory.mktemp("tuned")
    save(folder, config, random_params(config), train="lora")
    task = {"name": "embedding", "labels": [], "columns": {"text": "text"}}
    (folder / tuning.prediction.TASK_FILE).write_text(json.dumps(task))
    return folder


# --- examples ---------------------------------------------------------------------------------------------------------


def test_a_run_of_prefix_lm_writes_as_a_prefix_lm_and_another_does_not(gpt, tmp_path):
    trained = api.load(save_random("configs/gpt.py:tiny,objective=prefix_lm", tmp_path / "run"))
    assert (trained.writing, gpt.writing) == ({"is_prefix_lm": True}, {})
    both = [api.generate(lm, PROMPTS, max_new_tokens=8, temperature=0) for lm in (trained, gpt)]
    assert both[0] != both[1], "the same parameters, and the same text however the prompt is read"


@pytest.mark.parametrize("function", ["load", "generate", "stream", "fill_mask", "embed", "score"])
def test_the_examples_in_the_docstrings_are_true(function, workdir, encoder):
    names = vars(api) | {"workdir": workdir, "encoder": encoder}
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(getattr(api, function), function, globs=names)
    assert example.examples
    said = []
    failed = doctest.DocTestRunner().run(example, out=said.append)
    assert not failed.failed, "".join(said)


# --- many texts -------------------------------------------------------------------------------------------------------


def check_company(generate, lm):
    """A prompt's text does not depend on the prompts beside it, nor on the size of the batches."""
    options = dict(max_new_tokens=6, seed=3)
    together = generate(lm, PROMPTS, batch_size=2, **options)
    for prompt, [found] in zip(PROMPTS, together, strict=True):
        [[alone]] = api.generate(lm, [prompt], batch_size=2, **options)
        assert found.tokens.tolist() == alone.tokens.tolist() and found.text == alone.text
        np.testing.assert_allclose(found.logprobs, alone.logprobs, atol=1e-4)


def test_a_prompt_gives_the_same_text_alone_and_in_company(gpt):
    check_company(api.generate, gpt)


def test_the_check_of_company_fails_if_results_come_in_another_order(gpt):
    with pytest.raises(AssertionError):
        check_company(lambda *args, **options: api.generate(*args, **options)[::-1], gpt)


def test_samples_of_one_prompt_differ_and_come_back_with_the_seed(gpt):
    draw = lambda seed, n=2: [
        g.text for g in api.generate(gpt, ["def "], num_samples=n, seed=seed, max_new_tokens=9)[0]
    ]
    assert len(set(draw(1))) == 2
    assert draw(1) == draw(1) != draw(2)
    assert draw(1, n=1) == draw(1)[:1]


def test_equal_prompts_in_one_list_are_samples_of_one(gpt):
    twice = api.generate(gpt, ["def ", "def "], max_new_tokens=8)
    once = api.generate(gpt, ["def "], num_samples=2, max_new_tokens=8)
    assert [g.text for [g] in twice] == [g.text for g in once[0]]
    assert twice[0][0].text != twice[1][0].text


def test_a_stop_string_ends_a_text_and_is_not_part_of_it(gpt):
    [[free]] = api.generate(gpt, ["import os"], temperature=0, max_new_tokens=14)
    string = free.text[5:7]
    [[cut]] = api.generate(gpt, ["import os"], temperature=0, max_new_tokens=14, stop=[string])
    assert cut.text == free.text[: free.text.index(string)] and cut.finish == "stop"
    pieces = list(api.stream(gpt, "import os", temperature=0, max_new_tokens=14, stop=[string]))
    assert "".join(piece.text for piece in pieces) == cut.text
    assert [i for piece in pieces for i, _ in piece.tokens] == cut.tokens.tolist()


def test_text_ends_with_what_the_runs_template_ends_answers_with(gpt, workdir, tmp_path):
    options = dict(temperature=0, max_new_tokens=9)
    [[free]] = api.generate(gpt, PROMPTS[:1], **options)
    assert gpt.end_id == gpt.tokenizer.eos_id and len(free.tokens) == 9
    end_id = int(free.tokens[-1])
    shutil.copytree(workdir, tmp_path / "w")
    (tmp_path / "w" / "task.json").write_text(json.dumps({"end_id": end_id}))
    lm = api.load(tmp_path / "w")
    size = free.tokens.tolist().index(end_id)
    [[made]] = api.generate(lm, PROMPTS[:1], **options)
    assert made.finish == "eos" and made.tokens.tolist() == free.tokens[:size].tolist()
    *_, last = api.stream(lm, PROMPTS[0], **options)
    assert last.finish == "eos"


def test_text_ends_where_the_context_does(gpt):
    small = dataclasses.replace(gpt, max_len=16)
    [[made]] = api.generate(small, ["x" * 10], max_new_tokens=14, temperature=0)
    assert 1 + 10 + len(made.tokens) == 16 and made.finish == "length"


def test_masks_of_ragged_texts_are_filled_as_the_whole_softmax_says(bert):
    texts = ["[MASK] a", "import [MASK] as [MASK] of\n"]
    filled = api.fill_mask(bert, texts, top_k=3)
    assert [len(masks) for masks in filled] == [1, 2]
    logits_of = jax.jit(lambda batch: get_logits(bert.model, bert.params, batch))
    for text, masks in zip(texts, filled, strict=True):
        row = encode_masked(bert.tokenizer, text)
        tokens = np.pad(row, (0, 32 - len(row)))[None]
        batch = {"tokens": tokens, "segment_ids": (np.arange(32) < len(row)).astype(np.int32)[None]}
        probs = jax.nn.softmax(logits_of(batch)[0, :, : bert.num_tokens], axis=-1)
        for place, candidates in zip(
            np.flatnonzero(row == bert.tokenizer.mask_id), masks, strict=True
        ):
            best = np.argsort(-probs[place])[:3]
            assert [c.id for c in candidates] == best.tolist()
            np.testing.assert_allclose(
                [c.probability for c in candidates], probs[place][best], rtol=1e-4
            )


def check_order(embed, lm):
    """Each text's vector is its own, however many texts share its batch and wherever the batch puts it."""
    texts = [("word " * n)[:28] for n in (4, 6, 4, 5, 3)]
    together = embed(lm, texts)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(vector, api.embed(lm, [text])[0], atol=1e-5)


def test_vectors_of_many_texts_are_those_of_each(bert):
    check_order(api.embed, bert)


def test_the_check_of_order_fails_for_vectors_by_length(bert):
    with pytest.raises(AssertionError):
        check_order(lambda lm, texts: api.embed(lm, sorted(texts, key=len)), bert)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_fine_tuned_embedding_gives_the_vectors_that_it_was_tuned_for(tuned):
    lm, texts = api.load(tuned), ["a text", "another one"]
    assert lm.pooling == "cls" and lm.task == "embedding"
    wanted = np.concatenate([said.vectors for said in tuning.load_finetuned(tuned).predict(texts)])
    np.testing.assert_allclose(api.embed(lm, texts), wanted, atol=1e-5)


def test_the_step_that_a_fine_tuned_run_reports_is_loaded(tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "run")
    (tmp_path / "run" / "report.json").write_text('{"step": 5}')
    with pytest.raises(FileNotFoundError, match=r"step 5 .*found steps \[0\]"):
        api.load(tmp_path / "run")
    assert api.load(tmp_path / "run", step=0).task == "embedding"


def test_a_fine_tuned_model_predicts_no_tokens(tuned):
    lm = api.load(tuned)
    for use in (api.fill_mask, api.generate, api.score):
        with pytest.raises(
            api.BadInput, match="no language model's head.*fine-tuned for embedding"
        ):
            use(lm, ["a [MASK]"])


def test_an_export_to_hugging_face_is_loaded_as_the_run_that_it_was(workdir, gpt, tmp_path):
    config = config_files.saved_config(workdir / "config.json")
    export.to_hf(workdir / "checkpoints" / "0", tmp_path / "hf", config, against="round_trip")
    again = api.load(f"hf:{tmp_path / 'hf'}")
    assert again.prefix == gpt.prefix and again.max_len == config.model.max_len
    options = dict(temperature=0, max_new_tokens=6)
    for prompts in (["def "], [""]):
        [[ours]], [[theirs]] = (api.generate(lm, prompts, **options) for lm in (gpt, again))
        assert ours.text == theirs.text
    flat, other = (flatten_dict(lm.params, sep="/") for lm in (gpt, again))
    assert flat.keys() == other.keys()


WORDS = [*"[PAD] [UNK] [CLS] [SEP] [MASK]".split(), *map(chr, range(97, 97 + 26)), *"012345"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face folder with the body of a BERT alone."""
    folder, _ = tiny_hf.write_recorded(tmp_path_factory.mktemp("base") / "hf", "bert_base")
    (folder / "vocab.txt").write_text("\n".join(WORDS[: tiny_hf.V]) + "\n")
    return folder


def test_a_body_without_a_head_embeds_and_predicts_nothing(base, tmp_path):
    templates = {
        name: config_files.read_config(str(ROOT / path)) for name, path in TEMPLATES.items()
    }
    convert.from_hf(str(base), tmp_path / "w", templates, against="round_trip")
    one, other = api.load(f"hf:{base}"), api.load(tmp_path / "w")
    np.testing.assert_array_equal(api.embed(one, ["a b"]), api.embed(other, ["a b"]))
    assert one.max_len == other.max_len == 24
    for lm in (one, other):
        with pytest.raises(api.BadInput, match="no language model's head"):
            api.fill_mask(lm, ["a [MASK]"])


def test_heads_are_spread_over_a_mesh(workdir, gpt):
    lm = api.load(workdir, mesh=make_mesh(tensor=2, devices=jax.devices()[:2]))
    kernel = lm.params["layers"]["attention"]["query"]
    assert len(kernel.sharding.device_set) == 2
    np.testing.assert_allclose(api.embed(lm, ["def "]), api.embed(gpt, ["def "]), atol=1e-5)


def test_parameters_that_are_not_finite_are_named(tmp_path):
    config = tiny.tiny_config("configs/gpt.py:tiny", "no store")
    params = random_params(config)
    params["layers"]["mlp"]["up"] = params["layers"]["mlp"]["up"].at[1, 0, 0].set(jnp.nan)
    save(tmp_path, config, params)
    with pytest.raises(api.BadInput, match=r"NaN or infinity in layers/mlp/up \(1 of \d+ arrays\)"):
        api.load(tmp_path)


def test_a_step_can_be_named_and_must_be_there(workdir):
    assert api.load(f"{workdir}@0").checkpoint == f"{workdir}@0"
    with pytest.raises(FileNotFoundError, match=r"step 7 .*found steps \[0\]"):
        api.load(workdir, step=7)
    with pytest.raises(api.BadInput, match="once"):
        api.load(f"{workdir}@0", step=0)
    with pytest.raises(api.BadInput, match="no steps"):
        api.load("hf:nowhere", step=0)
    with pytest.raises(FileNotFoundError, match="no checkpoint in W@newest"):
        api.load("W@newest")
    with pytest.raises(FileNotFoundError, match="no checkpoint in nowhere"):
        api.load("nowhere")


# --- bad input --------------------------------------------------------------------------------------------------------

REFUSED = {
    "longer than the context": (
        lambda gpt, bert: api.generate(gpt, ["x" * 40]),
        r"text 1 \('x+'\): 41 tokens, and the context holds 32",
    ),
    "several": (
        lambda gpt, bert: api.generate(gpt, ["x" * 40, "x", "\udcff"]),
        r"2 of 3 texts cannot be used:\n  text 1 .*\n  text 3 .* half of one",
    ),
    "one text": (
        lambda gpt, bert: api.generate(gpt, "def "),
        "found one text, 'def '; expected a list",
    ),
    "an encoder generates": (
        lambda gpt, bert: api.generate(bert, ["x"]),
        "is an encoder: it fills masks",
    ),
    "a decoder fills masks": (
        lambda gpt, bert: api.fill_mask(gpt, ["[MASK]"]),
        "is a decoder: it continues",
    ),
    "no mask": (
        lambda gpt, bert: api.fill_mask(bert, ["abc"]),
        r"text 1 \('abc'\): no \[MASK\] in it",
    ),
    "nothing to score": (lambda gpt, bert: api.score(gpt, ["a", ""]), r"text 2 \(''\): empty"),
    "too long to embed": (
        lambda gpt, bert: api.embed(bert, ["x" * 31]),
        "31 tokens, and the context holds 30",
    ),
    "pooling": (lambda gpt, bert: api.embed(bert, ["x"], pooling="max"), "use one of mean, cls"),
    "top_p": (lambda gpt, bert: api.generate(gpt, ["x"], top_p=1.5), "top_p=1.5, expected above 0"),
    "stop": (lambda gpt, bert: api.generate(gpt, ["x"], stop=[""]), "stop="),
    "seed": (lambda gpt, bert: api.generate(gpt, ["x"], seed=-1), "seed=-1"),
    "numbers": (
        lambda gpt, bert: api.generate(gpt, ["x"], num_samples=0, batch_size=0),
        "num_samples=0, batch_size=0: expected 1 or more",
    ),
    "samples of beams": (
        lambda gpt, bert: api.generate(gpt, ["x"], num_beams=2, num_samples=3),
        "num_beams=2",
    ),
    "streamed": (lambda gpt, bert: api.stream(gpt, "x" * 40), "41 tokens"),
    "alternatives": (lambda gpt, bert: api.stream(gpt, "x", alternatives=-1), "expected 0 to"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_what_was_expected(case, gpt, bert):
    use, says = REFUSED[case]
    with pytest.raises(api.BadInput, match=says) as error:
        use(gpt, bert)
    assert "\n" not in str(error.value) or case == "several"


def unknown(tokenizer, text):
    """What `inputs` says of a text in front of this tokenizer."""

    class Model:
        pass

    Model.tokenizer = tokenizer
    return inputs.unknown_in(Model, [text])


def test_characters_that_the_tokenizer_does_not_know_are_named(base):
    chars = make_tokenizer("chars", characters="abc ")
    assert unknown(chars, "a b c") == ""
    assert unknown(chars, "a b é c é 漢") == "the tokenizer has no token for 'é', '漢'"
    words = load_tokenizer(base)
    assert unknown(words, "A b\tc é\u0301") == ""  # it drops case, tabs and accents
    assert unknown(words, "a 漢 b") == "the tokenizer has no token for '漢'"
    assert unknown(make_tokenizer("bytes"), "漢 é") == ""


def test_characters_that_a_tokenizer_drops_are_named():
    silent = hf.Tokenizer(hf.models.BPE({"a": 0, "b": 1, "<s>": 2, "</s>": 3}, []))
    tokenizer = JSONTokenizer(silent.to_str().encode())
    assert tokenizer.encode("a?b").tolist() == [0, 1]
    assert unknown(tokenizer, "a?b") == "the tokenizer has no token for '?'"


def test_what_stands_before_a_prompt_is_what_transformers_puts_there(tmp_path):
    """bos of our runs; of Hugging Face's folders what tokenizer.json or tokenizer_config.json says."""
    model = hf.Tokenizer(hf.models.BPE({"a": 0, "<s>": 1, "</s>": 2}, []))
    model.add_special_tokens(["<s>", "</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    assert not puts_bos(tmp_path, fetch_tokenizer(str(tmp_path)))
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"add_bos_token": true}')
    assert puts_bos(tmp_path, fetch_tokenizer(str(tmp_path)))
    settings.unlink()
    model.post_processor = hf.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    model.save(str(tmp_path / "tokenizer.json"))
    assert puts_bos(tmp_path, fetch_tokenizer(str(tmp_path)))


def test_an_empty_prompt_needs_a_token_to_begin_with(gpt):
    lacking = dataclasses.replace(gpt, prefix=())
    assert inputs.bos_of(lacking) == (
        gpt.tokenizer.bos_id,
    )  # GPT-2's way: there is one, but nothing puts it there
    [row] = inputs.encode_prompts(lacking, [""])
    assert row.tolist() == [gpt.tokenizer.bos_id]
    [row] = inputs.encode_prompts(lacking, ["a"])
    assert row.tolist() == gpt.tokenizer.encode("a").tolist()
