"""Batches of labelled examples: pure functions of (seed, k), packed or padded, in few shapes, and taken apart again."""

import pickle

import numpy as np
import pytest

from jaxlm.data import examples as module
from jaxlm.data.examples import EvalExamples, Examples, Shapes, TrainExamples, plan_shapes

SEQ_LEN = 32


def make_examples(size=50, seed=0, *, segments=False):
    """Random features; each token is the feature's number + 1, so that a mix-up shows."""
    rng = np.random.default_rng(seed)
    features = []
    for number in range(size):
        n = int(rng.integers(3, 20))
        feature = {
            "tokens": np.full(n, number + 1, np.int32),
            "labels": np.arange(n, dtype=np.int32),
            "example_positions": np.array([0], np.int32),
            "example_labels": np.array([number], np.int32),
        }
        if segments:
            cut = n // 2
            feature["segments"] = np.r_[np.full(cut, 1), np.full(n - cut, 2)].astype(np.int32)
            feature["example_positions"] = np.array([0, cut], np.int32)
            feature["example_labels"] = np.array([number, -number], np.int32)
        features.append(feature)
    return Examples(features)


def make_batches(examples, packed, **options):
    shapes = plan_shapes(examples, 8, 0, packed=packed, seq_len=SEQ_LEN)
    return TrainExamples(examples, shapes, 8, 0, **options)


def check_batch(batch, ids, examples):
    """Every example of `ids` is in the batch once and whole, in a segment of its own, and nothing else is."""
    found = []
    for row, slots in enumerate(batch["example_ids"]):
        for slot, number in enumerate(slots):
            if number < 0:
                assert batch["example_weights"][row, slot] == 0
                continue
            here = batch["segment_ids"][row] == slot + 1
            feature = examples.features[number]
            part = int((slots[:slot] == number).sum())  # which segment of the feature this slot is
            mine = feature.get("segments", np.ones(len(feature["tokens"]))) == part + 1
            np.testing.assert_array_equal(batch["tokens"][row, here], feature["tokens"][mine])
            np.testing.assert_array_equal(batch["labels"][row, here], feature["labels"][mine])
            np.testing.assert_array_equal(batch["positions"][row, here], np.arange(mine.sum()))
            first = batch["example_positions"][row, slot]
            assert here[first] and not here[:first].any()
            assert batch["example_labels"][row, slot] == feature["example_labels"][part]
            assert batch["example_weights"][row, slot] == 1
            found += [int(number)] * (part == 0)
    assert sorted(found) == sorted(ids)
    padding = batch["segment_ids"] == 0
    assert not batch["tokens"][padding].any()
    assert (~padding).sum() == examples.lengths[ids].sum()


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_every_example_of_a_batch_is_in_it_once_and_whole(packed, segments):
    examples = make_examples(segments=segments)
    batches = make_batches(examples, packed)
    for k in range(8):
        check_batch(batches[k], batches.ids(k), examples)


def test_a_layout_that_lets_examples_overlap_would_be_caught(monkeypatch):
    def overlap(sizes, row_sizes):
        return [place._replace(start=max(0, place.start - 1)) for place in pack(sizes, row_sizes)]

    pack, examples = module.pack, make_examples()
    batches = make_batches(examples, True)
    monkeypatch.setattr(module, "pack", overlap)
    with pytest.raises(AssertionError):
        check_batch(batches[0], batches.ids(0), examples)


def test_packed_rows_hold_what_the_drawing_shows():
    examples = Examples([{"tokens": np.full(n, n, np.int32)} for n in (3, 4, 2)])
    batch, _ = module.lay_out(examples, [0, 1, 2], Shapes(True, (10,), (1,), 4))
    assert batch["tokens"].tolist() == [[4, 4, 4, 4, 3, 3, 3, 2, 2, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 2, 3, 3, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0]]
    assert batch["example_ids"].tolist() == [[1, 0, 2, -1]]


