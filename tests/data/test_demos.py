"""Laws of the demos: splits share neither files nor texts, and what the labels say is in the text."""

import ast
import functools
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from jaxlm.data import demos, demos_python
from jaxlm.data.demos import DEMOS, SPLITS
from jaxlm.data.records import read_records

ROOT = Path(sysconfig.get_paths()["stdlib"])
PACKAGES = ("email", "http", "logging", "urllib")
MODULES = ("bisect.py", "heapq.py", "shlex.py", "textwrap.py", "tarfile.py")
LIMITS = {"train": 60, "dev": 20, "test": 20}


@pytest.fixture(scope="module")
def library():
    files = [file for package in PACKAGES for file in sorted(ROOT.glob(f"{package}/*.py"))]
    return {
        file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
        for file in [*files, *(ROOT / module for module in MODULES)]
    }


@pytest.fixture(scope="module")
def made(library):
    return {name: demos.make_demo(name, library, LIMITS) for name in DEMOS}


# --- splits -----------------------------------------------------------------------------------------------------------


def check_splits(splits):
    for part in (lambda r: {r.source}, demos._strings):
        seen = [set().union(*map(part, splits[split])) for split in SPLITS]
        assert all(seen)
        assert sum(map(len, seen)) == len(set().union(*seen)), "something is in two splits"


@pytest.mark.parametrize("name", DEMOS)
def test_splits_share_no_file_and_no_text(name, made):
    check_splits(made[name])


def test_the_split_check_fails_for_records_dealt_out_at_random(made):
    records = [record for split in SPLITS for record in made["search"][split]]
    with pytest.raises(AssertionError, match="two splits"):
        check_splits({split: records[i::3] for i, split in enumerate(SPLITS)})


@pytest.mark.parametrize("name", DEMOS)
def test_no_text_is_there_twice_and_no_split_is_too_large(name, made):
    for split, records in made[name].items():
        assert LIMITS[split] / 4 <= len(records) <= LIMITS[split]
        counts = Counter(string for r in records for string in demos._strings(r))
        assert set(counts.values()) == {1}


def test_all_demos_split_the_files_the_same_way(made):
    split_of = {}
    for splits in made.values():
        for split, records in splits.items():
            for record in records:
                assert split_of.setdefault(record.source, split) == split


def test_a_demo_is_the_same_again_and_another_with_another_seed(made, library):
    again = demos.make_demo("package", library, LIMITS)
    assert again == made["package"]
    assert demos.make_demo("package", library, LIMITS, seed=1) != again


def test_the_limit_of_train_changes_no_other_split(made, library):
    fewer = demos.make_demo("search", library, LIMITS | {"train": 7})
    assert len(fewer["train"]) == 7
    assert fewer["test"] == made["search"]["test"] and fewer["dev"] == made["search"]["dev"]


def test_every_splittable_package_has_functions_in_every_split():
    module = "def a{0}():\n    pass\ndef b{0}():\n    pass\n"
    texts = {f"p{n}/{i}.py": module.format(i) for n in range(5) for i in range(3)}
    texts |= {"p0/table.py": "x = 1", "few/0.py": "def f(): 0", "few/1.py": "x = 2"}
    for seed in range(5):
        split_of = demos.split_files(texts, seed)
        assert set(split_of) == set(texts)
        for n in range(5):
            assert {split_of[f"p{n}/{i}.py"] for i in range(3)} == set(SPLITS)
    assert demos.largest_packages(texts) == tuple(f"p{n}" for n in range(5))


def test_held_out_files_have_about_their_share_of_the_functions():
    texts = {f"p/{i}.py": f"def f{i}(): 0\n" for i in range(100)}
    counts = Counter(demos.split_files(texts, 0).values())
    assert counts == {"train": 70, "dev": 15, "test": 15}


# --- the demos --------------------------------------------------------------------------------------------------------


