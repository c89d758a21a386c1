"""Laws of the columns: a user's word wins, a guess is said, and what is not clear is asked."""

import logging

import pytest

from jaxlm.data.columns import NAMES, ROLES, as_role_records, choose_columns
from jaxlm.data.record_base import Record

CLASSES = ROLES["sequence_classification"]
WORDS = ROLES["token_classification"]
QUESTIONS = ROLES["question_answering"]
CHOICES = ROLES["multiple_choice"]
PAIRS = ROLES["embedding"]


def table(*rows, **columns):
    """Records of rows (dicts), or of columns."""
    if columns:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [Record("a.csv", i, row) for i, row in enumerate(rows, 2)]


def fields_of(found):
    return [record.fields for record in found[0]]


# --- which column ---

NAMED = {
    "text,label": {"text": "text", "label": "label"},
    "id,Utterance,Intent": {"text": "Utterance", "label": "Intent"},
    "Sentence 1,Sentence 2,score": {
        "text": "Sentence 1",
        "label": "score",
        "text_pair": "Sentence 2",
    },
    "premise,hypothesis,label,genre": {
        "text": "premise",
        "label": "label",
        "text_pair": "hypothesis",
    },
    "text,review,label,score": {"text": "text", "label": "label"},  # a role's own name wins
    "question,passage,answer": {"text": "question", "label": "answer", "text_pair": "passage"},
}


@pytest.mark.parametrize("header", NAMED)
def test_well_known_names_are_found_whatever_their_case(header):
    records = table(dict.fromkeys(header.split(","), "a"))
    assert choose_columns(records, CLASSES) == NAMED[header]


def test_every_role_of_every_task_has_names_and_a_converter():
    for roles in ROLES.values():
        for role in sum(roles, ()):
            assert role in NAMES
            kind = "class" if role == "label" else "number"
            as_role_records([], {role: "a"}, kind)


def test_a_given_column_wins_by_name_case_number_or_list():
    records = table(text=["a"], Label=["b"], Other=["c"], toxic=["1"], rude=["0"])
    chosen = {"text": "Other", "label": "Label"}
    assert choose_columns(records, CLASSES, {"text": "Other"}) == chosen
    assert choose_columns(records, CLASSES, {"text": "other", "label": ""}) == chosen
    assert choose_columns(records, CLASSES, {"text": "2"}) == chosen
    assert choose_columns(records, CLASSES, {"text": "-3"}) == chosen
    several = {"text": "text", "label": ("toxic", "rude")}
    for given in ("toxic, rude", ("toxic", "rude"), "-2,-1"):
        assert choose_columns(records, CLASSES, {"label": given}) == several


def test_none_leaves_a_role_out():
    records = table(text=["a"], passage=["b"], label=["c"])
    assert "text_pair" in choose_columns(records, CLASSES)
    assert "text_pair" not in choose_columns(records, CLASSES, {"text_pair": "none"})


def test_what_is_not_clear_is_one_error_with_columns_examples_and_options():
    records = table(tweet=["so long"], body=["b"], category=["c"], target=["d"])
    with pytest.raises(ValueError) as error:
        choose_columns(records, CLASSES)
    assert str(error.value).split("\n") == [
        "which column of a.csv is which is not clear:",
        "  text: several columns may be it: 'tweet', 'body'",
        "  label: several columns may be it: 'category', 'target'",
        "found: the columns",
        "    'tweet': for example 'so long'",
        "    'body': for example 'b'",
        "    'category': for example 'c'",
        "    'target': for example 'd'",
        "change: --config.data.text_column=NAME --config.data.label_column=NAME"
        " (or the column's number, from 0)",
    ]


def test_wrong_columns_are_all_named_at_once():
    records = table(text=["a"], label=["b"])
    given = {"text": "satz", "label": "9", "words": "text"}
    with pytest.raises(ValueError) as error:
        choose_columns(records, CLASSES, given)
    assert "text: the file has no column 'satz'" in str(error.value)
    assert "label: the file has no column '9'" in str(error.value)
    assert "words: is no role of this task" in str(error.value)


TURNS = ["turn on the light", "light please", "play a song", "music", "stop it now", "stop"]
KINDS = ["light", "light", "music", "music", "stop", "stop"]


def test_of_two_columns_without_known_names_the_one_of_few_short_values_is_the_label():
    expected = {"text": "b", "label": "a"}
    assert choose_columns(table(a=KINDS, b=TURNS), CLASSES) == expected
    assert choose_columns(table(b=TURNS, a=KINDS), CLASSES) == expected
    assert choose_columns(table(tweet=TURNS, a=KINDS), CLASSES) == {"text": "tweet", "label": "a"}
    assert choose_columns(table(b=TURNS, intent=KINDS), CLASSES) == {"text": "b", "label": "intent"}


