"""Scores of written texts: worked out by hand, or what the libraries themselves say."""

import importlib

import pytest

from jaxlm.tasks.text_scores import TEXT_SCORES, by_stream

TEXTS = ["the cat sat on the mat", "a dog barked at the tree today"]


@pytest.mark.parametrize("name", TEXT_SCORES)
def test_a_right_text_has_the_highest_score_and_a_wrong_one_less(name):
    most = {"exact_match": 1.0, "bleu": 100.0, "chrf": 100.0}
    right = TEXT_SCORES[name](TEXTS, [[TEXTS[0], "x"], [TEXTS[1]]])
    assert right == pytest.approx({key: most.get(key, 1.0) for key in right})
    wrong = TEXT_SCORES[name](["the cat", "no"], [[text] for text in TEXTS])
    assert all(0 <= wrong[key] < right[key] / 2 for key in right)


def test_rouge_counts_words_as_worked_out_by_hand():
    # Of "the cat sat": 2 of 3 words and 1 of 2 pairs are there, and nothing else is said.
    found = TEXT_SCORES["rouge"](["the cat"], [["the cat sat"]])
    assert found == pytest.approx({"rouge1": 0.8, "rouge2": 2 / 3, "rougeL": 0.8})
    assert TEXT_SCORES["rouge"](["the cat"], [["a dog", "the cat sat"]]) == found  # the best counts


def test_texts_with_fewer_references_than_others_are_scored_by_theirs():
    import sacrebleu  # not there in the lanes that do not run this

    references = [["the cat sat on a mat", "the cat sat on the mat"], [TEXTS[1]]]
    assert by_stream(references) == [[references[0][0], TEXTS[1]], [references[0][1], None]]
    assert TEXT_SCORES["bleu"](TEXTS, references)["bleu"] == pytest.approx(100)
    one = [[r[0]] for r in references]
    wanted = sacrebleu.BLEU().corpus_score(TEXTS, [[r[0] for r in one]]).score
    assert TEXT_SCORES["bleu"](TEXTS, one)["bleu"] == pytest.approx(wanted) and wanted < 100


def test_a_library_that_is_missing_is_named_with_what_installs_it(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match="rouge_score is not installed.*'jaxlm.eval.'"):
        TEXT_SCORES["rouge"](TEXTS, [TEXTS])
