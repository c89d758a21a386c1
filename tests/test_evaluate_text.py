"""How well models predict a text: every token and byte is counted once, however the text lies and is cut."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import evaluate, text_evaluation
from jaxlm.data.store_writer import write_store
from jaxlm.data.token_store import TokenStore
from jaxlm.inference import scoring
from jaxlm.language_model import BadInput, LanguageModel
from jaxlm.parallel import mesh as meshes
from jaxlm.text_evaluation import evaluate_text
from jaxlm.tokenizers import make_tokenizer
from tests import tiny as tiny_runs
from tests.models import tiny

MAX_LEN = 24
TOKENIZER = make_tokenizer("bytes", num_sentinels=0)
DATA = ("lines.jsonl", "folder", "store", "whole")
TEXTS = ["def main():\n    return 1\n", "naïve", "import os  # and a line that is longer\n" * 2]


def make_lm(model, family, **fields):
    options = dict(
        checkpoint="W",
        family=family,
        model=model,
        params=tiny.init_params(model, {"tokens": jnp.zeros((1, 4), jnp.int32)}),
        tokenizer=TOKENIZER,
        num_ids=TOKENIZER.vocab_size,
        max_len=MAX_LEN,
        mesh=meshes.make_mesh(devices=jax.devices()[:1]),
        prefix=(TOKENIZER.bos_id,) if family == "gpt" else (),
        end_id=TOKENIZER.eos_id,
    )
    return LanguageModel(**options | fields)


@pytest.fixture(scope="module")
def gpt():
    return make_lm(tiny.make_gpt(vocab_size=TOKENIZER.vocab_size, max_len=MAX_LEN), "gpt")


@pytest.fixture(scope="module")
def bert():
    return make_lm(tiny.make_bert(vocab_size=TOKENIZER.vocab_size, max_len=MAX_LEN), "bert")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same documents as JSON lines, as a folder of text files and as a store; and one text file."""
    folder = tmp_path_factory.mktemp("texts")
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    (folder / "lines.jsonl").write_text(lines, encoding="utf-8")
    (folder / "folder").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / "folder" / f"{number}.txt").write_text(text, encoding="utf-8")
    documents = [TOKENIZER.encode(text) for text in TEXTS]
    write_store(folder / "store", {"train": documents[:1], "validation": documents}, TOKENIZER)
    write_store(folder / "whole", {"train": documents[:1], "test": documents[1:]}, TOKENIZER)
    return folder


def unigram_nats(pairs, table):
    return [scoring.Scored(table[new], np.zeros(len(new), bool)) for _, new in pairs]


def check_every_byte_and_end_is_counted_once(evaluate, files, monkeypatch):
    """With a model that knows frequencies only, the sums are known, however windows and files are cut."""
    table = np.log(np.random.default_rng(0).dirichlet(np.ones(TOKENIZER.vocab_size)))
    monkeypatch.setattr(
        scoring, "token_logprobs", lambda scorer, params, pairs, **_: unigram_nats(pairs, table)
    )
    ids = np.concatenate([np.append(TOKENIZER.encode(t), TOKENIZER.eos_id) for t in TEXTS])
    nats = -table[ids].sum()
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    for data in DATA:
        for window, stride in ((MAX_LEN, MAX_LEN), (8, 3)):
            options = dict(text_field="body", window=window, stride=stride)
            found = evaluate(str(files / data), **options)
            assert found["tokens"] == num_bytes + 3 and found["bytes"] == num_bytes
            assert found["documents"] == 3
            np.testing.assert_allclose(found["nll"] * found["tokens"], nats)
            np.testing.assert_allclose(found["bits_per_byte"], nats / math.log(2) / num_bytes)
            np.testing.assert_allclose(found["perplexity"], np.exp(found["nll"]))


def test_every_byte_and_end_is_counted_once(gpt, files, monkeypatch):
    monkeypatch.setattr(text_evaluation, "GROUP_TOKENS", 30)
    check_every_byte_and_end_is_counted_once(
        lambda data, **options: evaluate_text(gpt, data, **options), files, monkeypatch
    )


def test_the_law_fails_if_documents_have_no_end(gpt, files, monkeypatch):
    monkeypatch.setattr(text_evaluation, "eos_of", lambda lm: ())
    with pytest.raises(AssertionError):
        check_every_byte_and_end_is_counted_once(
            lambda data, **options: evaluate_text(gpt, data, **options), files, monkeypatch
        )


def test_a_text_that_fits_has_the_models_own_loss(gpt, files):
    (files / "one.txt").write_text("while True:", encoding="utf-8")
    found = evaluate_text(gpt, str(files / "one.txt"))
    ids = np.array([TOKENIZER.bos_id, *TOKENIZER.encode("while True:"), TOKENIZER.eos_id])
    logits = tiny.run(gpt.model, gpt.params, {"tokens": jnp.asarray(ids[:-1])[None]})
    logits = np.asarray(logits.hidden[0] @ logits.unembed.T)
    logs = np.asarray(jax.nn.log_softmax(logits))
    nll = -logs[np.arange(12), ids[1:]].mean()
    np.testing.assert_allclose(found["nll"], nll, rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], (logs.argmax(-1) == ids[1:]).mean(), atol=1e-6)