@pytest.mark.parametrize(
    "columns",
    [
        {"a": TURNS, "b": [turn[::-1] for turn in TURNS]},  # as many values
        {"a": TURNS, "b": ["a very long name of a class"] * 6},  # fewer, but longer
        {"a": TURNS, "b": ["1", "2", "3", "4", "5", "5"]},  # shorter, but hardly any comes again
        {"a": TURNS, "b": KINDS, "c": KINDS},
        {"text": KINDS, "b": TURNS},
    ],
)
def test_two_columns_that_do_not_tell_text_from_label_are_asked_about(columns):
    with pytest.raises(ValueError, match=r"label: no column is it[\s\S]*data\.label_column=NAME"):
        choose_columns(table(**columns), CLASSES)


def test_for_prediction_the_label_may_be_missing_also_a_given_one():
    assert choose_columns(table(a=TURNS), CLASSES, labelled=False) == {"text": "a"}
    given = {"text": "a", "label": "b"}
    assert choose_columns(table(a=TURNS), CLASSES, given, labelled=False) == {"text": "a"}
    with pytest.raises(ValueError, match="label: the file has no column 'b'"):
        choose_columns(table(a=TURNS), CLASSES, given)
    with pytest.raises(ValueError, match="text: the file has no column 'a'"):
        choose_columns(table(b=KINDS), CLASSES, given, labelled=False)
    languages = table(text=TURNS, language=["en"] * 6)
    assert choose_columns(languages, CLASSES, labelled=False) == {"text": "text"}


def test_of_conll_columns_the_first_has_the_words_and_the_last_the_labels():
    row = {"column0": ["Rome"], "column1": ["NNP"], "column2": ["B-LOC"]}
    assert choose_columns(table(row), WORDS) == {"words": "column0", "labels": "column2"}
    given = {"words": "column1", "labels": "column0"}
    assert choose_columns(table(row), WORDS, given) == given
    assert choose_columns(table(row), WORDS, {"labels": "1"})["labels"] == "column1"
    words = table({"column0": ["Rome"]})
    assert choose_columns(words, WORDS, labelled=False) == {"words": "column0"}
    with pytest.raises(ValueError, match="labels: no column is it"):
        choose_columns(words, WORDS)
    named = table({"tokens": ["Rome"], "id": 3, "ner_tags": ["B-LOC"]})
    assert choose_columns(named, WORDS) == {"words": "tokens", "labels": "ner_tags"}


def test_the_choices_may_be_one_column_or_several():
    many = table(dict.fromkeys(["sent1", "ending0", "ending1", "ending2", "label"], "1"))
    assert choose_columns(many, CHOICES) == {
        "choices": ("ending0", "ending1", "ending2"),
        "label": "label",
        "question": "sent1",
    }
    letters = table(dict.fromkeys(["question", "A", "B", "answerKey"], "1"))
    assert choose_columns(letters, CHOICES)["choices"] == ("A", "B")
    one = table(dict.fromkeys(["question", "choices", "answerKey"], "1"))
    assert choose_columns(one, CHOICES)["choices"] == "choices"


def test_what_was_chosen_is_said(caplog):
    caplog.set_level(logging.INFO, "jaxlm")
    choose_columns(table(tweet=["a"], intent=["b"]), CLASSES)
    assert [record.getMessage() for record in caplog.records] == [
        "a.csv: text is 'tweet'",
        "a.csv: label is 'intent'",
    ]


def test_without_a_readable_row_there_are_no_columns():
    with pytest.raises(ValueError, match="found: no row that can be read"):
        choose_columns([], CLASSES)


# --- values ---


def as_label(values, kind, **options):
    records = [Record("a.csv", i, {"y": value}) for i, value in enumerate(values, 1)]
    found = as_role_records(records, {"label": "y"}, kind, **options)
    labels = [record.fields.get("label", "none") for record in found[0]]
    return labels, [problem.line for problem in found[1]]


def test_classes_are_strings_and_missing_ones_are_left_out():
    values = ["a", " b ", 1, 1.0, True, "", None, float("nan"), ["a"], {}]
    labels, bad = as_label(values, "class")
    assert labels == ["a", "b", "1", "1", "True", "none", "none", "none"] and bad == [9, 10]


