"""Batch k is a pure function of (seed, k): of no process, worker, order of asking, or restart."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash

from jaxlm.data.blocks import BLOCK_BYTES, block_sums, num_blocks
from jaxlm.data.pipeline import PERIOD, EvalBatches, Mixture, TrainBatches, make_iterator
from jaxlm.data.positions import StepBatches
from jaxlm.data.store_format import sha256_of
from jaxlm.data.store_writer import finish_store, write_store
from jaxlm.data.token_store import TokenStore
from jaxlm.objectives import OBJECTIVES, CausalLM, MaskedLM

SEQ_LEN = 16
PARTS = {"a": {"name": "span_corruption"}, "b": {"name": "ul2"}, "c": {"name": "denoising"}}
OPTIONS = {"mixture": {"objectives": PARTS, "shares": ("0:a=1,b=2,c=1", "30:a=1,c=4")}}


class ToyTokenizer(SimpleNamespace):
    def sentence_starts(self, ids):
        return np.arange(0, len(ids), 4)

    def save(self, directory):
        directory.mkdir()


def make_tokenizer():
    num_bytes = np.arange(100, dtype=np.int32) % 5 + 1
    num_bytes[:7] = num_bytes[90:] = 0
    return ToyTokenizer(
        vocab_size=100,
        **dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3, cls_id=4, sep_id=5, mask_id=6),
        sentinel_ids=tuple(range(90, 100)),
        special_ids=frozenset([*range(7), *range(90, 100)]),
        is_word_start=np.arange(100) % 2 == 1,
        num_bytes=num_bytes,
        sha256="0" * 64,
    )


TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("pipeline")
    for name, count in (("books", 40), ("code", 11)):
        documents = [rng.integers(7, 90, rng.integers(0, 60)) for _ in range(count)]
        write_store(folder / name, {"train": documents}, TOKENIZER, shard_tokens=300)
    return {name: TokenStore(folder / name) for name in ("books", "code")}


WEIGHTS = {0: {"books": 0.75, "code": 0.25}, 30: {"books": 0.1, "code": 0.9}}


def make_batches(stores, name="mlm", seed=1, rows=None, weights=WEIGHTS, **options):
    objective = OBJECTIVES[name](tokenizer=TOKENIZER, **options)
    return TrainBatches(stores, weights, objective, SEQ_LEN, 6, seed, rows)


def first(count, batches):
    return StepBatches(batches, (), count)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key in found:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)
        assert found[key].dtype == expected[key].dtype


def check_pure(make):
    """`make(rows)[k]` depends on k alone: not on what was asked before, nor on the row subset."""
    whole = make(None)
    expected = [whole[k] for k in range(len(whole))]
    backwards = make(None)
    for k in reversed(range(len(expected))):
        assert_equal(backwards[k], expected[k])
    parts = [make(np.array(rows)) for rows in ([0, 1, 5], [2], [3, 4])]
    order = np.argsort([0, 1, 5, 2, 3, 4])
    for k, batch in enumerate(expected):
        pieces = [part[k] for part in parts]
        joined = {key: np.concatenate([p[key] for p in pieces])[order] for key in batch}
        assert_equal(joined, batch)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_is_a_pure_function_of_its_number(stores, name):
    options = OPTIONS.get(name, {})
    check_pure(lambda rows: first(36, make_batches(stores, name, rows=rows, **options)))
    objective = OBJECTIVES[name](tokenizer=TOKENIZER, **options)
    check_pure(lambda rows: EvalBatches(stores["books"], objective, SEQ_LEN, 6, 1, 0, rows))


def test_the_purity_law_fails_for_one_generator_for_all_rows(stores):
    class Wrong(TrainBatches):
        rng = np.random.default_rng(0)

        def _row(self, draw):
            index = int(self.rng.integers(self.sources["books"].num_examples))
            example = self.sources["books"].example([index])
            return self.objective.corrupt(self.rng, example, self.seq_len)

    objective = MaskedLM(tokenizer=TOKENIZER)
    with pytest.raises(AssertionError):
        check_pure(lambda rows: first(9, Wrong(stores, WEIGHTS, objective, SEQ_LEN, 6, 1, rows)))


def check_documents(batches, stores, k):
    """The rows of batch k hold what the store has at the places that are said, of the documents that are said."""
    said, rows = batches.documents(k), batches.whole(k)
    assert [entry["row"] for entry in said] == list(range(6))
    for row, entry in enumerate(said):
        store = stores[entry["source"]]
        assert entry["store"] == str(store.path) and entry["split"] == "train"
        (part,) = entry["examples"]
        start, stop = part["tokens"]
        tokens = store.tokens(start, stop)[: SEQ_LEN + 1]
        length = (rows["segment_ids"][row] > 0).sum()
        np.testing.assert_array_equal(rows["tokens"][row, :length], tokens[:length])
        first, last = part["documents"]
        assert store.document_span(first)[0] <= start < store.document_span(first)[1]
        assert store.document_span(last)[0] < stop <= store.document_span(last)[1]


def test_the_documents_of_a_batch_are_those_that_its_rows_hold(stores):
    batches = make_batches(stores, "causal", rows=np.array([2, 4]))
    for k in (0, 7, 31, 500):
        check_documents(batches, stores, k)
        assert_equal(make_batches(stores, "causal")[k], batches.whole(k))


def test_the_law_of_documents_fails_for_another_batch(stores):
    class Wrong(TrainBatches):
        def documents(self, k):
            return super().documents(k + 1)

    batches = Wrong(stores, WEIGHTS, OBJECTIVES["causal"](tokenizer=TOKENIZER), SEQ_LEN, 6, 1)
    with pytest.raises(AssertionError):
        check_documents(batches, stores, 7)


def test_both_documents_of_a_pair_are_said(stores):
    batches = make_batches(stores, "mlm_nsp")
    for entry in batches.documents(3):
        one, other = (part["documents"] for part in entry["examples"])
        assert one[0] == one[1] and other[0] == other[1] and one != other


def test_the_order_of_the_stores_does_not_matter_and_the_seed_does(stores):
    swapped = dict(reversed(stores.items()))
    assert_equal(make_batches(stores)[7], make_batches(swapped)[7])
    other = make_batches(stores, seed=2)[7]
    assert (other["tokens"] != make_batches(stores)[7]["tokens"]).any()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_iterator_gives_the_same_batches_from_any_start(stores, num_workers):
    batches = first(9, make_batches(stores))
    for start in (0, 4) if not num_workers else (4,):
        found = list(make_iterator(batches, start, num_workers))
        assert len(found) == 9 - start
        for k, batch in enumerate(found, start):
            assert_equal(batch, batches[k])


def test_the_iterator_of_a_finished_run_is_empty_and_errors_come_through(stores):
    batches = make_batches(stores)
    assert list(make_iterator(first(3, batches), 3)) == []
    batches.seq_len = 4  # too short for the examples
    with pytest.raises(ValueError, match="expected at most 4"):
        list(make_iterator(first(3, batches)))


def draws_of(batches, source, epochs):
    """The example indices of a source's first epochs, by (epoch, place)."""
    indices = []
    batches.sources[source].example = lambda chosen: indices.extend(chosen)
    batches.objective = SimpleNamespace(static=True, corrupt=lambda *_: {"x": np.zeros(1)})
    size = batches.sources[source].num_examples
    for draw in range(epochs * size):
        batches._row(draw)
    return np.array(indices).reshape(epochs, size)


