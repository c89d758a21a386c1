"""Laws of the sources: every document arrives once with its origin, and whatever is bad says so."""

import gzip
import json
from collections import Counter

import pytest

from jaxlm.data import sources
from jaxlm.data.sources import Bad, Document, find_files, make_spans, read_documents, read_span

TEXTS = ["first\n", "你好，世界。", "مرحبا بالعالم", 'a "quote" \\ and\ttab\r\n', "last"]


def texts_of(items):
    return [item.text for item in items if isinstance(item, Document)]


def reasons_of(items):
    return [item.reason for item in items if isinstance(item, Bad)]


def lines_of(texts):
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def zstd(data):
    zstandard = pytest.importorskip("zstandard")
    return zstandard.ZstdCompressor().compress(data)


PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("ending", PACKERS)
def test_json_lines_give_every_document_with_its_line(ending, tmp_path):
    file = tmp_path / f"web.jsonl{ending}"
    file.write_bytes(PACKERS[ending](lines_of(TEXTS) + b"\n  \n"))
    found = list(read_documents(str(file)))
    assert texts_of(found) == TEXTS and not reasons_of(found)
    assert [item.origin for item in found] == [f"{file}:{i}" for i in range(1, 6)]


@pytest.mark.parametrize("ending", PACKERS)
def test_a_text_file_is_one_document_byte_for_byte(ending, tmp_path):
    file = tmp_path / f"book.txt{ending}"
    text = "".join(TEXTS) + "\r\n\x00\ufeff end"
    file.write_bytes(PACKERS[ending](text.encode()))
    assert texts_of(read_documents(str(file))) == [text]


@pytest.mark.parametrize("ending", PACKERS)
def test_a_byte_order_mark_is_no_text_and_the_case_of_an_ending_no_matter(ending, tmp_path):
    mark = "\ufeff".encode()
    contents = {"a.txt": mark + b"one", "b.JSONL": mark + lines_of(["two", "three"]), "c.txt": mark}
    for name, data in contents.items():
        (tmp_path / f"{name}{ending.upper()}").write_bytes(PACKERS[ending](data))
    found = list(read_documents(str(tmp_path)))
    assert texts_of(found) == ["one", "two", "three"] and reasons_of(found) == ["empty_text"]


def test_parquet_gives_every_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [*TEXTS, None, *TEXTS, "", *TEXTS]
    file = tmp_path / "web.parquet"
    parquet.write_table(
        pyarrow.table({"text": rows, "id": range(len(rows))}), file, row_group_size=4
    )
    found = list(read_documents(str(file)))
    assert texts_of(found) == TEXTS * 3
    assert [(b.reason, b.origin) for b in found if isinstance(b, Bad)] == [
        ("not_text", f"{file}:6"),
        ("empty_text", f"{file}:12"),
    ]
    spans = make_spans(file, 1)
    assert len(spans) == 5 and texts_of(i for s in spans for i in read_span(s)) == TEXTS * 3
    wrong = list(read_documents(str(file), text_field="body"))
    assert [(b.reason, b.count) for b in wrong] == [("missing_field", len(rows))]
    file.write_bytes(file.read_bytes()[:100])
    assert reasons_of(read_documents(str(file))) == ["corrupt"]


def test_the_standard_library_is_without_tests_and_readable():
    files = find_files("stdlib")
    assert len(files) > 300 and len(set(files)) == len(files)
    assert not [f for f in files if {"test", "tests", "site-packages"} & set(f.parts[-4:-1])]
    assert {"argparse.py", "textwrap.py"} <= {f.name for f in files}
    item = next(read_documents("stdlib"))
    assert isinstance(item, Document) and item.text