def test_several_labels_come_as_a_list_or_cut_at_the_separator():
    labels, bad = as_label(
        ["b|a|b", "", "a | c", None, ["x", 1], []], "multilabel", label_separator="|"
    )
    assert labels == [["b", "a"], [], ["a", "c"], "none", ["x", "1"], []] and not bad
    assert as_label(["a b", '["a b", "c"]', "[]"], "multilabel")[0] == [["a b"], ["a b", "c"], []]
    assert as_label(["[3, 10]", "[-1]", "[3"], "multilabel")[0] == [["3", "10"], ["-1"], ["[3"]]
    assert as_label(["['a', 'b']", [["a"]], 3], "multilabel") == ([], [1, 2, 3])


def test_several_labels_may_have_a_column_each():
    rows = [("1", "0"), ("0", 0), ("1", True), ("", None), ("1", "7")]
    records = table(*({"toxic": a, "rude": b} for a, b in rows))
    found = as_role_records(records, {"label": ("toxic", "rude")}, "multilabel")
    assert fields_of(found) == [
        {"label": ["toxic"]},
        {"label": []},
        {"label": ["toxic", "rude"]},
        {},
    ]
    assert [(p.line, p.text) for p in found[1]] == [
        (6, "found 'rude': '7', expected 0 or 1 in each label's column")
    ]


def test_numbers_are_finite_or_a_problem_with_the_line():
    values = ["1.5", 2, " 3 ", "", None, "3,5", "nan", float("inf"), "good", True, [1]]
    labels, bad = as_label(values, "number")
    assert labels == [1.5, 2.0, 3.0, "none", "none"] and bad == [6, 7, 8, 9, 10, 11]


def test_an_unknown_kind_of_label_is_refused():
    with pytest.raises(ValueError, match="one of class, multilabel, number, choice"):
        as_label(["a"], "klass")


def test_texts_are_kept_as_they_are():
    records = table({"a": " x\n"}, {"a": None}, {"a": 3.0}, {"a": ["x"]}, {"b": "y"})
    found = as_role_records(records, {"text": "a"})
    assert fields_of(found) == [{"text": " x\n"}, {"text": ""}, {"text": "3"}]
    assert [str(problem) for problem in found[1]] == [
        "a.csv:5: text is a list, expected a string",
        "a.csv:6: there is no 'a'",
    ]


@pytest.mark.parametrize("missing", ["", None, float("nan")])
def test_a_missing_cell_is_an_empty_text_whatever_stands_for_it(missing):
    roles = ["text", "text_pair", "question", "source"]
    records = table({role: missing for role in [*roles, "words", "A", "B", "x", "y"]} | {"A": "a"})
    columns = {role: role for role in [*roles, "words"]}
    columns |= {"choices": ("A", "B"), "label": ("x", "y")}
    (fields,) = fields_of(as_role_records(records, columns, "multilabel"))
    assert fields == dict.fromkeys(roles, "") | {"words": [], "choices": ["a"]}


def test_words_and_their_labels_come_as_lists_or_strings():
    rows = [
        {"w": ["Rome", "fell"], "l": ["B", "O"]},
        {"w": "Rome  fell", "l": "B O"},
        {"w": '["Rome", "fell"]', "l": [0, 1]},
        {"w": "[ Rome ]", "l": None},
        {"w": "[ 9 ]", "l": "[3, 0, 7]"},
        {"w": "Rome fell", "l": "B"},
        {"w": "['Rome', 'fell']", "l": "['B', 'O']"},
        {"w": 7, "l": "O"},
    ]
    found = as_role_records(table(*rows), {"words": "w", "labels": "l"})
    assert fields_of(found) == [
        {"words": ["Rome", "fell"], "labels": ["B", "O"]},
        {"words": ["Rome", "fell"], "labels": ["B", "O"]},
        {"words": ["Rome", "fell"], "labels": ["0", "1"]},
        {"words": ["[", "Rome", "]"]},
        {"words": ["[", "9", "]"], "labels": ["3", "0", "7"]},
    ]
    assert [p.line for p in found[1]] == [7, 8, 9] and "2 words have 1 labels" in found[1][0].text


def test_the_predicate_is_a_number_or_a_marked_word():
    cells = [1, "0", None, ["-", "V"], ["_", "-"], 2, ["V", "V"], "-1"]
    found = as_role_records(
        table(*({"words": ["a", "b"], "p": cell} for cell in cells)),
        {"words": "words", "predicate": "p"},
    )
    assert [f.get("predicate") for f in fields_of(found)] == [1, 0, None, 1, None]
    assert [problem.line for problem in found[1]] == [7, 8, 9]


