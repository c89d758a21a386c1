"""Laws of the readers: every row of a labelled file arrives, or is a problem with its line."""

import csv
import json
import logging
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxlm.data.record_base import MAX_DEPTH
from jaxlm.data.records import (
    Problem,
    check_problems,
    format_problems,
    read_records,
    write_problems,
)


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(found):
    return [tuple(record.fields.values()) for record in found[0]]


def lines_of(found):
    return [record.line for record in found[0]]


def problems_of(found):
    return [(problem.line, problem.text) for problem in found[1]]


# --- text ---

TEXT = "text,label\nCafé für Zoë,gut\nnaïve,schlecht\n"
EXPECTED = [("Café für Zoë", "gut"), ("naïve", "schlecht")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_table_is_the_same_in_every_encoding(encoding, tmp_path):
    found = read_records(written(tmp_path / "a.csv", TEXT.encode(encoding)))
    assert rows_of(found) == EXPECTED and list(found[0][0].fields) == ["text", "label"]
    assert not found[1]


def test_big_endian_utf_16_is_read_by_its_mark(tmp_path):
    found = read_records(written(tmp_path / "a.csv", b"\xfe\xff" + TEXT.encode("utf-16-be")))
    assert rows_of(found) == EXPECTED


def test_cp1252_is_said_with_the_line_that_made_it_so(tmp_path, caplog):
    read_records(written(tmp_path / "a.csv", TEXT.encode("cp1252")))
    assert "line 2 is not UTF-8, so the file is read as cp1252" in caplog.text
    caplog.clear()
    read_records(written(tmp_path / "b.csv", TEXT))
    assert "cp1252" not in caplog.text


def test_one_broken_byte_in_utf_8_costs_its_row_and_no_other(tmp_path):
    data = TEXT.encode() + b"caf\xe9,gut\n" + "süß,gut\n".encode()
    found = read_records(written(tmp_path / "a.csv", data))
    assert rows_of(found) == [*EXPECTED, ("süß", "gut")]
    assert [line for line, _ in problems_of(found)] == [4] and "not UTF-8" in found[1][0].text


@pytest.mark.parametrize(
    "data", [b"PK\x03\x04\x00\x00\x00", b"text\n\x81\n", "a,b\n".encode("utf-16-le")]
)
def test_what_is_no_text_is_refused_by_its_name(data, tmp_path):
    with pytest.raises(ValueError, match=r"table\.csv is no text"):
        read_records(written(tmp_path / "table.csv", data))


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "a.csv"
    with open(path, "wb") as file:
        file.truncate((1 << 30) + 1)  # sparse
    with pytest.raises(ValueError, match="expected: at most 1,073,741,824"):
        read_records(path)


# --- CSV ---


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_guessed_also_where_the_texts_have_others(delimiter, tmp_path):
    rows = [["text", "label"], ["a; b, c | d", "x"], ["one, two", "y"], ["plain", "x"]]
    lines = [delimiter.join(f'"{cell}"' for cell in row) for row in rows]
    found = read_records(written(tmp_path / "a.csv", "\n".join(lines)))
    assert rows_of(found) == [tuple(row) for row in rows[1:]] and not found[1]


def test_a_semicolon_wins_over_commas_inside_unquoted_texts(tmp_path):
    found = read_records(written(tmp_path / "a.csv", "Satz;Art\nJa, gut, fein;a\nNein;b\n"))
    assert rows_of(found) == [("Ja, gut, fein", "a"), ("Nein", "b")]


def test_a_known_header_decides_although_most_rows_are_broken(tmp_path):
    found = read_records(written(tmp_path / "a.csv", "text,label\na,b,x\nc,d,y\ne,z\n"))
    assert rows_of(found) == [("e", "z")] and [line for line, _ in problems_of(found)] == [2, 3]


def test_a_file_without_a_delimiter_has_one_column(tmp_path):
    found = read_records(
        written(tmp_path / "a.csv", "text\nHello, world\nplain\n\nlast, one, here\n")
    )
    assert rows_of(found) == [("Hello, world",), ("plain",), ("last, one, here",)]
    assert lines_of(found) == [2, 3, 5]


def test_quoted_newlines_keep_the_lines_of_the_rows_after(tmp_path):
    text = 'text,label\r\n"one\r\ntwo\n\nthree",x\r\n\r\nlast,y\r\nbad\r\n"a ""b"", c",z\r\n'
    found = read_records(written(tmp_path / "a.csv", text))
    assert rows_of(found) == [("one\r\ntwo\n\nthree", "x"), ("last", "y"), ('a "b", c', "z")]
    assert lines_of(found) == [2, 7, 9]
    assert problems_of(found) == [(8, "found 1 columns, expected 2")]


def test_rows_of_another_width_are_problems_with_their_line(tmp_path):
    found = read_records(written(tmp_path / "a.csv", "text,label\na,x\nb\nc,y,z\nd,y\n"))
    assert rows_of(found) == [("a", "x"), ("d", "y")]
    assert [line for line, _ in problems_of(found)] == [3, 4]


def test_a_quote_that_is_never_closed_costs_one_line(tmp_path):
    body = 'text,label\n"a, b",x\n"stray,y\n"c, d",x\n"e, f",y\n"end,x\nlast,y\n'
    found = read_records(written(tmp_path / "a.csv", body))
    assert rows_of(found) == [("a, b", "x"), ("c, d", "x"), ("e, f", "y"), ("last", "y")]
    assert [line for line, _ in problems_of(found)] == [3, 6]


def test_quotes_of_a_tsv_that_would_join_whole_rows_are_text(tmp_path):
    body = 'id\ttext\tlabel\n1\t"open\tx\n2\tand closed"\ty\n3\t"all" of it\tx\n'
    found = read_records(written(tmp_path / "a.tsv", body))
    assert [row[1] for row in rows_of(found)] == ['"open', 'and closed"', '"all" of it']
    quoted = 'text\tlabel\n"tab\there"\tx\n"""so"" it is"\ty\n'
    found = read_records(written(tmp_path / "b.tsv", quoted))
    assert rows_of(found) == [("tab\there", "x"), ('"so" it is', "y")]


def test_quoted_texts_of_several_lines_stay_whole_where_each_line_looks_like_a_row(tmp_path):
    found = read_records(written(tmp_path / "a.csv", 'text,label\n"one, two\nthree",x\nfour,y\n'))
    assert rows_of(found) == [("one, two\nthree", "x"), ("four", "y")]


def test_a_space_before_the_quotes_is_no_part_of_the_cell(tmp_path):
    found = read_records(written(tmp_path / "a.csv", '"text", "label"\n"a, b", "x"\n'))
    assert rows_of(found) == [("a, b", "x")] and "label" in found[0][0].fields


def test_a_line_separator_inside_a_cell_is_no_end_of_a_row(tmp_path):
    found = read_records(written(tmp_path / "a.csv", "text,label\na\u2028b\x85c,x\nd,y\n"))
    assert rows_of(found) == [("a\u2028b\x85c", "x"), ("d", "y")] and lines_of(found) == [2, 3]


def test_a_field_may_be_longer_than_the_csv_module_allows_by_itself(tmp_path):
    found = read_records(written(tmp_path / "a.csv", f"text,label\n{'word ' * 50_000},x\n"))
    assert len(rows_of(found)[0][0]) == 250_000


def test_a_repeated_header_is_a_problem(tmp_path):
    found = read_records(written(tmp_path / "a.csv", "text,label\na,x\ntext,label\nb,y\n"))
    assert rows_of(found) == [("a", "x"), ("b", "y")]
    assert problems_of(found) == [(3, "the header once more")]


HEADERS = {  # first rows that are headers, and first rows that are not
    "text,label\na,b\n": True,
    "Sentence 1,foo\na,b\n": True,
    "Satz;Kategorie\nDas war ein langer Satz, finde ich;gut\nDas war ein anderer;schlecht\n": True,
    "name,points\nabc,1\ndef,2.5\n": True,
    "id,airline_sentiment\n1,a\n2,b\nid,airline_sentiment\n": True,
    "turn on the light,light_on\nplay a song,music\nlights please,light_on\n": False,
    "great film,positive\nbad film,negative\n": False,
    "great film,1\nbad film,0\n": False,
    "just one text\nanother text\n": False,
    "utterance\nanother text\n": True,
}


@pytest.mark.parametrize("body", HEADERS)
def test_a_header_is_told_from_a_first_row(body, tmp_path):
    records, _ = read_records(written(tmp_path / "a.csv", body))
    assert (records[0].line == 2) == HEADERS[body]
    assert ("column0" in records[0].fields) != HEADERS[body]


def test_the_user_decides_about_the_header_and_the_log_says_what_was_done(tmp_path, caplog):
    caplog.set_level(logging.INFO, "jaxlm")
    path = written(tmp_path / "a.csv", "text,label\na,x\n")
    assert rows_of(read_records(path, header="no")) == [("text", "label"), ("a", "x")]
    assert "comma; no header (as given): columns 'column0', 'column1'" in caplog.text
    read_records(path)
    assert "a header (well-known names): columns 'text', 'label'" in caplog.text
    assert rows_of(read_records(path, delimiter=";", header="yes")) == [("a,x",)]
    with pytest.raises(ValueError, match="one of auto, yes, no"):
        read_records(path, header="maybe")


def test_columns_without_a_name_or_with_the_same_get_their_own(tmp_path):
    records, _ = read_records(written(tmp_path / "a.csv", ",text,text,label\n0,a,b,x\n"))
    assert list(records[0].fields) == ["column0", "text", "text.2", "label"]


CELLS = st.text('ab ,;|"\t\r\nü\u2028', max_size=6)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=6))
@example(rows=[("", "\t\r", "\t")])  # with tabs every line of it is a whole row, quotes or not
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_what_the_csv_module_writes_is_read_again(delimiter, rows, tmp_path):
    path = tmp_path / "a.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerows([("text", "text_pair", "label"), *rows])
    found = read_records(path)
    assert rows_of(found) == rows and not found[1]


