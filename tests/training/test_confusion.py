"""The picture of a confusion matrix: what is in it, at any number of classes, and that it is written whole."""

import warnings

import numpy as np
import pytest

from jaxlm.training import confusion
from jaxlm.training.confusion import draw_confusion, plot_confusion


def counts_of(size):
    counts = np.eye(size, dtype=int) * 30
    counts[0, -1] += 7
    return counts


def texts(axes):
    return sorted(text.get_text() for text in axes.texts)


def test_few_classes_have_names_and_counts():
    axes = draw_confusion(counts_of(3), ["a", "b", "c"]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert texts(axes) == ["30", "30", "30", "7"]
    assert axes.get_title() == "3 classes, 97 examples, 92.8% right"


def test_gold_is_in_the_rows_and_the_colour_is_the_share_of_the_row():
    axes = draw_confusion(np.array([[1, 3], [0, 0]]), ["a", "b"]).axes[0]
    assert axes.images[0].get_array().tolist() == [[0.25, 0.75], [0, 0]]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("gold", "predicted")
    where = {text.get_text(): text.get_position() for text in axes.texts}
    assert where["3"] == (1, 0)  # x is the column


def test_more_classes_lose_their_counts_and_then_their_names():
    names = [f"class {i}" for i in range(150)]
    axes = draw_confusion(counts_of(30), names[:30]).axes[0]
    assert (len(axes.get_yticklabels()), texts(axes)) == (30, [])
    axes = draw_confusion(counts_of(150), names).axes[0]
    assert not any("class" in label.get_text() for label in axes.get_yticklabels())
    assert texts(axes) == []


def test_a_picture_is_written_whole_with_any_name(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = plot_confusion(
            counts_of(3), ["costs $1_000$ {", "x" * 200, ""], tmp_path / "new" / "c.png"
        )
    assert path.read_bytes().startswith(b"\x89PNG") and path.read_bytes().endswith(
        b"IEND\xaeB`\x82"
    )
    assert [p.name for p in path.parent.iterdir()] == ["c.png"]


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "c.png"
    path.write_bytes(b"old")

    class Broken:
        def savefig(self, file, **_):
            file.write(b"half")
            raise OSError("the disk is full")

    monkeypatch.setattr(confusion, "draw_confusion", lambda *_: Broken())
    with pytest.raises(OSError, match="full"):
        plot_confusion(counts_of(2), ["a", "b"], path)
    assert path.read_bytes() == b"old"


def test_no_examples_at_all_can_be_drawn():
    assert (
        draw_confusion(np.zeros((2, 2), int), ["a", "b"]).axes[0].get_title().endswith("0.0% right")
    )


@pytest.mark.parametrize("counts", [np.eye(3), np.ones((2, 3)), -np.eye(2), np.ones(4)])
def test_a_table_that_does_not_fit_the_names_is_refused(counts):
    with pytest.raises(ValueError, match="for 2 names"):
        draw_confusion(counts, ["a", "b"])
