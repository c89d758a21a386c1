"""Demo data for fine-tuning that every Python brings with it: labels that the standard library gives for free.

    package     which package a function is from           sequence classification   text, label
    tokens      the kind of each token of a statement      token classification      words, labels
    docstring   where a function says what it does         question answering        id, question, context, answers
    search      a function and its docstring               embedding                 text, text_pair
    summary     the first line of a function's docstring   summarisation             source, target

    for record in demo_records("package", "train"): …
    write_demo("package", Path("demo"))     # train.jsonl, dev.jsonl, test.jsonl

No file of the library is in two splits, all demos split the files the same way, and no text is in two records.
The library is that of the running Python: numbers of one version do not compare with those of another. It is also what
the quickstart pretrains on, so that checkpoint has read the files of every split, without these labels.
"""

import functools
import hashlib
import json
import re
import sysconfig
import tokenize
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.data.demos_python import read_functions, read_logical_lines
from jaxlm.data.records import Record
from jaxlm.data.sources import find_files

SPLITS = ("train", "dev", "test")
LIMITS = {"train": 4000, "dev": 400, "test": 400}  # records: minutes on a CPU
HELD_OUT = 0.15  # share of a package's functions that is in the files of dev, and of test
NUM_PACKAGES = 20
MIN_FILES = 3  # with functions, of a package: one for each split
FUNCTION_CHARS = 600  # of package, search and summary: about 200 tokens
CONTEXT_CHARS = 1500
LINE_WORDS = (4, 60)
Maker = Callable[[str, str], Iterable[Record]]  # (file, its text) -> records
_DEF = re.compile(r"^[ \t]*(?:async[ \t]+)?def[ \t].*$", re.MULTILINE)


def demo_records(
    name: str, split: str, *, limit: int = LIMITS["train"], seed: int = 0
) -> list[Record]:
    """One split of a demo, always the same in one version of Python. Takes some seconds, once in a process.

    name: of DEMOS. split: of SPLITS. limit: training records at most. seed: of the split of the files and the choice
    of records. A record's `source` is a file in the library's folder.

    Raises:
      ValueError: if the demo or the split is unknown.
    """
    problems = [
        f"found: {what} {found!r}; expected: one of {', '.join(known)}"
        for what, found, known in (("demo", name, DEMOS), ("split", split, SPLITS))
        if found not in known
    ]
    if problems:
        raise ValueError("\n".join(problems))
    return list(_demo_of_the_library(name, limit, seed)[split])


def write_demo(
    name: str, folder: Path, *, limit: int = LIMITS["train"], seed: int = 0
) -> dict[Path, int]:
    """Writes the splits as train, dev and test of FORMATS' ending; returns file -> number of records."""
    ending, dump = FORMATS[name]
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for split in SPLITS:
        records = demo_records(name, split, limit=limit, seed=seed)
        path = folder / f"{split}{ending}"
        path.write_text(dump(records), encoding="utf-8")
        written[path] = len(records)
    return written