def make_pairs(sizes):
    """Examples of an encoder-decoder, of (the encoder's tokens, the decoder's) each; tokens tell the examples apart."""
    full = lambda number, n, sign: np.full(n, sign * (number + 1), np.int32)
    return Examples(
        [
            {"tokens": full(i, t, 1), "labels": full(i, t, 1), "encoder_tokens": full(i, s, -1)}
            for i, (s, t) in enumerate(sizes)
        ]
    )


def check_streams(batch, ids, examples):
    """Both streams of an example are in one row, whole, in segments of one number, counted from 0."""
    found = []
    for row, numbers in enumerate(batch["example_ids"]):
        for slot, number in enumerate(numbers):
            if number < 0:
                continue
            for key, segments, positions in (
                ("tokens", "segment_ids", "positions"),
                ("encoder_tokens", "encoder_segment_ids", "encoder_positions"),
            ):
                here = batch[segments][row] == slot + 1
                whole = examples.features[number][key]
                np.testing.assert_array_equal(batch[key][row, here], whole)
                np.testing.assert_array_equal(batch[positions][row, here], np.arange(len(whole)))
            found.append(int(number))
    assert sorted(found) == sorted(ids)


@pytest.mark.parametrize("packed", [False, True])
def test_both_streams_of_an_example_share_a_row_and_a_segment(packed, monkeypatch):
    rng = np.random.default_rng(0)
    examples = make_pairs(zip(rng.integers(3, 30, 40), rng.integers(1, 9, 40), strict=True))
    shapes = plan_shapes(examples, 8, 0, packed=packed, seq_len=16, encoder_len=32)
    batches = TrainExamples(examples, shapes, 8, 0)
    for k in range(6):
        check_streams(batches[k], batches.ids(k), examples)
    shapes = module.plan_eval_shapes([examples], 8, packed=packed, seq_len=16, encoder_len=32)
    held_out = EvalExamples(examples, shapes, 8)
    batch, places = held_out.laid_out(4)
    check_streams(batch, list(places), examples)
    fill = module.fill
    other = lambda f, ids, places, *sizes: fill(
        f, ids, [p._replace(encoder_start=0) for p in places], *sizes
    )
    monkeypatch.setattr(module, "fill", other)
    if packed:  # sources on top of one another would show
        with pytest.raises(AssertionError):
            check_streams(batches[0], batches.ids(0), examples)


def test_packed_streams_are_as_the_drawing_shows():
    examples = make_pairs([(4, 2), (2, 1), (3, 2)])
    batch, _ = module.lay_out(examples, [0, 1, 2], Shapes(True, (6,), (1,), 3, (10,)))
    assert batch["encoder_tokens"].tolist() == [[-1, -1, -1, -1, -3, -3, -3, -2, -2, 0]]
    assert batch["encoder_segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 2, 3, 3, 0]]
    assert batch["tokens"].tolist() == [[1, 1, 3, 3, 2, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 2, 3, 0]]


def test_packed_and_padded_batches_hold_the_same_examples():
    examples = make_examples()
    packed, padded = make_batches(examples, True), make_batches(examples, False)
    for k in (0, 5, 1000):
        assert packed.ids(k) == padded.ids(k)
        assert packed[k]["tokens"].size < padded[k]["tokens"].size


def test_an_epoch_has_every_example_once_and_the_next_one_in_another_order():
    examples = make_examples(size=40)
    batches = make_batches(examples, True)
    epochs = [sum((batches.ids(k) for k in range(5 * e, 5 * e + 5)), []) for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40)) and epochs[0] != epochs[1]
    assert batches.epochs_seen(10) == {"train": 2.0}


def test_a_batch_is_a_function_of_seed_and_number_alone():
    examples = make_examples()
    one, other = make_batches(examples, True), make_batches(examples, True)
    for _ in range(3):
        other[7]
    for key, value in one[12].items():
        np.testing.assert_array_equal(value, other[12][key])


