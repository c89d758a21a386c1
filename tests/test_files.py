"""What is written is there whole, or not at all."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxlm.files import new_folder, write_whole


def fill(target, text, wait=lambda: None):
    with new_folder(target, last="b") as folder:
        (folder / "a").write_text(text)
        wait()
        (folder / "b").write_text(text)


def check_folder_is_whole(fill, tmp_path):
    """Of two that fill a folder at a time one wins, and nobody ever sees half of it."""
    target, half = tmp_path / "target", threading.Barrier(2)

    def look():
        half.wait(10)
        seen.append(target.exists())
        half.wait(10)

    seen = []
    others = [threading.Thread(target=fill, args=(target, text, look)) for text in "xy"]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert seen == [False, False]
    assert (target / "a").read_text() == (target / "b").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_folder_is_whole_whoever_else_makes_it(tmp_path):
    check_folder_is_whole(fill, tmp_path)


def test_the_check_fails_for_a_folder_that_is_filled_in_its_place(tmp_path):
    def in_place(target, text, wait):
        target.mkdir(exist_ok=True)
        (target / "a").write_text(text)
        wait()
        (target / "b").write_text(text)

    with pytest.raises(AssertionError):
        check_folder_is_whole(in_place, tmp_path)


def test_two_hosts_write_one_file_though_their_processes_have_one_number(tmp_path):
    """Here two threads, which have one number as well."""
    path, both = tmp_path / "a.txt", threading.Barrier(2)

    def write(text):
        write_whole(path, lambda file: (both.wait(10), file.write(text)))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, [b"one", b"two"]))
    assert path.read_bytes() in (b"one", b"two") and list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_of_a_folder_or_file_that_failed(tmp_path):
    def fail(*_):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill(tmp_path / "target", "x", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(str(tmp_path / "file"), fail)
    assert not list(tmp_path.iterdir())