def check_epochs(orders):
    """Each epoch has every example once, in an order of its own."""
    epochs, size = orders.shape
    for order in orders:
        assert sorted(order.tolist()) == list(range(size))
    for a in range(epochs):
        for b in range(a):
            assert (orders[a] == orders[b]).mean() < 0.2


def test_epochs_are_new_permutations_and_seeds_do_not_share_them(stores):
    one = {"books": stores["books"]}
    first, second = (
        draws_of(make_batches(one, seed=seed, weights={"books": 1.0}), "books", 3)
        for seed in (0, 1)
    )
    check_epochs(np.concatenate([first, second]))
    with pytest.raises(AssertionError):
        check_epochs(np.stack([first[0], first[1], first[0]]))


def check_mixture(mixture, draws):
    """locate counts each source up from 0 without a gap, and draws(k) are those counts."""
    seen = {name: 0 for name in mixture.names}
    for draw in range(draws):
        assert mixture.draws(draw) == seen
        name, nth = mixture.locate(draw)
        assert nth == seen[name]
        seen[name] += 1


def test_the_nth_draw_of_a_source_comes_after_n_others_across_phases():
    weights = {0: {"a": 2, "b": 1}, 100: {"a": 1, "c": 3}, 6000: {"b": 1}}
    mixture = Mixture.of(weights, ["c", "b", "a"], batch_size=2, seed=3)
    check_mixture(mixture, 13_000)
    before, after = mixture.draws(12_000), mixture.draws(12_345)
    assert after == {**before, "b": before["b"] + 345}
    broken = [phase._replace(drawn=0 * phase.drawn) for phase in mixture.phases]
    with pytest.raises(AssertionError):
        check_mixture(Mixture(mixture.names, broken), 13_000)