def test_masked_metrics_are_the_same_each_time_and_of_text_and_store(bert, files):
    found = [evaluate_text(bert, str(files / data)) for data in ("folder", "store", "folder")]
    assert found[0] == found[2]
    for name in ("nll", "accuracy", "perplexity", "masked_tokens"):
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-6)
    num_tokens = sum(len(text.encode()) for text in TEXTS)
    assert 0.1 * num_tokens < found[0]["masked_tokens"] < 0.2 * num_tokens


def test_pseudo_perplexity_masks_every_token_of_the_first_windows(bert, files):
    found = evaluate_text(bert, str(files / "store"), window=16, num_pseudo=3)
    ids = [TOKENIZER.encode(text) for text in TEXTS[:2]]
    pieces = [ids[0][:14], ids[0][14:], ids[1]]
    rows = [np.array([TOKENIZER.cls_id, *piece, TOKENIZER.sep_id], np.int32) for piece in pieces]
    expected = scoring.pseudo_logprobs(
        scoring.make_scorer(bert.model, bert.num_ids),
        bert.params,
        rows,
        mask_id=TOKENIZER.mask_id,
        special_ids=TOKENIZER.special_ids,
        max_len=16,
    )
    total = sum(scored.total for scored in expected)
    assert found["pseudo_rows"] == 3
    assert found["pseudo_tokens"] == sum(map(len, pieces))
    np.testing.assert_allclose(found["pseudo_nll"], -total / found["pseudo_tokens"], rtol=1e-5)


def test_a_runs_own_store_has_the_metrics_of_its_own_evaluation(tmp_path):
    store = tiny_runs.make_store(tmp_path / "store")
    config = tiny_runs.tiny_config(
        "configs/bert.py:tiny,optimizer=adamw", store, objective__rate=0.3
    )
    workdir = tiny_runs.save_untrained(config, tmp_path / "run")
    own = evaluate.evaluate(workdir)
    found = evaluate.evaluate_data(str(workdir), str(store))
    assert found["documents"] == TokenStore(store, "validation").num_documents
    for name in ("nll", "accuracy"):
        np.testing.assert_allclose(found[name], own[name], rtol=1e-5)


BAD_LINES = '{"text": 1}\n{"other": "a"}\n{"text": "a\n{"text": ""}\n{"text": "fine"}\n'


def test_text_that_cannot_be_read_is_listed_with_its_lines(gpt, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(BAD_LINES, encoding="utf-8")
    with pytest.raises(BadInput) as error:
        evaluate_text(gpt, str(path))
    for number, reason in ((1, "not_text"), (2, "missing_field"), (3, "broken_json")):
        assert f"bad.jsonl:{number}: {reason}" in str(error.value)
    assert "jsonl:4" not in str(error.value)  # an empty text has nothing to predict


def test_what_cannot_be_evaluated_is_refused(gpt, bert, files, tmp_path):
    data = str(files / "lines.jsonl")
    with pytest.raises(BadInput, match="window=25: expected 3 to 24(.|\n)*pseudo-perplexity is of"):
        evaluate_text(gpt, data, window=25, num_pseudo=2)
    with pytest.raises(BadInput, match="stride=9: expected 1 to 8"):
        evaluate_text(gpt, data, window=8, stride=9)
    with pytest.raises(BadInput, match="a stride is of decoders"):
        evaluate_text(bert, data, stride=9)
    with pytest.raises(BadInput, match="W has only a body"):
        evaluate_text(dataclasses.replace(gpt, no_lm="has only a body"), data)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(BadInput, match="no text in it"):
        evaluate_text(gpt, str(tmp_path / "empty.txt"))
    other = make_tokenizer("chars", characters="ab", num_sentinels=0)
    write_store(tmp_path / "store", {"train": [other.encode("ab")]}, other)
    with pytest.raises(BadInput, match="another tokenizer than W's"):
        evaluate_text(gpt, str(tmp_path / "store"))


def test_flags_that_would_change_nothing_are_refused():
    flags = dict(checkpoint="hf:M", data="", baselines=False, output="", window=0, stride=0)
    with pytest.raises(ValueError, match="hf:M without --data(.|\n)*--stride=4: is of"):
        evaluate.refuse_unused(SimpleNamespace(**flags | {"stride": 4, "pseudo": 0}), False)
    fine = flags | {"checkpoint": "W", "stride": 4, "pseudo": 0, "data": "a.txt"}
    evaluate.refuse_unused(SimpleNamespace(**fine), False)
    with pytest.raises(ValueError, match="--stride=4: is of a pretrained model"):
        evaluate.refuse_unused(SimpleNamespace(**fine), True)
