"""Preferences: which tokens are compared, what the loss is, and that it is the same however pairs are laid out."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxlm.tasks import preference as module
from jaxlm.tasks.preference import Preference, answer_logprobs, token_logprobs
from tests.tasks.slots import Row, make_batch
from tests.tasks.test_writing import make, outputs_of, spelled

ROWS = [
    Row({"instruction": "Hi", "chosen": "Hello!", "rejected": "No."}),
    Row({"instruction": "1 + 1", "input": "?", "chosen": "2", "rejected": "three or four"}),
    Row({"instruction": "a", "chosen": "b", "rejected": "c"}),
]


def features_of(task, rows=ROWS):
    return [feature for row in rows for feature in task.features(row)[0]]


def logprobs_of(batch, outputs):
    """The definition: log softmax of all logits at once, summed slot by slot."""
    logits = np.asarray(outputs.hidden, np.float64) @ np.asarray(outputs.unembed, np.float64).T
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = np.take_along_axis(logprobs, batch["labels"][..., None], -1)[..., 0] * batch["weights"]
    slots = batch["example_ids"].shape[1]
    return np.stack([(own * (batch["segment_ids"] == e + 1)).sum(1) for e in range(slots)], 1)


def loss_of(task, outputs, batch):
    def loss(hidden, batch):
        return task.loss(SimpleNamespace(**vars(outputs) | {"hidden": hidden}), batch)

    return jax.jit(loss)(outputs.hidden, batch)


def test_both_answers_are_segments_as_drawn_and_only_they_count():
    task = make(Preference, seq_len=128)
    [feature], truncated = task.features(ROWS[0])
    for segment, answer in ((1, "Hello!<eos>"), (2, "No.<eos>")):
        here = feature["segments"] == segment
        assert spelled(feature["tokens"][here]).startswith("<bos>[user]\nHi\n[assistant]\n")
        assert spelled(feature["labels"][here & (feature["weights"] > 0)]) == answer
    assert not truncated and spelled(task.prompt(ROWS[0])).endswith("[assistant]\n")
    assert task.reference(ROWS[0]) == ["Hello!"]


def test_of_a_longer_dialogue_only_the_last_answers_are_compared():
    before = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    sides = {
        side: [*before, {"role": "assistant", "content": text}]
        for side, text in (("chosen", "x"), ("rejected", "y"))
    }
    [feature], _ = make(Preference, seq_len=160).features(Row(sides))
    assert spelled(feature["labels"][feature["weights"] > 0]) == "x<eos>y<eos>"


@pytest.mark.parametrize("chunk", [2**25, 1024])
def test_log_probabilities_are_by_definition_in_chunks_of_any_size(chunk, monkeypatch):
    monkeypatch.setattr(module, "LOGITS", chunk)
    batch, _ = make_batch(features_of(make(Preference, seq_len=128)), packed=True, length=200)
    outputs = outputs_of(batch)
    found = answer_logprobs(outputs, batch)
    np.testing.assert_allclose(found, logprobs_of(batch, outputs), rtol=1e-4, atol=1e-4)
    assert token_logprobs(outputs, batch["labels"]).shape == batch["labels"].shape


def check_reference(task, loss):
    """A model that is its own reference has margin 0 and the loss log 2; then the loss is that of the gains."""
    features = features_of(task)
    batch, _ = make_batch(features, packed=True, length=200)
    outputs = outputs_of(batch)
    said = logprobs_of(batch, outputs).astype(np.float32)
    (total, count), metrics = loss(task, outputs, batch | {"example_reference": said})
    assert count == len(ROWS) and total / count == pytest.approx(math.log(2), rel=1e-4)
    assert metrics["margin"][0] == pytest.approx(0, abs=1e-2)
    moved = said - np.where(batch["example_side"] == module.CHOSEN, 5.0, 2.0)  # 3 nats more gained
    (total, count), metrics = loss(task, outputs, batch | {"example_reference": moved})
    assert total / count == pytest.approx(math.log1p(math.exp(-task.beta * 3)), rel=1e-3)
    assert metrics["accuracy"][0] == metrics["accuracy"][1] == count


def all_neighbours(task, outputs, batch):
    """Wrong: every slot is compared with the next one, also with another pair's."""
    sides = np.full_like(batch["example_side"], module.CHOSEN)
    return loss_of(task, outputs, batch | {"example_side": sides})


def test_the_loss_is_that_of_what_is_gained_over_the_reference():
    check_reference(make(Preference, seq_len=128), loss_of)
    with pytest.raises(AssertionError):
        check_reference(make(Preference, seq_len=128), all_neighbours)


def test_packed_and_padded_pairs_have_one_loss():
    task, found = make(Preference, seq_len=128, beta=0.3), []
    for packed in (True, False):
        batch, _ = make_batch(features_of(task), packed=packed, length=200 if packed else 128)
        (total, count), _ = loss_of(task, outputs_of(batch), batch)
        found.append(float(total / count))
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_pairs_that_cannot_be_compared_are_told():
    task = make(Preference)
    other = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    one = [{"role": "user", "content": "z"}, {"role": "assistant", "content": "y"}]
    problem = lambda **fields: task.problem(Row(fields), True)
    assert "no rejected" in problem(instruction="a", chosen="b")
    assert "different dialogues" in problem(chosen=one, rejected=other)
    assert "does not end" in problem(chosen=one[:1], rejected=one[:1])
    assert problem(chosen=one, rejected=[one[0], {"role": "assistant", "content": "n"}]) == ""
    with pytest.raises(ValueError, match="beta=0"):
        make(Preference, beta=0.0)
