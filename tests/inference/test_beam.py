"""Beam search: exhaustive where it is wide enough, greedy where it has one beam, and of the hypotheses' own caches."""

import itertools

import jax
import numpy as np
import pytest

from jaxlm.inference import beam, decode
from jaxlm.inference.beam import BeamOptions, beam_search
from tests.models.tiny import MODERN, init_params, make_batch, make_gpt

MODEL = make_gpt(**MODERN, num_layers=2, vocab_size=13)
PARAMS = init_params(MODEL, make_batch(vocab_size=13))
DECODER = decode.make_decoder(MODEL)
PROMPTS = [np.array(ids, np.int32) for ids in ([3, 1, 4, 1, 5], [2], [7, 1, 8])]
EOS = 4


class Table:
    """A model of a few ids whose logits are drawn anew for every sequence; what it remembers are the tokens."""

    def __init__(self, vocab=3, seed=0):
        self.vocab, self.seed = vocab, seed

    def logits(self, tokens):
        return np.random.default_rng([self.seed, *tokens]).normal(0, 2, self.vocab)

    def read(self, rows):
        return np.array([self.logits(row) for row in rows], np.float32), rows

    def advance(self, rows, parents, tokens):
        return self.read([(*rows[p], int(t)) for p, t in zip(parents, tokens, strict=True)])

    def search(self, limit, **options):
        rows = self.read([(1,), (2, 0)])  # two prompts
        return beam.search(*rows, self.advance, [limit] * 2, BeamOptions(**options))


class Forgetful(Table):
    """Does not give each hypothesis the memory of the one that it continues."""

    def advance(self, rows, parents, tokens):
        parents = np.sort(parents) if len(rows) == 2 else np.arange(len(rows))
        return super().advance(rows, parents, tokens)


def every_continuation(table, prompt, limit, eos_id, length_penalty):
    """(score, tokens) of all that end with eos or have `limit` tokens, the best first."""
    found = []
    for length in range(1, limit + 1):
        for tokens in itertools.product(range(table.vocab), repeat=length):
            if eos_id in tokens[:-1] or (tokens[-1] != eos_id and length < limit):
                continue
            total = 0.0
            for t, token in enumerate(tokens):
                logits = table.logits((*prompt, *tokens[:t]))
                total += logits[token] - np.log(np.exp(logits).sum())
            own = tokens[:-1] if tokens[-1] == eos_id else tokens
            found.append((total / length**length_penalty, own))
    return sorted(found, reverse=True)


def check_exhaustive(make_table, length_penalty, early_stopping=False):
    for seed in range(4):
        table = make_table(seed=seed)
        options = dict(num_beams=81, eos_id=2, length_penalty=length_penalty)
        found = table.search(4, **options, early_stopping=early_stopping)
        for prompt, beams in zip([(1,), (2, 0)], found, strict=True):
            expected = every_continuation(table, prompt, 4, 2, length_penalty)
            assert [tuple(b.tokens.tolist()) for b in beams] == [tokens for _, tokens in expected]
            np.testing.assert_allclose(
                [b.score for b in beams], [s for s, _ in expected], rtol=1e-5
            )


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -0.7, 2.0])
def test_as_many_beams_as_there_are_continuations_find_them_all_in_order(length_penalty):
    check_exhaustive(Table, length_penalty)


def test_the_exhaustive_check_fails_if_the_cache_is_not_reordered():
    with pytest.raises(AssertionError):
        check_exhaustive(Forgetful, 1.0)


def test_more_beams_find_likelier_text_and_early_stopping_may_miss_it():
    """Of many tables: a wider search is better on average, and stopping at the first full set is no better than not."""
    options = dict(eos_id=2, length_penalty=0.0)
    best = lambda **more: np.mean(
        [Table(seed=s).search(6, **options, **more)[0][0].score for s in range(40)]
    )
    assert best(num_beams=1) < best(num_beams=2) < best(num_beams=8)
    patient = best(num_beams=3, early_stopping="never")
    assert best(num_beams=3, early_stopping=True) < best(num_beams=3) <= patient