def check_packages(splits, packages):
    """A function's label is its file's package, every split has all, and no text says one."""
    for records in splits.values():
        assert {r.fields["label"] for r in records} == set(packages)
        for record in records:
            assert record.source.startswith(record.fields["label"] + "/")
            found = [name for name in packages if name in record.fields["text"].lower()]
            assert not found, f"{record.fields['text']} says {found}"


def test_a_package_is_the_label_of_its_functions_and_in_no_text(made):
    check_packages(made["package"], PACKAGES)


def test_the_package_check_fails_where_names_are_not_hidden(library, monkeypatch):
    monkeypatch.setattr(demos, "hide_names", lambda text, names: text)
    with pytest.raises(AssertionError, match="says"):
        check_packages(demos.make_demo("package", library, LIMITS), PACKAGES)


def test_short_names_are_hidden_only_where_they_are_whole():
    text = "json.load(JSONError, re.compile(rest)), _re, RE_FLAG"
    hidden = "package.load(packageError, package.compile(rest)), _package, package_FLAG"
    assert demos.hide_names(text, ("json", "re")) == hidden


def check_answers(records):
    for record in records:
        (answer,) = record.fields["answers"]
        start, context = answer["start"], record.fields["context"]
        assert context[start : start + len(answer["text"])] == answer["text"]
        (function,) = [f for f in functions_of(record.source) if f.line == record.line]
        assert function.source.startswith(context)  # which may be cut off
        node = ast.parse(function.source).body[0]
        assert ast.get_docstring(node).startswith(answer["text"])
        assert record.fields["question"] == f"What does {node.name} do?"


@functools.cache
def functions_of(file):
    return demos_python.read_functions((ROOT / file).read_text(encoding="utf-8"))


def test_an_answer_is_the_docstrings_first_line_at_its_place(made):
    for records in made["docstring"].values():
        check_answers(records)


def test_the_answer_check_fails_for_a_shifted_answer(made):
    record = made["docstring"]["test"][0]
    answers = [a | {"start": a["start"] + 1} for a in record.fields["answers"]]
    with pytest.raises(AssertionError):
        check_answers([record._replace(fields=record.fields | {"answers": answers})])


def test_a_function_to_search_for_does_not_contain_what_its_docstring_says(made):
    for records in made["search"].values():
        for record in records:
            said = record.fields["text_pair"]
            assert said not in " ".join(record.fields["text"].split())
            assert len(record.fields["text"]) <= demos.FUNCTION_CHARS


def test_every_kind_of_token_is_in_every_split_and_every_word_has_one(made):
    for records in made["tokens"].values():
        for record in records:
            words, labels = record.fields["words"], record.fields["labels"]
            assert len(words) == len(labels) and not any(len(w.split()) != 1 for w in words)
        kinds = {label for record in records for label in record.fields["labels"]}
        names = {"DEF", "ARG", "CALL", "ATTR", "NAME"}
        assert names | {"KEYWORD", "OP", "STRING", "COMMENT"} <= kinds


# --- Python source ----------------------------------------------------------------------------------------------------

STATEMENTS = '''\
# the sum
def add(a, b=x.y):
    """Adds numbers."""
    return total(a, é.add(start=b)[1:-1], f"{a.b(1)} and {b}")
'''
KINDS = """\
#/COMMENT the/COMMENT sum/COMMENT def/KEYWORD add/DEF (/OP a/ARG ,/OP b/ARG =/OP x/NAME ./OP y/ATTR )/OP :/OP
\"""Adds/STRING numbers.\"""/STRING
return/KEYWORD total/CALL (/OP a/NAME ,/OP é/NAME ./OP add/CALL (/OP start/ARG =/OP b/NAME )/OP [/OP 1/NUMBER :/OP \
-/OP 1/NUMBER ]/OP ,/OP f"{a.b(1)}/STRING and/STRING {b}"/STRING )/OP
"""