# --- JSON ---


def test_json_lines_give_rows_with_their_lines_and_list_bad_lines(tmp_path):
    body = '{"text": "a", "label": 1}\n\n[1, 2]\n{"text": \n"text"\n{"b": "\\ud800"}\n{"text": "ü"}'
    found = read_records(written(tmp_path / "a.jsonl", body))
    assert [(r.line, r.fields) for r in found[0]] == [
        (1, {"text": "a", "label": 1}),
        (3, {"column0": 1, "column1": 2}),
        (7, {"text": "ü"}),
    ]
    assert [line for line, _ in problems_of(found)] == [4, 5, 6]


def test_json_is_a_list_of_rows_or_an_object_with_one(tmp_path):
    rows = [{"text": "a"}, {"text": "b"}, 3]
    for name, tree in [("a.json", rows), ("b.json", {"version": 1, "data": rows})]:
        found = read_records(written(tmp_path / name, json.dumps(tree, indent=1)))
        assert rows_of(found) == [("a",), ("b",)] and lines_of(found) == [1, 2]
        assert problems_of(found) == [(3, "found int, expected an object or a list")]


def test_json_lines_under_the_name_of_json_are_read(tmp_path):
    found = read_records(written(tmp_path / "a.json", '{"text": "a"}\n{"text": "b"}\n{"te'))
    assert rows_of(found) == [("a",), ("b",)] and [line for line, _ in problems_of(found)] == [3]


