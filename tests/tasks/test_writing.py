"""Tasks whose predictions are texts: what is read, what is learned, and what a model is asked."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxlm.objectives.losses import cross_entropy
from jaxlm.tasks.chat import DEFAULT_TEMPLATE
from jaxlm.tasks.dialogue import Dialogue, fit
from jaxlm.tasks.seq2seq import Seq2Seq, first_sentence
from jaxlm.tasks.writing import Writer, next_tokens
from tests.tasks.slots import TOKENIZER, Row, make_batch

T = TOKENIZER
BOS, EOS, SEP, PAD = T.bos_id, T.eos_id, T.sep_id, T.pad_id


def make(kind, family="gpt", seq_len=64, **options):
    prefix = (BOS,) if family == "gpt" else ()
    writer = Writer(family, seq_len, prefix, PAD, DEFAULT_TEMPLATE, cross_entropy)
    return kind(T, writer, kind.infer([]), **{"target_len": 16} | options)


def spelled(ids):
    """Ids as text, special ones by name."""
    return "".join(T.token(int(i)) if int(i) in T.special_ids else T.decode([int(i)]) for i in ids)


def chat(*contents):
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return Row({"messages": turns})


# --- instructions and dialogues ---------------------------------------------------------------------------------------


def test_a_dialogue_is_read_as_drawn_and_its_answers_are_learned():
    [feature], truncated = make(Dialogue).features(chat("Hi", "Hello!", "x", "y"))
    whole = "<bos>[user]\nHi\n[assistant]\nHello!<eos>\n[user]\nx\n[assistant]\ny<eos>"
    assert spelled(feature["tokens"]) == whole.removesuffix("<eos>") and not truncated
    assert spelled(feature["labels"]) == whole.removeprefix("<bos>")
    assert spelled(feature["labels"][feature["weights"] > 0]) == "Hello!<eos>y<eos>"


def test_labels_and_weights_are_of_the_next_token():
    feature = next_tokens(np.array([7, 8, 9]), np.array([False, False, True]))
    assert {key: value.tolist() for key, value in feature.items()} == {
        "tokens": [7, 8],
        "labels": [8, 9],
        "weights": [0, 1],
    }


FORMS = {
    "instruction": {"instruction": "Add.", "input": "1 2", "output": "3"},
    "messages": {
        "messages": [
            {"role": "user", "content": "Add.\n\n1 2"},
            {"role": "assistant", "content": "3"},
        ]
    },
}


def test_both_forms_of_a_file_and_a_system_of_the_config_say_the_same():
    task = make(Dialogue, system="Be short.")
    texts = {spelled(task.features(Row(fields))[0][0]["tokens"]) for fields in FORMS.values()}
    assert texts == {"<bos>[system]\nBe short.\n[user]\nAdd.\n\n1 2\n[assistant]\n3"}
    own = {"instruction": "Add.", "system": "Be long.", "output": "3"}
    assert "Be long." in spelled(task.features(Row(own))[0][0]["tokens"])


def test_a_prompt_ends_where_the_last_answer_begins():
    task = make(Dialogue)
    for record in (chat("Hi", "Hello!", "x", "y"), chat("Hi", "Hello!", "x")):
        assert spelled(task.prompt(record)).endswith("Hello!<eos>\n[user]\nx\n[assistant]\n")
    assert task.reference(chat("Hi", "Hello!", "x", "y")) == ["y"]
    assert task.reference(chat("Hi")) == [] and not task.is_labelled(chat("Hi"))
    assert spelled(task.prompt(Row({"text": "Hi"}))) == "<bos>[user]\nHi\n[assistant]\n"


def test_a_dialogue_that_is_too_long_keeps_its_end_and_the_beginning_of_its_last_answer():
    task = make(Dialogue, seq_len=24, target_len=8)
    [feature], truncated = task.features(chat("abcdefghijkl", "0123456789"))
    assert truncated and len(feature["tokens"]) == 24
    learned = spelled(feature["labels"][feature["weights"] > 0])
    assert "0123456789<eos>".startswith(learned) and len(learned) >= 8
    prompt = spelled(task.prompt(chat("abcdefghijkl", "0123456789")))
    assert len(prompt) == 24 - 8 and prompt.endswith("kl\n[assistant]\n")
    [feature], truncated = task.features(chat("a", "0" * 30, "b", "1"))
    assert truncated and spelled(feature["labels"][feature["weights"] > 0]) == "1<eos>"


def test_what_is_kept_never_leaves_an_answer_without_its_question():
    rng = np.random.default_rng(0)
    for _ in range(300):
        runs = rng.integers(1, 12, 2 * rng.integers(1, 4))
        is_answer = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        room = int(rng.integers(4, 40))
        target_len = int(rng.integers(1, room - 1))
        kept = fit(is_answer, room, target_len)
        here = is_answer[kept]
        asked = np.cumsum(~here) > 0
        assert 0 < len(here) <= room and (here & asked).any()
        if len(is_answer) <= room:
            assert len(here) == len(is_answer)


PROBLEMS = [
    ({}, "no instruction and no message"),
    ({"messages": []}, "no message"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no answer to learn"),
    ({"instruction": "a"}, "no answer to learn"),
]


@pytest.mark.parametrize("fields, message", PROBLEMS)
def test_dialogues_of_which_nothing_can_be_learned_are_told(fields, message):
    assert message in make(Dialogue).problem(Row(fields), True)
    assert make(Dialogue).problem(chat("a", "b"), True) == ""


# --- pairs of texts ---------------------------------------------------------------------------------------------------

PAIR = Row({"source": "abc", "target": ["xy"]})


def test_a_decoder_reads_a_pair_as_drawn():
    [feature], _ = make(Seq2Seq).features(PAIR)
    assert spelled(feature["tokens"]) == "<bos>abc<sep>xy"
    assert spelled(feature["labels"]) == "abc<sep>xy<eos>"
    assert feature["weights"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert spelled(make(Seq2Seq).prompt(PAIR)) == "<bos>abc<sep>"


def test_an_encoder_decoder_reads_a_pair_as_drawn():
    [feature], _ = make(Seq2Seq, "encoder_decoder").features(PAIR)
    assert spelled(feature["encoder_tokens"]) == "abc<eos>"
    assert spelled(feature["tokens"]) == "<pad>xy" and spelled(feature["labels"]) == "xy<eos>"
    assert feature["weights"].tolist() == [1, 1, 1]
    assert spelled(make(Seq2Seq, "encoder_decoder").prompt(PAIR)) == "abc<eos>"


def test_bart_begins_both_texts_with_its_bos():
    writer = Writer("encoder_decoder", 64, (BOS,), EOS, "", cross_entropy)
    [feature], _ = Seq2Seq(T, writer, {}, target_len=16).features(PAIR)
    assert spelled(feature["encoder_tokens"]) == "<bos>abc<eos>"
    assert spelled(feature["tokens"]) == "<eos><bos>xy"
    assert spelled(feature["labels"]) == "<bos>xy<eos>"


def test_prefixes_and_controls_stand_before_the_source():
    task = make(Seq2Seq, prefix="to German: ")
    record = Row({"source": "abc", "target": ["xy"], "control": "formal"})
    assert spelled(task.prompt(record)) == "<bos>to German: formal abc<sep>"
    assert task.problem(Row({"source": " ", "target": ["x"]}), True) == "the source is empty"
    assert task.problem(Row({"source": "a", "target": [" "]}), True) == "the target is missing"


@pytest.mark.parametrize("family", Seq2Seq.families)
def test_texts_that_are_too_long_fill_their_rows_and_no_more(family):
    task = make(Seq2Seq, family, seq_len=24, target_len=6)
    [feature], truncated = task.features(Row({"source": "a" * 99, "target": ["b" * 99]}))
    assert truncated and spelled(feature["labels"]).endswith("bbbbb<eos>")
    sizes = {key: len(feature[key]) for key in ("tokens", "encoder_tokens") if key in feature}
    assert sizes == ({"tokens": 24} if family == "gpt" else {"tokens": 6, "encoder_tokens": 24})
    fitting = Row({"source": "a" * 17, "target": ["b" * 5]})
    assert task.features(fitting)[1] is False


def test_every_reference_is_an_example_and_all_of_them_score():
    task = make(Seq2Seq, metrics="exact_match", baseline="lead")
    record = Row({"source": "One. Two.", "target": ["x", "One."]})
    assert len(task.features(record)[0]) == 2
    said = [{"text": "x"}, {}]
    assert task.scores([record, PAIR], said) == {"exact_match": 1.0, "lead_exact_match": 1.0}
    assert task.scores([PAIR], [{"text": "other"}])["exact_match"] == 0.0
    assert task.scores([PAIR], [{}]) == {}
    assert "'x'" in task.report([record, PAIR], said)


def test_the_lead_is_the_first_sentence():
    assert first_sentence("We use e.g. two. They work.") == "We use e.g. two."
    assert first_sentence('He said "Go!" Then he went.') == 'He said "Go!"'
    assert first_sentence(" no end ") == "no end"


def test_wrong_options_and_models_are_all_told():
    with pytest.raises(ValueError, match="(?s)'bert'.*rougue.*target_len=64"):
        make(Seq2Seq, "bert", metrics="rougue", target_len=64)
    with pytest.raises(ValueError, match="dialogue takes gpt"):
        make(Dialogue, "encoder_decoder")
    with pytest.raises(ValueError, match="baseline='first'"):
        make(Seq2Seq, baseline="first")


# --- packed and padded ------------------------------------------------------------------------------------------------

RECORDS = {
    Dialogue: [chat("Hi", "Hello!"), chat("a", "b", "c", "d"), chat("what?", "that")],
    Seq2Seq: [Row({"source": "ab" * n, "target": ["x" * n]}) for n in (1, 3, 2)],
}


def outputs_of(batch, width=8):
    """What a model says at each place, a fixed function of its token and of its place in its segment."""
    rng = np.random.default_rng(0)
    of_token, of_place = rng.normal(size=(2, 512, width)).astype(np.float32)
    table = rng.normal(size=(T.vocab_size, width)).astype(np.float32)
    hidden = of_token[np.asarray(batch["tokens"])] + of_place[np.asarray(batch["positions"])]
    return SimpleNamespace(hidden=hidden, unembed=table, unembed_bias=None, softcap=0.0)


def check_packing(task, records, loss):
    """Packed and padded batches of the same examples have one loss."""
    features = [f for record in records for f in task.features(record)[0]]
    found = []
    for packed in (True, False):
        batch, _ = make_batch(features, packed=packed, length=192 if packed else 64)
        total, weight = loss(task, outputs_of(batch), batch)
        found.append(float(total) / float(weight))
    np.testing.assert_allclose(*found, rtol=1e-5)


def jitted_loss(task, outputs, batch):
    def loss(hidden, batch):
        outputs.hidden = hidden
        return task.loss(outputs, batch)[0]

    return jax.jit(loss)(outputs.hidden, batch)


def mean_of_rows(task, outputs, batch):
    """Wrong: rows with few answers weigh as much as rows with many."""
    totals = [
        jitted_loss(task, outputs_of(row), row)
        for row in (
            {k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["tokens"]))
        )
    ]
    means = [total / weight for total, weight in totals if weight]
    return sum(means), len(means)


@pytest.mark.parametrize("kind", RECORDS)
def test_packed_and_padded_batches_have_one_loss(kind):
    check_packing(make(kind), RECORDS[kind], jitted_loss)
    with pytest.raises(AssertionError):
        check_packing(make(kind), RECORDS[kind], mean_of_rows)
