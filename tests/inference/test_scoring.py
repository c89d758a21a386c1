"""Log-probabilities of given tokens: by definition, in any batch, in windows and under masks."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import program as programs
from jaxlm.inference import scoring
from jaxlm.objectives.losses import cross_entropy
from jaxlm.parallel import mesh as meshes
from tests.models import tiny

MAX_LEN, SPECIAL, MASK = 24, (0, 1, 2), 2
GPT = tiny.make_gpt(max_len=MAX_LEN, final_softcap=3.0)
BERT = tiny.make_bert(max_len=MAX_LEN, **tiny.CLASSIC)
DUMMY = {"tokens": jnp.zeros((1, 4), jnp.int32)}


@functools.cache
def params_of(model):
    return tiny.init_params(model, DUMMY)


def ids(seed, size, low=3):
    return np.random.default_rng(seed).integers(low, 32, size).astype(np.int32)


def make_pairs():
    """Contexts and continuations of many lengths, the longest as long as the context and one more."""
    sizes = [(1, 1), (5, 3), (20, 5), (3, 20), (1, 24), (24, 1), (9, 2), (2, 9), (15, 1), (1, 16)]
    return [(ids(i, c), ids(100 + i, n)) for i, (c, n) in enumerate(sizes)]


@functools.cache
def compiled(model):
    return jax.jit(lambda params, batch: jax.nn.log_softmax(tiny.get_logits(model, params, batch)))


def plain_logs(model, tokens):
    """(t, V): log-probabilities of everything at each place of one row, all logits at once."""
    row = np.zeros((1, MAX_LEN), np.int32)
    row[0, : len(tokens)] = tokens
    real = (np.arange(MAX_LEN) < len(tokens)).astype(np.int32)[None]
    batch = {"tokens": row, "segment_ids": real}
    return np.asarray(compiled(model)(params_of(model), batch))[0, : len(tokens)]


def plain_logprobs(tokens):
    """log p of each id of `tokens` after the first, and whether it is the likeliest."""
    logs = plain_logs(GPT, tokens[:-1])
    return logs[np.arange(len(tokens) - 1), tokens[1:]], logs.argmax(-1) == tokens[1:]


def score(pairs, scorer=None, **options):
    scorer = scorer or scoring.make_scorer(GPT)
    options = {"max_len": MAX_LEN, "batch_tokens": 32} | options
    return scoring.token_logprobs(scorer, params_of(GPT), pairs, **options)


def check_scores_are_the_definition(score):
    pairs = make_pairs()
    for (context, continuation), found in zip(pairs, score(pairs), strict=True):
        whole = np.concatenate([context, continuation])
        logprobs, likeliest = plain_logprobs(whole)
        np.testing.assert_allclose(found.logprobs, logprobs[len(context) - 1 :], atol=2e-5)
        np.testing.assert_array_equal(found.likeliest, likeliest[len(context) - 1 :])
        np.testing.assert_allclose(found.total, found.logprobs.sum(), rtol=1e-5)
        assert found.is_greedy == likeliest[len(context) - 1 :].all()


def test_scores_are_the_definition_in_the_order_of_the_requests():
    check_scores_are_the_definition(score)


def test_the_law_fails_for_results_in_the_order_of_their_lengths():
    def sorted_by_length(pairs):
        return sorted(score(pairs), key=lambda found: len(found.logprobs))

    with pytest.raises(AssertionError):
        check_scores_are_the_definition(sorted_by_length)


def test_the_law_fails_for_labels_one_off():
    with pytest.raises(AssertionError):
        check_scores_are_the_definition(
            lambda pairs: score([(context, np.roll(new, 1)) for context, new in pairs])
        )


def test_chunks_of_the_vocabulary_change_nothing(monkeypatch):
    """Seven slots of a row at a time, which divides no length: the last chunk overlaps the one before."""
    monkeypatch.setattr(scoring, "LOGITS", 7 * 32)
    check_scores_are_the_definition(functools.partial(score, scorer=scoring.Scorer(GPT, None)))


def test_greedy_text_is_greedy_and_other_text_is_not():
    context = ids(0, 4)
    tokens = context
    for _ in range(3):
        tokens = np.append(tokens, np.int32(plain_logs(GPT, tokens)[-1].argmax()))
    other = tokens[4:].copy()
    other[1] = (other[1] + 1) % 32
    greedy, changed = score([(context, tokens[4:]), (context, other)])
    assert greedy.is_greedy and not changed.is_greedy and changed.likeliest[0]


def test_ids_past_the_tokenizers_have_no_probability():
    context = ids(0, 6)
    every = [(context, np.array([i], np.int32)) for i in range(20)]
    some = score(every, scorer=scoring.Scorer(GPT, 20))
    np.testing.assert_allclose(np.exp([s.total for s in some]).sum(), 1.0, atol=1e-5)
    assert sum(s.is_greedy for s in some) == 1


def test_many_requests_compile_few_programs():
    scorer = scoring.Scorer(GPT, None)
    rng = np.random.default_rng(0)
    for seed in range(8):
        count = int(rng.integers(1, 12))
        pairs = [
            (ids(seed, rng.integers(1, 20)), ids(seed + 1, rng.integers(1, 6)))
            for _ in range(count)
        ]
        score(pairs, scorer=scorer)
    # 2 rows of 16 tokens, 1 of 24
    assert scorer.score_batch._cache_size() == 2


def test_choices_that_differ_in_their_last_id_are_read_once(monkeypatch):
    """Their scores are the definition (`test_scores_are_the_definition`), but the model reads one row."""
    scorer, seen = scoring.Scorer(GPT, None), []
    score_rows = scorer.score
    monkeypatch.setattr(
        scorer, "score", lambda p, rows, **kw: seen.append(rows) or score_rows(p, rows, **kw)
    )
    choices = [(ids(0, 9), np.array([i], np.int32)) for i in range(30)]
    choices += [
        (ids(0, 7), np.append(ids(0, 9)[7:], np.int32(4)))
    ]  # cut elsewhere, and ids 7, 8 also asked for
    found = score([*choices, (ids(1, 9), ids(2, 2))], scorer=scorer)
    assert [len(row.places) for row in seen[0]] == [33, 2]
    np.testing.assert_allclose(
        [f.total for f in found[:30]], plain_logs(GPT, ids(0, 9))[-1][:30], atol=2e-5
    )
    np.testing.assert_allclose(found[30].logprobs[-1], found[4].total, atol=2e-5)


def test_batches_are_as_large_as_asked_for_and_hold_every_row_once():
    rows = [scoring.Row(ids(i, 1 + i % 40), np.arange(1), ids(i, 1)) for i in range(100)]
    batches = list(scoring.plan(rows, 40, 128))
    assert sorted(i for batch in batches for i in batch.indices) == list(range(100))
    for batch in batches:
        assert batch.length in (16, 32, 40) and batch.rows * batch.length <= 128
        assert all(len(rows[i].tokens) <= batch.length for i in batch.indices)
        assert len(batch.indices) <= batch.rows <= max(2, 4 * len(batch.indices))
    assert len({(batch.rows, batch.length) for batch in batches}) <= 2 + 2 + 2


def test_sums_are_the_training_losss():
    tokens = ids(0, 20)
    (found,) = score([(tokens[:1], tokens[1:])])
    out = tiny.run(GPT, params_of(GPT), {"tokens": jnp.asarray(tokens[:-1])[None]})
    _, metrics = cross_entropy(
        out.hidden,
        out.unembed,
        jnp.asarray(tokens[1:])[None],
        jnp.ones((1, 19)),
        softcap=out.softcap,
    )
    np.testing.assert_allclose(-found.total, metrics["nll"][0], rtol=1e-5)
    np.testing.assert_allclose(found.likeliest.sum(), metrics["accuracy"][0])


# --- windows ----------------------------------------------------------------------------------------------------------

UNIGRAM = np.log(np.random.default_rng(5).dirichlet(np.ones(32))).astype(np.float32)


def score_unigram(pairs):
    """A model without context, in numpy."""
    return [scoring.Scored(UNIGRAM[new], np.zeros(len(new), bool)) for _, new in pairs]


def check_every_token_is_counted_once(rolling):
    for size in (1, 2, 5, 8, 9, 10, 17, 31):
        text = ids(size, size)
        for window in (1, 4, 8):
            for stride in range(1, window + 1):
                (found,) = rolling(score_unigram, [text], window=window, stride=stride)
                np.testing.assert_array_equal(found.logprobs, UNIGRAM[text[1:]])


def test_every_token_is_counted_once_and_a_model_without_context_does_not_see_windows():
    check_every_token_is_counted_once(scoring.rolling)


def test_the_law_fails_for_windows_that_count_the_overlap_twice():
    def overlapping(score_pairs, texts, *, window, stride):
        spans = [w._replace(first=w.start + 1) for w in windows(len(texts[0]), window, stride)]
        pairs = [(texts[0][w.start : w.first], texts[0][w.first : w.stop]) for w in spans]
        return [scoring.join(score_pairs(pairs))]

    windows = scoring.make_windows
    with pytest.raises(AssertionError):
        check_every_token_is_counted_once(overlapping)


def test_every_token_but_the_first_windows_has_the_context_that_the_stride_leaves():
    for window, stride in ((8, 3), (8, 8), (5, 1)):
        first, *others = scoring.make_windows(40, window, stride)
        assert first == (0, 1, window + 1)
        for w in others:
            assert w.first - w.start == window - stride + 1 and w.stop - 1 - w.start <= window


def test_a_text_that_fits_one_window_has_the_plain_loss():
    text = ids(3, MAX_LEN + 1)
    (found,) = scoring.rolling(score, [text], window=MAX_LEN, stride=MAX_LEN)
    np.testing.assert_allclose(found.logprobs, plain_logprobs(text)[0], atol=2e-5)


def test_texts_of_several_windows_come_back_whole_and_in_order():
    texts = [ids(i, size) for i, size in enumerate((30, 1, 7, 60))]
    found = scoring.rolling(score, texts, window=8, stride=4)
    assert [len(f.logprobs) for f in found] == [29, 0, 6, 59]
    plain = plain_logprobs(texts[3][4:13])[0]  # the second window
    np.testing.assert_allclose(found[3].logprobs[8:12], plain[4:], atol=2e-5)


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_leaves_tokens_out_is_refused(stride):
    with pytest.raises(ValueError, match=f"found stride {stride} and window 8"):
        scoring.rolling(score, [ids(0, 30)], window=8, stride=stride)


# --- under masks ------------------------------------------------------------------------------------------------------


def pseudo(texts, **options):
    options = dict(mask_id=MASK, special_ids=SPECIAL, max_len=MAX_LEN, batch_tokens=32) | options
    return scoring.pseudo_logprobs(scoring.make_scorer(BERT), params_of(BERT), texts, **options)


def check_pseudo_logprobs(pseudo):
    texts = [np.concatenate([[0], ids(i, size), [1]]) for i, size in enumerate((3, 20, 1))]
    texts.append(np.array([0, 1]))  # nothing to ask for
    for text, found in zip(texts, pseudo(texts), strict=True):
        expected = []
        for place in range(1, len(text) - 1):
            masked = text.copy()
            masked[place] = MASK
            expected.append(plain_logs(BERT, masked)[place, text[place]])
        np.testing.assert_allclose(found.logprobs, expected, atol=2e-5)


def test_each_token_is_masked_alone_and_specials_are_not_asked_for():
    check_pseudo_logprobs(pseudo)


def test_few_masked_copies_are_there_at_a_time_in_the_batches_of_all_at_once(monkeypatch):
    texts = [np.concatenate([[0], ids(i, 1 + i % 22), [1]]) for i in range(23)]
    seen = {}
    for copies in (10**6, 2):
        calls = seen[copies] = []

        def score(params, rows, *, max_len, batch_tokens, calls=calls):
            calls.append([(b.rows, b.length) for b in scoring.plan(rows, max_len, batch_tokens)])
            says = [np.float32([row.labels[0] + row.tokens.sum()]) for row in rows]
            return [scoring.Scored(said, said > 40) for said in says]

        monkeypatch.setattr(scoring, "COPIES", copies)
        scorer = SimpleNamespace(score=score)
        options = dict(mask_id=MASK, special_ids=SPECIAL, max_len=MAX_LEN, batch_tokens=64)
        for text, found in zip(
            texts, scoring.pseudo_logprobs(scorer, None, texts, **options), strict=True
        ):
            inner = text[1:-1]
            np.testing.assert_array_equal(found.logprobs, np.full(len(inner), text.sum() + MASK))
    together, apart = (sum(seen[copies], []) for copies in (10**6, 2))
    assert apart == together and max(map(len, seen[2])) == 2 < max(map(len, seen[10**6]))


def test_the_law_fails_if_the_token_stays_in_sight():
    with pytest.raises(AssertionError):
        check_pseudo_logprobs(lambda texts: pseudo(texts, mask_id=5))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_empty_and_too_long_requests_are_listed():
    with pytest.raises(ValueError, match="pair 1 has 0 ids of context and 2 of continuation"):
        score([(ids(0, 2), ids(0, 2)), (ids(0, 0), ids(0, 2))])
    with pytest.raises(ValueError, match="row 0 has 26 tokens(.|\n)*row 2 has 25"):
        score([(ids(0, 26), ids(0, 1)), (ids(0, 1), ids(0, 1)), (ids(0, 20), ids(0, 6))])


def test_parameters_that_are_no_numbers_are_refused():
    broken = jax.tree.map(lambda x: x * np.nan, params_of(GPT))
    with pytest.raises(ValueError, match="the parameters have NaN"):
        scoring.token_logprobs(scoring.make_scorer(GPT), broken, make_pairs()[:1], max_len=MAX_LEN)


def test_a_mesh_changes_nothing():
    """Rows over two devices, heads and vocabulary over two: also a batch of fewer rows than devices."""
    mesh = meshes.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    scorer = scoring.Scorer(GPT, None)
    check_scores_are_the_definition(programs.in_mesh(mesh, functools.partial(score, scorer=scorer)))