def test_one_beam_is_greedy():
    for seed in range(30):
        table, tokens = Table(vocab=6, seed=seed), []
        while len(tokens) < 5 and 2 not in tokens:
            tokens.append(int(np.argmax(table.logits((2, 0, *tokens)))))
        [[found]] = table.search(5, num_beams=1, eos_id=2)[1:]
        assert found.tokens.tolist() == [token for token in tokens if token != 2]


def find(prompts=PROMPTS, **options):
    options = dict(num_beams=3, max_new_tokens=6, max_len=16, eos_id=EOS) | options
    return beam_search(DECODER, PARAMS, prompts, **options)


def read_anew(rows):
    """The log-probabilities (B, V) of what follows each row, all of it read at once."""
    tokens_BP, segment_ids_BP = decode.pad_left(rows, 16)
    params = DECODER.prepare(PARAMS)
    return jax.nn.log_softmax(DECODER.prefill(params, tokens_BP, segment_ids_BP, size=32)[0])


def check_scores(find):
    """A beam's score is what reading its tokens without a cache gives; a prompt's beams differ, the best is first."""
    found = find(num_return=3)
    assert sorted({len(beam.tokens) < 6 for beams in found for beam in beams}) == [False, True]
    for beams in zip(*found, strict=True):
        rows, totals = list(PROMPTS), np.zeros((3, 6))
        ended = [np.append(b.tokens, EOS)[:6] for b in beams]
        for t in range(6):
            logprobs_BV = np.asarray(read_anew(rows))
            for row in (row for row in range(3) if t < len(ended[row])):
                totals[row, t] = logprobs_BV[row, ended[row][t]]
                rows[row] = np.append(rows[row], ended[row][t])
        lengths = [len(tokens) for tokens in ended]
        np.testing.assert_allclose([b.score for b in beams], totals.sum(1) / lengths, rtol=1e-4)
    for beams in found:
        assert beams == sorted(beams, key=lambda b: -b.score)
        assert len({tuple(b.tokens) for b in beams}) == 3


@pytest.mark.core
def test_scores_of_beams_are_those_of_tokens_read_anew():
    check_scores(find)


def test_the_check_of_scores_fails_if_the_cache_is_not_reordered(monkeypatch):
    reorder = beam.reorder
    monkeypatch.setattr(beam, "reorder", lambda cache, ids: reorder(cache, np.sort(ids)))
    with pytest.raises(AssertionError):
        check_scores(find)


def test_prompts_of_different_lengths_do_not_affect_each_other():
    """Nor do rows that are done early, or that have room for one token more or for none."""
    full = np.arange(16, dtype=np.int32) % 13
    together = find(num_return=3)
    for row, prompt in enumerate(PROMPTS):
        others = [prompt if i == row else full[i // 2 :] for i in range(3)]
        for found, expected in zip(find(others, num_return=3)[row], together[row], strict=True):
            np.testing.assert_array_equal(found.tokens, expected.tokens)
            np.testing.assert_allclose(found.score, expected.score, rtol=1e-5)
    none, one, _ = find([full, full[1:], PROMPTS[0]], num_return=3)
    assert [(len(b.tokens), b.score) for b in none] == [(0, 0.0)]
    assert len(one) == 3 and {len(b.tokens) for b in one} <= {0, 1}


def test_the_number_of_tokens_and_the_lengths_of_prompts_compile_nothing():
    find()
    programs = lambda: [
        f._cache_size() for f in (DECODER.prefill, DECODER.step, beam.rank_candidates, beam.reorder)
    ]
    before = programs()
    find([PROMPTS[1]] * 3, max_new_tokens=3, length_penalty=0.5, eos_id=-1, early_stopping=True)
    assert programs() == before


def test_options_out_of_range_are_named_all_at_once():
    with pytest.raises(ValueError) as error:
        find(num_beams=0, num_return=2, early_stopping="always", length_penalty=np.nan)
    for wrong in ("length_penalty=nan", "num_beams=0", "num_return=2", "early_stopping='always'"):
        assert wrong in str(error.value)
    with pytest.raises(ValueError, match="row 0 has 0 tokens"):
        find([np.zeros(0, np.int32)])