def test_words_get_the_kinds_of_the_example_in_every_version_of_python():
    lines = list(demos_python.read_logical_lines(STATEMENTS))
    written = [" ".join(map("/".join, zip(l.words, l.kinds, strict=True))) for l in lines]
    assert written == KINDS.splitlines()
    assert [l.line for l in lines] == [1, 3, 4]


@pytest.mark.parametrize("module", ["bisect.py", "heapq.py", "shlex.py", "textwrap.py"])
def test_as_many_names_are_of_a_kind_as_the_syntax_tree_has(module, library):
    """These modules have no f-strings."""
    kinds = Counter(k for l in demos_python.read_logical_lines(library[module]) for k in l.kinds)
    nodes = list(ast.walk(ast.parse(library[module])))

    def count(*types):
        return sum(isinstance(node, types) for node in nodes)

    called = [n.func for n in nodes if isinstance(n, ast.Call)]
    assert kinds["DEF"] == count(ast.FunctionDef, ast.ClassDef)
    assert kinds["ARG"] == count(ast.arg) + sum(
        isinstance(n, ast.keyword) and n.arg is not None for n in nodes
    )
    assert kinds["CALL"] == sum(isinstance(f, (ast.Name, ast.Attribute)) for f in called)
    methods = sum(isinstance(f, ast.Attribute) for f in called)
    assert kinds["ATTR"] == count(ast.Attribute) - methods


def test_functions_are_dedented_with_decorators_and_nested_ones_are_theirs():
    text = (
        "class A:\n    @property\n    def é(self):\n        '''\n        It is so.\n        '''\n"
        "        def inner(): 'no'\n        return inner\n\nasync def last(): 'Short.'\n"
    )
    method, last = demos_python.read_functions(text)
    assert (method.name, method.line, method.docstring) == ("é", 2, "It is so.")
    assert method.source.startswith("@property\ndef é(self):\n    '''\n    It is so.\n")
    assert method.source[method.docstring_start :].startswith("    '''\n    It is so.")
    assert method.body == "@property\ndef é(self):\n    def inner(): 'no'\n    return inner"
    assert (last.name, last.line, last.docstring) == ("last", 10, "Short.")


def test_broken_source_is_an_error_that_says_where():
    with pytest.raises(SyntaxError):
        demos_python.read_functions("def f(:\n")


# --- the whole library and files --------------------------------------------------------------------------------------


def test_the_library_gives_twenty_packages(tmp_path):
    train = demos.demo_records("package", "train")
    labels = {record.fields["label"] for record in train}
    assert len(labels) == demos.NUM_PACKAGES and {"asyncio", "email", "json"} & labels
    assert 1500 < len(train) <= demos.LIMITS["train"]
    for split in ("dev", "test"):
        records = demos.demo_records("package", split)
        assert {record.fields["label"] for record in records} == labels
        assert 200 < len(records) <= demos.LIMITS[split]


def test_an_unknown_demo_or_split_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="(?s)'packages'; expected: .*tokens.*'valid'; .* dev"):
        demos.demo_records("packages", "valid")


def roles_read_back(name, records, tmp_path):
    """The records' fields, by role, after the way through a file of the demo's format."""
    ending, dump = demos.FORMATS[name]
    path = tmp_path / f"{name}{ending}"
    path.write_text(dump(records), encoding="utf-8")
    found, problems = read_records(path)
    assert not problems
    fields = [record.fields for record in found]
    if name == "tokens":
        return [{"words": f["column0"], "labels": f["column1"]} for f in fields]
    for answer in (a for f in fields for a in f.get("answers", ())):
        answer["start"] = answer.pop("answer_start")
    return fields


@pytest.mark.parametrize("name", DEMOS)
def test_files_read_back_say_what_the_records_say(name, made, tmp_path):
    records = made[name]["test"]
    assert roles_read_back(name, records, tmp_path) == [record.fields for record in records]