def test_a_split_is_named_after_the_path(tmp_path):
    tree = {"train": [["book it", "book"], ["eat it", "eat"]], "oos": [["what", "oos"]]}
    path = written(tmp_path / "a.json", json.dumps(tree))
    assert rows_of(read_records(f"{path}:train")) == [("book it", "book"), ("eat it", "eat")]
    both = read_records(f"{path}:train+oos")
    assert [(r.source, r.line) for r in both[0]] == [
        (f"{path}:train", 1),
        (f"{path}:train", 2),
        (f"{path}:oos", 1),
    ]
    assert read_records(path, split="oos")[0][0].fields == {"column0": "what", "column1": "oos"}
    for wrong in (str(path), f"{path}:dev"):
        with pytest.raises(ValueError, match=r"train \(2 rows\), oos \(1 rows\)"):
            read_records(wrong)
    with pytest.raises(ValueError, match=r"of a \.json file only"):
        read_records(written(tmp_path / "a.csv", "text\na\n"), split="train")


@pytest.mark.parametrize("depth", [MAX_DEPTH + 2, 200_000])
def test_deep_json_is_refused_in_words(depth, tmp_path):
    deep = "[" * depth + "]" * depth
    found = read_records(written(tmp_path / "a.jsonl", f'{{"a": {deep}}}\n{{"a": 1}}\n'))
    assert rows_of(found) == [(1,)] and "nested" in found[1][0].text
    path = written(tmp_path / "a.json", f'[{{"a": {deep}}}, {{"a": 1}}]')
    if depth > sys.getrecursionlimit():
        with pytest.raises(ValueError, match=r"a\.json: JSON that is nested too deeply"):
            read_records(path)
    else:
        assert problems_of(read_records(path))[0][0] == 1