def test_files_folders_and_globs_are_found_in_order_and_once(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden/d.txt", "sub/.e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(*given):
        return [f.name for f in find_files([str(tmp_path / g) for g in given])]

    assert names("") == ["a.txt", "b.txt", "c.txt"]
    assert names("*.txt") == ["a.txt", "b.txt"]
    assert names("**/*.txt") == ["a.txt", "b.txt", "c.txt"]
    assert names("b.txt", "*.txt") == ["b.txt", "a.txt"]
    assert names("su*") == ["c.txt"]
    (tmp_path / "link").symlink_to("sub")
    for folder in ("sub", "link"):
        found = find_files(str(tmp_path / "**/*.txt"), left_out=[tmp_path / folder])
        assert [file.name for file in found] == ["a.txt", "b.txt"]
    with pytest.raises(FileNotFoundError) as error:
        names("a.txt", "none", "*.md")
    assert "none" in str(error.value) and "*.md" in str(error.value)


def check_spans(file, span_bytes, read=read_span):
    """Read span by span, a file gives what it gives when read at once, line numbers included."""
    spans = make_spans(file, span_bytes)
    assert sum(span.num_bytes for span in spans) == file.stat().st_size
    parts = [item for span in spans for item in read(span)]
    assert parts == list(read_documents(str(file)))
    return spans


@pytest.mark.parametrize("span_bytes", [1, 50, 4096, 1 << 20])
def test_spans_of_json_lines_are_the_whole(span_bytes, tmp_path):
    file = tmp_path / "web.jsonl"
    file.write_bytes(lines_of(TEXTS * 2000 + ["no newline"])[:-1])
    spans = check_spans(file, span_bytes)
    assert all(s.num_bytes <= span_bytes + 200 for s in spans)
    assert [item.origin for item in read_span(spans[-1])][-1] == f"{file}:10001"


def test_a_reader_that_loses_a_spans_first_line_fails(tmp_path):
    file = tmp_path / "web.jsonl"
    file.write_bytes(lines_of(["x" * 1000] * 5000))
    with pytest.raises(AssertionError):
        check_spans(file, 4096, read=lambda span: list(read_span(span))[1:])


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("line", ["你好 world\n", "é" * 7])
def test_a_long_text_file_becomes_documents_that_together_are_the_text(
    ending, line, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(sources, "_CUT_WINDOW", 64)
    text = line * 500
    file = tmp_path / f"book.txt{ending}"
    file.write_bytes(PACKERS[ending](text.encode()))
    found = list(read_documents(str(file)))
    parts = texts_of(found)
    assert "".join(parts) == text and not reasons_of(found)
    assert len(parts) > 5 and max(len(part.encode()) for part in parts) <= 1064
    assert all(part.endswith("\n") for part in parts) or "\n" not in line
    assert len({item.origin for item in found}) == len(parts)


BAD_LINES = {
    "broken_json": b'{"text": "half',
    "invalid_utf8": b'{"text": "\xff\xfe"}',
    "missing_field": b'{"body": "x"}',
    "not_text": b'{"text": 7}',
    "empty_text": b'{"text": ""}',
}


def test_every_bad_line_is_named_with_its_origin_and_the_others_arrive(tmp_path):
    file = tmp_path / "web.jsonl"
    bad = [*BAD_LINES.values(), b"[1, 2]", b'{"text": "\\ud800"}', b"[" * 100_000]
    file.write_bytes(b"\n".join(x for line in bad for x in (b'{"text": "good"}', line)))
    found = list(read_documents(str(file)))
    assert texts_of(found) == ["good"] * len(bad)
    expected = [*BAD_LINES, "missing_field", "invalid_utf8", "broken_json"]
    assert reasons_of(found) == expected
    origins = [item.origin for item in found if isinstance(item, Bad)]
    assert origins == [f"{file}:{2 * i}" for i in range(1, len(bad) + 1)]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_truncated_or_damaged_archive_says_so(ending, kind, tmp_path):
    file = tmp_path / f"web.{kind}{ending}"
    whole = PACKERS[ending](lines_of(str(i) * 50 for i in range(20_000)))
    file.write_bytes(whole[: len(whole) // 2])
    found = list(read_documents(str(file)))
    assert reasons_of(found)[-1] == "truncated"
    if kind == "jsonl":
        assert 10 < len(texts_of(found)) < 20_000 and len(reasons_of(found)) == 1
    file.write_bytes(b"this is no archive")
    assert reasons_of(read_documents(str(file))) == ["corrupt"]


def test_a_zst_file_of_several_frames_is_read_to_its_end(tmp_path):
    file = tmp_path / "web.jsonl.zst"
    file.write_bytes(b"".join(zstd(lines_of([text])) for text in TEXTS))
    assert texts_of(read_documents(str(file))) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz", "a.txt.zst"])
def test_an_empty_file_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    assert reasons_of(read_documents(str(tmp_path))) == ["empty_file"]


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "good.txt").write_text("good")
    found = list(read_documents(str(tmp_path)))
    assert texts_of(found) == ["good"] and reasons_of(found) == ["invalid_utf8"]


def test_a_line_that_is_too_long_is_named_and_the_next_one_arrives(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1000)
    file = tmp_path / "web.jsonl"
    file.write_bytes(lines_of(["a", "x" * 5000, "b"]))
    found = list(read_documents(str(file)))
    assert texts_of(found) == ["a", "b"] and reasons_of(found) == ["too_long"]
    assert Counter(item.origin for item in found)[f"{file}:3"] == 1