def test_a_period_has_exact_shares_in_a_seeded_order():
    weights = {"a": 1, "b": 1, "c": 1}
    mixture = Mixture.of(weights, ["a", "b", "c"], 8, seed=0)
    assert mixture.draws(PERIOD * 7) == {"a": 23338, "b": 23331, "c": 23331}
    names = "".join(mixture.locate(draw)[0] for draw in range(300))
    assert min(names.count(name) for name in weights) > 70 and "aa" in names and "ab" in names
    other = Mixture.of(weights, ["a", "b", "c"], 8, seed=1)
    assert names != "".join(other.locate(draw)[0] for draw in range(300))


def test_wrong_weights_are_all_named_at_once():
    weights = {1: {"a": 1, "x": 1}, 2: {"a": -1}, 3: {"a": 1, "b": 1e-9}}
    with pytest.raises(ValueError) as error:
        Mixture.of(weights, ["a", "b"], 8, 0)
    for part in ("expected the first to be 0", "['x']", "step 2", "step 3: ['b']"):
        assert part in str(error.value)


def test_epochs_seen_counts_passes_over_each_source(stores):
    batches = make_batches(stores)
    assert batches.epochs_seen(0) == {"books": 0, "code": 0}
    drawn = 1_000_000 * 6
    seen = batches.epochs_seen(1_000_000)
    counts = {name: seen[name] * batches.sources[name].num_examples for name in seen}
    assert round(sum(counts.values())) == drawn
    assert abs(counts["code"] / drawn - 0.9) < 1e-3


def masks(stores, static):
    """The masked positions of every example in two epochs, by the example's tokens."""
    batches = make_batches(
        {"books": stores["books"]}, weights={"books": 1}, rate=0.3, static=static
    )
    size = batches.sources["books"].num_examples
    epochs = []
    for epoch in range(2):
        seen = {}
        for draw in range(epoch * size, (epoch + 1) * size):
            row = batches._row(draw)
            tokens = row["tokens"].copy()
            tokens[row["masked_positions"]] = np.where(
                row["weights"] > 0, row["labels"], tokens[row["masked_positions"]]
            )
            seen[tokens.tobytes()] = (row["masked_positions"].tolist(), row["tokens"].tolist())
        epochs.append(seen)
    return epochs


def test_static_masks_stay_over_epochs_and_dynamic_ones_change(stores):
    first, second = masks(stores, static=True)
    assert first == second
    first, second = masks(stores, static=False)
    assert first.keys() == second.keys()
    assert sum(first[key] == second[key] for key in first) < 0.2 * len(first)


def check_every_byte_is_a_label_once(batches, store, objective):
    """Over all batches, labels of weight 1 are every token but the documents' [bos], once each."""
    counts = np.zeros(objective.tables.num_bytes.shape, np.int64)
    for k in range(len(batches)):
        batch = batches[k]
        assert batch["tokens"].shape == (6, SEQ_LEN)
        np.add.at(counts, batch["labels"][batch["weights"] > 0], 1)
    expected = np.bincount(store.tokens(0, store.num_tokens), minlength=len(counts))
    expected[1] -= store.num_documents
    np.testing.assert_array_equal(counts, expected)
    assert (counts * objective.tables.num_bytes).sum() == store.num_bytes


def test_evaluation_predicts_every_byte_of_the_split_once(stores):
    objective = CausalLM(tokenizer=TOKENIZER)
    for store in stores.values():
        batches = EvalBatches(store, objective, SEQ_LEN, 6, seed=0)
        check_every_byte_is_a_label_once(batches, store, objective)
        train = TrainBatches({"x": store}, {"x": 1}, objective, SEQ_LEN, 6, 0)
        with pytest.raises(AssertionError):
            check_every_byte_is_a_label_once(first(len(batches), train), store, objective)


