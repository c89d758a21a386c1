"""tools/parallel_text.py: which messages of catalogues become pairs, where they go, and what is refused."""

import zipfile

import pytest

from tools import parallel_text

polib = pytest.importorskip("polib")

ENTRIES = [
    polib.POEntry(msgid="Save this file", msgstr="Diese Datei\nsichern"),
    polib.POEntry(msgid="Not sure of this", msgstr="Geraten", flags=["fuzzy"]),
    polib.POEntry(msgid="No longer here now", msgstr="Nicht mehr da", obsolete=True),
    polib.POEntry(msgid="Not yet translated here", msgstr=""),
    polib.POEntry(msgid="Two words", msgstr="Zwei Wörter"),
    polib.POEntry(msgid="%d of the files", msgid_plural="%d files", msgstr_plural={0: "a", 1: "b"}),
]


def make_catalogue(*entries):
    catalogue = polib.POFile()
    catalogue.metadata = {"Content-Type": "text/plain; charset=utf-8"}
    catalogue.extend(entries)
    return catalogue


def make_wheel(folder, name, members):
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as wheel:
        for path, data in members.items():
            wheel.writestr(path, data)


def run(tmp_path, *flags):
    output = tmp_path / "out"
    status = parallel_text.main([f"--wheels={tmp_path}", f"--output={output}", *flags])
    return status, output


def read_pairs(output, language="de"):
    """{split: its pairs}; both sides have as many lines."""
    pairs = {}
    for split in parallel_text.SPLITS:
        sides = [(output / f"{split}.{name}").read_text("utf-8") for name in ("en", language)]
        pairs[split] = list(zip(*(side.splitlines() for side in sides), strict=True))
    return pairs


def test_only_finished_translations_of_some_length_become_pairs(tmp_path):
    members = {"p/locale/de/LC_MESSAGES/django.po": str(make_catalogue(*ENTRIES))}
    make_wheel(tmp_path, "p", members)
    status, output = run(tmp_path)
    assert status == 0
    assert sum(read_pairs(output).values(), []) == [("Save this file", "Diese Datei sichern")]


def test_written_catalogues_go_before_compiled_ones_and_earlier_packages_before_later_ones(
    tmp_path,
):
    written, compiled = (
        make_catalogue(polib.POEntry(msgid="One and the same", msgstr=word))
        for word in ("geschrieben", "übersetzt")
    )
    place = "p/locale/de/LC_MESSAGES/django"
    make_wheel(tmp_path, "b", {f"{place}.po": str(written), f"{place}.mo": compiled.to_binary()})
    other = "p/locale/de_AT/LC_MESSAGES/django.po"
    make_wheel(
        tmp_path, "c", {f"{place}.mo": compiled.to_binary(), other: str(make_catalogue(*ENTRIES))}
    )
    status, output = run(tmp_path)
    assert status == 0
    assert sum(read_pairs(output).values(), []) == [("One and the same", "geschrieben")]
    make_wheel(tmp_path, "a", {f"{place}.mo": compiled.to_binary()})
    status, output = run(tmp_path)
    assert sum(read_pairs(output).values(), []) == [("One and the same", "übersetzt")]


def test_a_package_more_moves_no_message_to_another_split(tmp_path):
    place = "p/locale/de/LC_MESSAGES/django.po"
    messages = [
        polib.POEntry(msgid=f"This is message {n}", msgstr=f"Das ist {n}") for n in range(400)
    ]
    make_wheel(tmp_path, "a", {place: str(make_catalogue(*messages[::2]))})
    few = read_pairs(run(tmp_path)[1])
    make_wheel(tmp_path, "b", {place: str(make_catalogue(*messages))})
    many = read_pairs(run(tmp_path)[1])
    assert all(set(few[split]) < set(many[split]) for split in parallel_text.SPLITS)
    assert sum(map(len, many.values())) == 400
    assert all(8 <= len(many[split]) <= 35 for split in ("dev", "test"))


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--language=fr"], "no catalogue of 'fr'"),
        (["--min_words=30"], "fewer than 30 words"),
    ],
)
def test_nothing_found_is_said_and_nothing_written(tmp_path, capsys, flags, said):
    make_wheel(tmp_path, "p", {"p/locale/de/LC_MESSAGES/django.po": str(make_catalogue(*ENTRIES))})
    status, output = run(tmp_path, *flags)
    assert status == 1 and said in capsys.readouterr().err and not output.exists()


def test_a_catalogue_that_unpacks_to_too_much_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parallel_text, "MOST_BYTES", 100)
    make_wheel(tmp_path, "p", {"p/locale/de/LC_MESSAGES/django.po": str(make_catalogue(*ENTRIES))})
    assert run(tmp_path)[0] == 1
    assert "at most 100" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", ["--packages=--index-url=http://x", "--packages=a,../b", "--language=../x"]
)
def test_names_that_are_none_are_refused(tmp_path, capsys, flag):
    with pytest.raises(SystemExit):
        run(tmp_path, flag)
    assert flag.partition("=")[0] in capsys.readouterr().err


@pytest.mark.slow  # needs a package registry
def test_a_real_package_is_fetched_and_read(tmp_path):
    output = tmp_path / "out"
    command = [f"--output={output}", "--packages=djangorestframework"]
    assert parallel_text.main(command) == 0
    pairs = read_pairs(output)
    assert len(pairs["train"]) > 50
    assert any("muss" in german for _, german in pairs["train"])
