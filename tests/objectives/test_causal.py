"""Labels are the next token of the same document, drawn in CausalLM's docstring."""

import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objectives import OBJECTIVES, CausalLM


def check_next_token_of_the_same_document(objective, example, seq_len):
    """Every weighted label is the token at its place plus one, and that is in the same segment."""
    row = objective.corrupt(np.random.default_rng(0), example, seq_len)
    raw, segments = example["tokens"], example["segment_ids"]
    for t in range(seq_len):
        if row["weights"][t]:
            assert row["tokens"][t] == raw[t] and row["labels"][t] == raw[t + 1]
            assert segments[t] == segments[t + 1] == row["segment_ids"][t]
    assert row["weights"].sum() == (segments[1:] == segments[:-1]).sum()
    return row


def test_the_picture(tokenizer):
    the, cat, a, dog = 7, 8, 9, 10
    raw = np.array([1, the, cat, 2, 1, a, dog], np.int32)
    segment_ids = np.array([1, 1, 1, 1, 2, 2, 2], np.int32)
    positions = np.array([0, 1, 2, 3, 0, 1, 2], np.int32)
    example = {"tokens": raw, "segment_ids": segment_ids, "positions": positions}
    row = CausalLM(tokenizer=tokenizer).corrupt(np.random.default_rng(0), example, 6)
    assert row["tokens"].tolist() == [1, the, cat, 2, 1, a]
    assert row["labels"].tolist() == [the, cat, 2, 1, a, dog]
    assert row["weights"].tolist() == [1, 1, 1, 0, 1, 1]
    assert row["segment_ids"].tolist() == [1, 1, 1, 1, 2, 2]
    assert row["positions"].tolist() == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("lengths", [(33,), (2, 3, 28), (16, 17), (5,), (2,)])
def test_labels_are_the_next_token_of_the_same_document(tokenizer, make_example, lengths):
    example = make_example(np.random.default_rng(1), lengths)
    row = check_next_token_of_the_same_document(CausalLM(tokenizer=tokenizer), example, 32)
    assert {k: (v.shape, str(v.dtype)) for k, v in row.items()} == {
        "tokens": ((32,), "int32"),
        "segment_ids": ((32,), "int32"),
        "positions": ((32,), "int32"),
        "labels": ((32,), "int32"),
        "weights": ((32,), "float32"),
    }
    assert not row["segment_ids"][sum(lengths) - 1 :].any()  # padding


def test_the_law_fails_for_labels_across_documents(tokenizer, make_example):
    class Wrong(CausalLM):
        def corrupt(self, rng, example, seq_len):
            row = super().corrupt(rng, example, seq_len)
            return {**row, "weights": np.ones_like(row["weights"])}

    with pytest.raises(AssertionError):
        example = make_example(np.random.default_rng(1), (16, 17))
        check_next_token_of_the_same_document(Wrong(tokenizer=tokenizer), example, 32)


def test_bits_per_byte_of_a_uniform_model_is_the_entropy_of_a_token_over_its_bytes(
    tokenizer, make_example
):
    objective = CausalLM(tokenizer=tokenizer)
    row = objective.corrupt(None, make_example(np.random.default_rng(1), (10, 23)), 32)
    batch = {key: jnp.asarray(value)[None] for key, value in row.items()}
    outputs = SimpleNamespace(
        hidden=jnp.zeros((1, 32, 4)),
        unembed=jnp.ones((tokenizer.vocab_size, 4)),
        unembed_bias=None,
        softcap=0.0,
    )
    (total, weight), metrics = objective.loss(outputs, batch)
    assert weight == 9 + 22
    np.testing.assert_allclose(total / weight, math.log(tokenizer.vocab_size), rtol=1e-5)
    bits, num_bytes = metrics["bits_per_byte"]
    assert num_bytes == 3 * (33 - 4)  # no bytes for [bos] and [eos]
    np.testing.assert_allclose(bits, 31 * math.log2(tokenizer.vocab_size), rtol=1e-5)
    assert set(metrics) == {"loss", "nll", "accuracy", "bits_per_byte"}


def one_document(size):
    part = {
        "tokens": np.arange(7, 7 + size, dtype=np.int32) % 90 + 7,
        "segment_ids": np.ones(size, np.int32),
        "positions": np.arange(size, dtype=np.int32),
        "sentence_starts": np.arange(size) % 5 == 1,
    }
    return part


def test_every_objective_is_built_from_a_tokenizer_and_says_its_sizes(tokenizer):
    parts = {"a": {"name": "causal"}, "b": {"name": "fim"}}
    for name, make in OBJECTIVES.items():
        objective = make(
            tokenizer=tokenizer, **({"objectives": parts} if name == "mixture" else {})
        )
        window = objective.window(64)
        assert 0 < window.stride <= window.length
        example = one_document(window.length)
        example |= {"other": example} if window.pair else {}
        row = objective.corrupt(np.random.default_rng(0), example, 64)
        assert objective.num_predictions(64) == len(row["labels"]), name