def test_the_last_evaluation_batch_is_filled_with_rows_of_weight_zero(stores):
    objective = MaskedLM(tokenizer=TOKENIZER)
    batches = EvalBatches(stores["books"], objective, SEQ_LEN, 6, seed=0)
    size = batches.source.num_examples
    assert size % 6 and len(batches) == -(-size // 6)
    last = batches[len(batches) - 1]
    assert last["segment_ids"][: size % 6].any(1).all()
    assert not any(array[size % 6 :].any() for array in last.values())


def test_a_part_of_the_evaluation_set_is_spread_over_it_and_fixed(stores):
    objective = CausalLM(tokenizer=TOKENIZER)
    whole = EvalBatches(stores["books"], objective, SEQ_LEN, 2, 0)
    part = EvalBatches(stores["books"], objective, SEQ_LEN, 2, 0, max_batches=5)
    rows = {whole[k]["tokens"][r].tobytes(): 2 * k + r for k in range(len(whole)) for r in range(2)}
    found = [rows[part[k]["tokens"][r].tobytes()] for k in range(5) for r in range(2)]
    assert len(part) == 5 and len(set(found)) == 10 and max(found) > len(rows) // 2
    assert_equal(part[3], EvalBatches(stores["books"], objective, SEQ_LEN, 2, 0, 5)[3])


def test_stores_that_cannot_serve_are_refused(tmp_path):
    write_store(tmp_path / "one", {"train": [np.arange(7, 90)], "empty": []}, TOKENIZER)
    for name, split, message in (("mlm_nsp", "train", "one document"), ("causal", "empty", "more")):
        with pytest.raises(ValueError, match=message):
            make_batches({"x": TokenStore(tmp_path / "one", split)}, name, weights={"x": 1})
    with pytest.raises(ValueError, match="0 <= row < 6"):
        make_batches({"x": TokenStore(tmp_path / "one")}, rows=np.array([6]), weights={"x": 1})


def make_sparse_store(path, num_tokens, document_tokens):
    """A store of zeros with the documented layout; its token file has no blocks on disk."""
    path.mkdir()
    starts = np.arange(0, num_tokens + 1, document_tokens, dtype=np.uint64)
    name = str(path / "train-00000.{}.npy")
    np.lib.format.open_memmap(name.format("tokens"), "w+", np.uint16, (num_tokens,))
    np.save(name.format("documents"), starts)
    np.save(name.format("sentences"), starts[:-1] + np.uint64(1))
    counts = dict(
        num_tokens=num_tokens,
        num_documents=len(starts) - 1,
        num_sentences=len(starts) - 1,
        num_bytes=0,
    )
    sums = [zero_sums(name.format("tokens"))]
    sums += [block_sums(name.format(part)) for part in ("documents", "sentences")]
    np.save(name.format("blocks"), np.concatenate(sums))
    digests = dict.fromkeys(("tokens", "documents", "sentences"), "0" * 64)  # which reading skips
    digests["blocks"] = sha256_of(Path(name.format("blocks")))
    finish_store(path, {"train": {**counts, "shards": [{**counts, "sha256": digests}]}}, TOKENIZER)


def zero_sums(file):
    """`block_sums` of a file that is a header and zeros, whose zeros are not read."""
    size = os.stat(file).st_size
    sums = np.full(num_blocks(size), xxhash.xxh3_64_intdigest(bytes(BLOCK_BYTES)), np.uint64)
    with open(file, "rb") as opened:
        sums[0] = xxhash.xxh3_64_intdigest(opened.read(BLOCK_BYTES))
    sums[-1] = xxhash.xxh3_64_intdigest(bytes(size % BLOCK_BYTES))
    return sums


MEASURE = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[3])
from test_pipeline import OBJECTIVES, TOKENIZER, TokenStore, TrainBatches

def peak_mb():
    try:
        status = open("/proc/self/status").read()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

objective = OBJECTIVES[sys.argv[2]](tokenizer=TOKENIZER)
start = time.perf_counter()
store = TokenStore(sys.argv[1])
batches = TrainBatches({"web": store}, {"web": 1.0}, objective, 128, 32, seed=0)
batch = batches[1_000_000]
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "mb": peak_mb(), "shape": batch["tokens"].shape}))
"""


def test_batch_one_million_of_a_billion_tokens_arrives_at_once(tmp_path):
    make_sparse_store(tmp_path / "store", 10**9, 1000)
    assert os.stat(tmp_path / "store" / "train-00000.tokens.npy").st_size > 2 * 10**9
    for name in ("causal", "mlm", "mlm_nsp"):
        arguments = [str(tmp_path / "store"), name, os.path.dirname(__file__)]
        for _attempt in range(3):  # a busy machine is no reason to fail
            done = subprocess.run(
                [sys.executable, "-c", MEASURE, *arguments],
                capture_output=True,
                text=True,
                check=True,
            )
            found = json.loads(done.stdout)
            if found["seconds"] < 1.0:
                break
        assert found["shape"] == [32, 128]
        assert found["seconds"] < 1.0 and found["mb"] < 500, (name, found)