def test_processes_together_have_the_whole_batch():
    examples = make_examples()
    shapes = plan_shapes(examples, 8, 0, packed=True, seq_len=SEQ_LEN, row_multiple=2)
    whole = TrainExamples(examples, shapes, 8, 0)
    of = lambda p: {rows: np.arange(p * rows // 2, (p + 1) * rows // 2) for rows in shapes.rows}
    halves = [TrainExamples(examples, shapes, 8, 0, local_rows=of(p)) for p in (0, 1)]
    for k in range(4):
        for key, value in whole[k].items():
            np.testing.assert_array_equal(value, np.concatenate([half[k][key] for half in halves]))


def test_batches_have_few_shapes_and_any_batch_fits():
    examples = make_examples(size=400)
    shapes = plan_shapes(examples, 16, 0, packed=True, seq_len=SEQ_LEN)
    batches = TrainExamples(examples, shapes, 16, 0)
    assert len({batches[k]["tokens"].shape for k in range(100)}) <= len(shapes.rows) <= 4
    assert shapes.rows[-1] == 16
    longest = np.argsort(-examples.lengths)[:16].tolist()
    check_batch(module.lay_out(examples, longest, shapes)[0], longest, examples)


def test_packing_wastes_little():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.poisson(11, 2000), 4, 30)
    examples = Examples([{"tokens": np.ones(n, np.int32)} for n in lengths])
    batches = TrainExamples(examples, plan_shapes(examples, 32, 0, packed=True, seq_len=64), 32, 0)
    sizes = [batches[k]["tokens"].size for k in range(60)]
    real = [examples.lengths[batches.ids(k)].sum() for k in range(60)]
    assert sum(real) / sum(sizes) > 0.8


@pytest.mark.parametrize("packed", [False, True])
def test_evaluation_takes_apart_what_a_model_says_of_each_example(packed):
    examples = make_examples(segments=True)
    shapes = module.plan_eval_shapes([examples], 8, packed=packed, seq_len=SEQ_LEN)
    batches = EvalExamples(examples, shapes, 8)
    said = {}
    for k in range(len(batches)):
        batch, places = batches.laid_out(k)
        outputs = {"slot_label": batch["example_labels"], "token_token": batch["tokens"]}
        said |= batches.taken_apart(places, outputs)
    assert sorted(said) == list(range(len(examples)))
    if packed:
        assert len({batches[k]["tokens"].shape for k in range(len(batches))}) == 1
    for number, outputs in said.items():
        np.testing.assert_array_equal(outputs["slot_label"], [number, -number])
        np.testing.assert_array_equal(outputs["token_token"], examples.features[number]["tokens"])


def test_no_example_and_one_that_is_too_long_are_said():
    with pytest.raises(ValueError, match="no example"):
        Examples([])
    examples = make_examples()
    with pytest.raises(ValueError, match="largest shape"):
        plan_shapes(examples, 8, 0, packed=True, seq_len=5)


def test_the_fingerprint_is_of_tokens_and_labels():
    one, same, other = make_examples(), make_examples(), make_examples(seed=1)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    changed = make_examples()
    changed.features[3]["example_labels"] = np.array([7], np.int32)
    assert changed.fingerprint != one.fingerprint


def test_a_redrawn_example_depends_on_its_draw_alone():
    examples = make_examples(size=20)

    def redraw(number, rng):
        feature = dict(examples.features[number])
        feature["tokens"] = feature["tokens"] + 100 * rng.integers(1, 1000, dtype=np.int32)
        return feature

    batches = make_batches(examples, True, redraw=redraw)
    again = make_batches(examples, True, redraw=redraw)
    again[3]
    np.testing.assert_array_equal(batches[7]["tokens"], again[7]["tokens"])
    plain = make_batches(examples, True)[7]
    assert (batches[7]["tokens"] != plain["tokens"])[plain["segment_ids"] > 0].all()
    np.testing.assert_array_equal(batches[7]["example_ids"], plain["example_ids"])
    # the same example in another epoch is drawn otherwise
    one = {
        b["tokens"][b["example_ids"][:, 0] == 0].tobytes() for b in (batches[k] for k in range(30))
    }
    assert len(one) > 2


def test_batches_can_be_sent_to_a_worker():
    batches = make_batches(
        make_examples(), True, local_rows={rows: np.arange(rows) for rows in range(9)}
    )
    copy = pickle.loads(pickle.dumps(batches))
    np.testing.assert_array_equal(copy[5]["tokens"], batches[5]["tokens"])
