"""Files of dialogues, instructions and pairs of texts: which column is what, and what a cell becomes."""

import json

import pytest

from jaxlm.data.column_names import ROLES
from jaxlm.data.columns import as_role_records, choose_columns, choose_roles
from jaxlm.data.record_base import Record
from jaxlm.data.records import read_records
from jaxlm.data.splits import split_train_dev


def read_roles(task, *rows, **given):
    records = [Record("rows.jsonl", n, row) for n, row in enumerate(rows, 1)]
    roles = choose_roles(records, task, given)
    named, problems = as_role_records(records, choose_columns(records, roles, given))
    return [record.fields for record in named], [problem.text for problem in problems]


HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
OTHER_SPELLINGS = {
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
    },
    "parts": {"messages": [HI[0] | {"content": [{"type": "text", "text": "Hi"}]}, HI[1]]},
    "JSON in a cell": {"messages": json.dumps(HI)},
}


@pytest.mark.parametrize("name", OTHER_SPELLINGS)
def test_dialogues_in_other_spellings_say_the_same(name):
    assert read_roles("dialogue", OTHER_SPELLINGS[name]) == ([{"messages": HI}], [])


def test_a_file_without_messages_has_instructions():
    row = {"instruction": "Add.", "context": "1 2", "response": "3", "category": "sums"}
    wanted = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert read_roles("dialogue", row) == ([wanted], [])
    assert choose_roles([Record("a", 1, row)], "dialogue", {}) is ROLES["instruction"]
    named = {"ask": "Add.", "say": "3"}
    found, _ = read_roles("dialogue", named, instruction="ask", output="say")
    assert found == [{"instruction": "Add.", "output": "3"}]


def test_a_message_that_is_no_text_is_a_problem_of_its_row():
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]
    call = [{"role": "assistant", "content": None, "tool_calls": []}]
    _, problems = read_roles("dialogue", {"messages": image}, {"messages": call})
    assert "no text" in problems[0] and "needs a role and its content" in problems[1]


def test_sources_and_targets_may_be_lists():
    rows = {"source": ["One.", "Two."], "target": ["a", "b"]}, {"source": "Three.", "target": "c"}
    assert read_roles("seq2seq", *rows) == (
        [{"source": "One. Two.", "target": ["a", "b"]}, {"source": "Three.", "target": ["c"]}],
        [],
    )
    assert read_roles("seq2seq", {"article": "a", "highlights": "b"})[0][0]["target"] == ["b"]


def write_pair(folder, source, target):
    (folder / "a.en").write_bytes(source)
    (folder / "a.de").write_bytes(target)
    return f"{folder}/a.en+{folder}/a.de"


def test_lines_of_parallel_files_belong_together(tmp_path):
    path = write_pair(tmp_path, "one\r\n\ntwo\u2028x\n".encode(), b"eins\n\nzwei\n")
    records, problems = read_records(path)
    assert [record.line for record in records] == [1, 2, 3] and not problems
    assert records[0].fields == {"source": "one", "target": "eins"}
    assert records[2].fields == {"source": "two\u2028x", "target": "zwei"}


def test_parallel_files_of_different_lengths_are_refused(tmp_path):
    path = write_pair(tmp_path, b"one\ntwo\n", b"eins\n")
    with pytest.raises(ValueError, match="(?s)a.en has 2 lines and .*a.de has 1"):
        read_records(path)
    with pytest.raises(FileNotFoundError):
        read_records(f"{tmp_path}/a.en+{tmp_path}/no")


def test_one_source_is_never_on_both_sides_of_a_split():
    fields = [{"source": f"s{n % 10}", "target": [f"t{n}"]} for n in range(40)]
    records = [Record("a", n, f) for n, f in enumerate(fields, 1)]
    sides = [{r.fields["source"] for r in side} for side in split_train_dev(records, 0.3)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