def test_answers_of_every_shape_become_texts_with_their_start():
    context = "Rome is old. Rome fell."
    one, two = [{"text": "Rome", "start": 0}], [{"text": "Rome", "start": 13}]
    shapes = [
        ([{"text": "Rome", "answer_start": 13}], two),
        ({"text": ["Rome"], "answer_start": [13]}, two),
        ('{"text": ["Rome"], "answer_start": [13]}', two),
        ('[{"text": "Rome", "answer_start": 13}]', two),
        ("Rome", one),
        ("Paris", [{"text": "Paris", "start": -1}]),
        ("", []),
        ([], []),
        ({"text": [], "answer_start": []}, []),
        (None, None),
    ]
    broken = ['[{"text": "Rome"', [{"text": "Rome"}], {"text": ["a"], "answer_start": []}, 3]
    records = table(*({"c": context, "a": raw} for raw in [s for s, _ in shapes] + broken))
    found = as_role_records(records, {"context": "c", "answers": "a"})
    assert [f.get("answers") for f in fields_of(found)] == [expected for _, expected in shapes]
    assert len(found[1]) == len(broken) and fields_of(found)[0]["id"] == "2"


def test_an_answer_may_have_its_start_in_a_column():
    records = table(*({"c": "Rome Rome", "a": "Rome", "s": s} for s in ["5", "", "x"]))
    columns = {"context": "c", "answers": "a", "answer_start": "s"}
    found = as_role_records(records, columns)
    assert [f["answers"][0]["start"] for f in fields_of(found)] == [5, 0]
    assert [p.text for p in found[1]] == ["answer_start 'x' is not a number"]


def test_the_right_choice_is_a_number_from_0_a_letter_or_its_text():
    choices = ["red", "blue", "red wine"]
    labels = [0, "2", "b", "C", "blue", "", 3, "d", "green"]
    found = as_role_records(
        table(*({"choices": choices, "label": label} for label in labels)),
        {"choices": "choices", "label": "label"},
        "choice",
    )
    assert [f.get("label") for f in fields_of(found)] == [0, 2, 1, 2, 1, None]
    assert [p.line for p in found[1]] == [8, 9, 10]


def test_a_number_is_the_choice_of_that_place_and_a_string_first_the_text_of_one():
    labels = [0, 2.0, "0", "2", "3", 6]
    found = as_role_records(
        table(*({"choices": ["4", "0", "2", "6"], "label": label} for label in labels)),
        {"choices": "choices", "label": "label"},
        "choice",
    )
    assert [f["label"] for f in fields_of(found)] == [0, 2, 1, 2, 3]
    assert [p.line for p in found[1]] == [7]


def test_choices_may_bring_their_own_names_or_be_columns():
    named = {"text": ["red", "blue"], "label": ["1", "2"]}
    listed = [{"text": "red", "label": "1"}, {"text": "blue", "label": "2"}]
    for choices in (named, listed):
        rows = table({"c": choices, "k": "2"}, {"c": choices, "k": 2})
        found = as_role_records(rows, {"choices": "c", "label": "k"}, "choice")
        assert fields_of(found) == [{"choices": ["red", "blue"], "label": 1}] * 2
    rows = table({"A": "red", "B": "", "C": "blue", "D": "", "k": "C"})
    found = as_role_records(rows, {"choices": ("A", "B", "C", "D"), "label": "k"}, "choice")
    assert fields_of(found) == [{"choices": ["red", "", "blue"], "label": 2}]


def test_spans_are_two_pairs_of_numbers():
    cells = [[[0, 4], [5, 6]], "[[0, 4], [5, 6]]", None, [[0, 4]], [[0, "4"], [5, 6]], "x"]
    found = as_role_records(table(*({"s": cell} for cell in cells)), {"spans": "s"})
    assert [f.get("spans") for f in fields_of(found)] == [[[0, 4], [5, 6]], [[0, 4], [5, 6]], None]
    assert [p.line for p in found[1]] == [5, 6, 7]


def test_embedding_pairs_need_no_label():
    chosen = choose_columns(table(anchor=["a"], positive=["b"], negative=["c"]), PAIRS)
    assert chosen == {"text": "anchor", "text_pair": "positive", "negative": "negative"}
    assert choose_columns(table(query=["a"], answer=["b"]), PAIRS)["text_pair"] == "answer"
    assert choose_columns(table(question=["a"], context=["b"], answers=["c"]), QUESTIONS) == {
        "question": "question",
        "context": "context",
        "answers": "answers",
    }