def test_broken_json_says_where(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json: broken JSON: .* line 2 column"):
        read_records(written(tmp_path / "a.json", '[{"a": 1},\n{"a" 2}]'))


SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "Rome is old.",
                    "qas": [
                        {
                            "id": "q1",
                            "question": "Which city?",
                            "answers": [{"text": "Rome", "answer_start": 0}],
                        },
                        {
                            "id": "q2",
                            "question": "Who?",
                            "is_impossible": True,
                            "answers": [{"text": "old", "answer_start": 8}],
                        },
                        {"id": "q3", "question": "Unlabelled?"},
                        {"id": "q4"},
                    ],
                },
                {"context": "No questions.", "qas": []},
                {"context": "Broken."},
            ],
        },
        {"title": "empty"},
    ],
}


@pytest.mark.parametrize("format", ["", "squad"])
def test_squad_gives_each_question_and_misses_nothing(format, tmp_path):
    found = read_records(written(tmp_path / "dev.json", json.dumps(SQUAD)), format)
    assert [record.fields["id"] for record in found[0]] == ["q1", "q2", "q3"]
    assert found[0][0].fields["answers"] == [{"text": "Rome", "answer_start": 0}]
    assert found[0][1].fields["answers"] == [] and "answers" not in found[0][2].fields
    assert {record.fields["context"] for record in found[0]} == {"Rome is old."}
    assert [line for line, _ in problems_of(found)] == [4, 5, 6]


def test_another_json_is_not_squad(tmp_path):
    with pytest.raises(ValueError, match="is not SQuAD's format"):
        read_records(written(tmp_path / "a.json", "[]"), "squad")


# --- Parquet ---