@functools.lru_cache(maxsize=len(SPLITS))
def _demo_of_the_library(name: str, limit: int, seed: int) -> dict[str, list[Record]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {}
    for path in find_files("stdlib"):
        with tokenize.open(path) as file:  # as the file's own coding line says
            texts[path.relative_to(root).as_posix()] = file.read()
    return make_demo(name, texts, LIMITS | {"train": limit}, seed)


# --- files and splits -------------------------------------------------------------------------------------------------


def make_demo(
    name: str, texts: Mapping[str, str], limits: Mapping[str, int], seed: int = 0
) -> dict[str, list[Record]]:
    """split -> records of the modules `texts` ('asyncio/events.py' -> source), at most `limits[split]`.

    What is in test is left out of dev and train, and what is in dev of train.
    """
    make: Maker = DEMOS[name]
    packages: tuple[str, ...] = ()
    if name == "package":
        packages = largest_packages(texts)
        make = functools.partial(package_records, packages=packages)
    split_of = split_files(texts, seed)
    seen: set[str] = set()
    made: dict[str, list[Record]] = {}
    for split in reversed(SPLITS):
        files = [file for file in texts if split_of[file] == split]
        # As many functions of each package, as far as there are.
        groups = [[f for f in files if package_of(f) == package] for package in packages] or [files]
        most = limits[split] // max(len(groups), 1)
        chosen = [_choose(make, {f: texts[f] for f in g}, most, seed, seen) for g in groups]
        made[split] = [record for records in chosen for record in records]
    return made


def package_of(file: str) -> str:
    """'asyncio/events.py' -> 'asyncio'; '' for a module that is not in a package."""
    return file.partition("/")[0] if "/" in file else ""


def largest_packages(texts: Mapping[str, str]) -> tuple[str, ...]:
    """The packages with most functions, sorted by name; functions that begin with the same line count once."""
    functions: dict[str, set[str]] = defaultdict(set)
    for file, text in texts.items():
        functions[package_of(file)].update(_DEF.findall(text))
    known = _splittable(texts)
    largest = sorted(known, key=lambda package: (-len(functions[package]), package))
    return tuple(sorted(largest[:NUM_PACKAGES]))


def _splittable(texts: Mapping[str, str]) -> set[str]:
    """The packages that have functions in a file for each split."""
    files = [package_of(file) for file, text in texts.items() if _DEF.search(text)]
    return {package for package in files if package and files.count(package) >= MIN_FILES}


def split_files(texts: Mapping[str, str], seed: int) -> dict[str, str]:
    """file -> split, package by package, so that each of `largest_packages` is in every split.

    The largest file of a package is for training; of the others, in a random order, dev and test take until they have
    their share of its functions. All that is in no such package is split like one.
    """
    splittable = _splittable(texts)
    pools: dict[str, list[str]] = defaultdict(list)
    for file in texts:
        pools[package_of(file) if package_of(file) in splittable else ""].append(file)
    sizes = {file: len(_DEF.findall(text)) for file, text in texts.items()}
    split_of = {}
    for files in pools.values():
        first = max(files, key=lambda file: (sizes[file], file))
        split_of[first] = "train"
        held_out = {"test": 0, "dev": 0}
        for file in sorted(set(files) - {first}, key=lambda file: _random(seed, file)):
            emptier = min(held_out, key=held_out.__getitem__)
            is_full = held_out[emptier] >= HELD_OUT * sum(sizes[file] for file in files)
            split_of[file] = "train" if is_full else emptier
            held_out[emptier] += 0 if is_full else sizes[file]
    return split_of


def _choose(
    make: Maker,
    texts: Mapping[str, str],
    most: int,
    seed: int,
    seen: set[str],
) -> list[Record]:
    """At most `most` records of the files, from many files and many places in each, without a text of `seen`.

    Stops reading when it has enough. Adds the texts of what it takes to `seen`.
    """
    chosen: list[Record] = []
    share = -(-3 * most // max(len(texts), 1))  # of one file: some have little
    for file in sorted(texts, key=lambda file: _random(seed, file)):
        if len(chosen) == most:
            break
        records = sorted(make(file, texts[file]), key=lambda r: _random(seed, f"{file}:{r.line}"))
        taken: list[Record] = []
        for record in records:
            strings = _strings(record)
            if len(taken) < min(share, most - len(chosen)) and not strings & seen:
                seen |= strings
                taken.append(record)
        chosen += sorted(taken, key=lambda record: record.line)
    return chosen


def _strings(record: Record) -> set[str]:
    """What must not be in two records."""
    strings = {record.fields.get(key, "") for key in ("text", "text_pair", "context", "source")}
    strings |= set(record.fields.get("target", ()))
    return (strings | {" ".join(record.fields.get("words", ()))}) - {""}


def _random(seed: int, what: str) -> bytes:
    """A key that sorts at random, the same on every machine."""
    return hashlib.sha256(f"{seed}:{what}".encode()).digest()


# --- the demos: (file, its text) -> records ---------------------------------------------------------------------------


def package_records(file: str, text: str, packages: Collection[str]) -> Iterator[Record]:
    """Functions, labelled with their package; all the packages' names are hidden in the text."""
    for function in read_functions(text):
        shown = hide_names(cut_lines(function.source, FUNCTION_CHARS), packages)
        if shown.count("\n") >= 2:
            yield Record(file, function.line, {"text": shown, "label": package_of(file)})


def hide_names(text: str, names: Collection[str]) -> str:
    """'json.load(JSONError, re.I)' -> 'package.load(packageError, package.I)': short names only where they are whole."""
    parts = [
        re.escape(n) if len(n) > 3 else rf"(?<![A-Za-z]){re.escape(n)}(?![A-Za-z])" for n in names
    ]
    return re.sub("|".join(parts), "package", text, flags=re.IGNORECASE)


def token_records(file: str, text: str) -> Iterator[Record]:
    """Statements as words with the kinds of `read_logical_lines`; short, long and uniform ones left out."""
    for line, words, kinds in read_logical_lines(text):
        if LINE_WORDS[0] <= len(words) <= LINE_WORDS[1] and len(set(kinds)) > 1:
            yield Record(file, line, {"words": words, "labels": kinds})


def docstring_records(file: str, text: str) -> Iterator[Record]:
    """The question what a function does, answered by the first line of its docstring."""
    for function in read_functions(text):
        answer = function.docstring.partition("\n")[0].strip()
        context = cut_lines(function.source, CONTEXT_CHARS)
        start = context.find(answer, function.docstring_start)
        if len(answer.split()) < 2 or start < 0:  # written with an escape, or too far down
            continue
        fields = {
            "id": f"{file}:{function.line}",
            "question": f"What does {function.name} do?",
            "context": context,
            "answers": [{"text": answer, "start": start}],
        }
        yield Record(file, function.line, fields)


def search_records(file: str, text: str) -> Iterator[Record]:
    """Functions without their docstrings, paired with the docstring's first paragraph."""
    for function in read_functions(text):
        paragraph = " ".join(re.split(r"\n\s*\n", function.docstring, maxsplit=1)[0].split())
        code = cut_lines(function.body, FUNCTION_CHARS)
        if len(paragraph.split()) >= 3 and code.count("\n") >= 1:
            yield Record(file, function.line, {"text": code, "text_pair": paragraph})


def summary_records(file: str, text: str) -> Iterator[Record]:
    """Functions without their docstrings, to the docstring's first line."""
    for function in read_functions(text):
        line = function.docstring.strip().partition("\n")[0].strip()
        code = cut_lines(function.body, FUNCTION_CHARS)
        if len(line.split()) >= 3 and code.count("\n") >= 1:
            yield Record(file, function.line, {"source": code, "target": [line]})


DEMOS: dict[str, Callable[..., Iterable[Record]]] = {
    "package": package_records,
    "tokens": token_records,
    "docstring": docstring_records,
    "search": search_records,
    "summary": summary_records,
}


def cut_lines(text: str, limit: int) -> str:
    """The whole lines of a text that fit into `limit` characters."""
    return text if len(text) <= limit else text[:limit].rpartition("\n")[0]


# --- files to write ---------------------------------------------------------------------------------------------------


def dump_jsonl(records: Sequence[Record]) -> str:
    """The records as JSON lines."""
    return "".join(json.dumps(record.fields, ensure_ascii=False) + "\n" for record in records)


def dump_conll(records: Sequence[Record]) -> str:
    """'word<tab>label' lines, with an empty line behind each sentence."""
    sentences = [
        zip(record.fields["words"], record.fields["labels"], strict=True) for record in records
    ]
    return "".join("".join(f"{w}\t{label}\n" for w, label in s) + "\n" for s in sentences)


def dump_squad(records: Sequence[Record]) -> str:
    """SQuAD's JSON: an article for each file of the library, a paragraph for each function."""
    articles: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        fields = record.fields
        answers = [{"text": a["text"], "answer_start": a["start"]} for a in fields["answers"]]
        question = {"id": fields["id"], "question": fields["question"], "answers": answers}
        articles[record.source].append({"context": fields["context"], "qas": [question]})
    data = [{"title": title, "paragraphs": paragraphs} for title, paragraphs in articles.items()]
    return json.dumps({"version": "1.1", "data": data}, indent=1, ensure_ascii=False) + "\n"


FORMATS: dict[str, tuple[str, Callable[[Sequence[Record]], str]]] = {
    "package": (".jsonl", dump_jsonl),
    "tokens": (".conll", dump_conll),
    "docstring": (".json", dump_squad),
    "search": (".jsonl", dump_jsonl),
    "summary": (".jsonl", dump_jsonl),
}