def test_parquet_gives_rows_lists_and_the_names_of_classes(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = {"names": ["neg", "pos"], "_type": "ClassLabel"}
    tags = {"feature": {"names": ["O", "B-X"], "_type": "ClassLabel"}, "_type": "Sequence"}
    features = {"label": names, "tags": tags, "text": {"dtype": "string", "_type": "Value"}}
    columns = {"text": ["a", "b", None], "label": [1, 0, -1], "tags": [[0, 1], [], [1]]}
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    assert rows_of(read_records(path)) == [("a", 1, [0, 1]), ("b", 0, []), (None, -1, [1])]
    info = json.dumps({"info": {"features": features}})
    table = pyarrow.table(columns).replace_schema_metadata({"huggingface": info})
    parquet.write_table(table, path)
    found = read_records(path)
    assert rows_of(found) == [("a", "pos", ["O", "B-X"]), ("b", "neg", []), (None, None, ["B-X"])]
    assert lines_of(found) == [1, 2, 3]
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read_records(written(tmp_path / "b.parquet", path.read_bytes()[:100]))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxlm\[parquet\]'"):
        read_records(written(tmp_path / "a.parquet", b"PAR1"))


# --- CoNLL ---


@pytest.mark.parametrize("ending", [".conll", ".annotated", ".txt"])
def test_conll_sentences_have_the_line_of_their_first_word(ending, tmp_path):
    body = "-DOCSTART-\tO\n\n#tag\tO\nRome\tB-LOC\n\t\n\n# a comment\nIt\tO\n's\u2028\tO\r\n! ?\tO"
    found = read_records(
        written(tmp_path / f"a{ending}", body), "conll" if ending == ".txt" else ""
    )
    assert rows_of(found) == [
        (["#tag", "Rome"], ["O", "B-LOC"]),
        (["It", "'s\u2028", "! ?"], ["O", "O", "O"]),
    ]
    assert lines_of(found) == [3, 8] and not found[1]


def test_conll_columns_may_be_separated_by_spaces(tmp_path):
    body = "# id = 7\nEU NNP  B-ORG\n# VB O\n\n# two\nHi UH O\n"
    found = read_records(written(tmp_path / "a.conll", body))
    assert list(found[0][0].fields) == ["column0", "column1", "column2"]
    assert [record.fields["column0"] for record in found[0]] == [["EU", "#"], ["Hi"]]


def test_a_sentence_with_a_broken_line_is_one_problem(tmp_path):
    body = "a\tO\nb\tO\n\nc\tO\nd\nx\n\ne\tO\n\n\tO\nf\tO\n"
    found = read_records(written(tmp_path / "a.conll", body))
    assert [record.fields["column0"] for record in found[0]] == [["a", "b"], ["e"]]
    assert problems_of(found) == [
        (5, "found 1 columns in the sentence of line 4, expected 2 columns"),
        (10, "found an empty cell in the sentence of line 10, expected 2 columns"),
    ]


def test_conll_u_has_named_columns_and_words_only(tmp_path):
    rows = ["# text = vámonos", "1-2\tvámonos" + "\t_" * 8, "1\tvamos\tir\tVERB" + "\t_" * 6]
    body = "\n".join([*rows, "2\tnos\tnosotros\tPRON" + "\t_" * 6, "2.1\tx" + "\t_" * 8, ""])
    (record,), problems = read_records(written(tmp_path / "a.conllu", body))
    assert record.fields["form"] == ["vamos", "nos"] and record.fields["upos"] == ["VERB", "PRON"]
    assert record.line == 3 and not problems


# --- SemEval ---


def test_relations_have_their_sentence_and_label(tmp_path):
    body = (
        '1\t"The <e1>child</e1> said "no" to <e2>me</e2>."\r\nOther\r\nComment: fine\r\n\r\n'
        '2\t"A <e1>b</e1> <e2>c</e2>"\r\nCause-Effect(e2,e1)\r\nComment:\r\nstray\r\n'
        '3\t"Without a <e1>label</e1> <e2>here</e2>"\r\n4\t"The <e1>last</e1> <e2>one</e2>"\r\n'
    )
    path = written(tmp_path / "TRAIN.TXT", body)
    found = read_records(path)
    assert found == read_records(path, "semeval")
    assert [(r.line, r.fields.get("label")) for r in found[0]] == [
        (1, "Other"),
        (5, "Cause-Effect(e2,e1)"),
        (9, None),
        (10, None),
    ]
    assert found[0][0].fields["text"] == 'The <e1>child</e1> said "no" to <e2>me</e2>.'
    assert [line for line, _ in problems_of(found)] == [8]


# --- any file ---


def test_files_that_are_none_or_empty_are_errors_that_name_them(tmp_path):
    for wrong in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(wrong)):
            read_records(wrong)
    for name in ("a.csv", "a.jsonl", "a.conll"):
        with pytest.raises(ValueError, match="has no rows"):
            read_records(written(tmp_path / name, "\n"))
    with pytest.raises(ValueError, match="of no known format"):
        read_records(written(tmp_path / "a.txt", "Some prose.\nAnd more of it here.\n"))
    with pytest.raises(ValueError, match=r"format='xml'; expected: one of csv, tsv, jsonl"):
        read_records(written(tmp_path / "a.csv", "text\na\n"), "xml")


def test_problems_are_printed_in_part_and_written_in_full(tmp_path):
    problems = [Problem("a.csv", i, "found 1 column") for i in range(1, 13)]
    printed = format_problems(problems).split("\n")
    assert len(printed) == 11 and printed[0] == "  a.csv:1: found 1 column"
    assert printed[-1] == "  … and 2 more"
    path = tmp_path / "problems.jsonl"
    write_problems(problems, path)
    assert [Problem(**json.loads(line)) for line in path.read_text().splitlines()] == problems


def test_more_than_a_tenth_of_bad_rows_is_refused_after_all_are_written(tmp_path):
    path = tmp_path / "problems.jsonl"
    problems = [Problem("a.csv", 1, "empty"), Problem("a.csv", 2, "empty")]
    assert check_problems([], 20, path) == "" and path.read_text() == ""
    assert "2 of 20 rows (10.0%) cannot be used" in check_problems(problems, 20, path)
    with pytest.raises(ValueError, match="expected: at most 10% of the rows"):
        check_problems(problems, 19, path)
    with pytest.raises(ValueError, match="expected: at most 0% of the rows"):
        check_problems(problems, 1000, path, max_share=0)
    assert len(path.read_text().splitlines()) == 2
