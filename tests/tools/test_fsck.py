"""Every checkpoint and store has its line, and damage in any of them its status."""

import shutil

import pytest

from tests.fixtures import make
from tools import fsck


@pytest.fixture
def workdir(tmp_path):
    shutil.copytree(make.HERE / "checkpoint_2", tmp_path / "run")
    shutil.copytree(make.HERE / "checkpoint_1/checkpoints/3", tmp_path / "run/checkpoints/2")
    shutil.copytree(make.HERE / "store_2", tmp_path / "run/store/all")
    return tmp_path / "run"


def lines(capsys, *paths):
    """(status, the first words of each line)."""
    status = fsck.main([str(path) for path in paths])
    return status, [line.split()[:2] for line in capsys.readouterr().out.splitlines()]


def test_what_is_whole_is_ok(workdir, capsys):
    step, store = workdir / "checkpoints/3", workdir / "store/all"
    status, found = lines(capsys, workdir)
    assert status == 0
    assert found == [["ok", str(path)] for path in (step.with_name("2"), step, store)]
    assert lines(capsys, step, store) == (0, [["ok", str(step)], ["ok", str(store)]])


@pytest.mark.parametrize(
    "file, damaged",
    [
        ("checkpoints/3/manifest/metadata", "checkpoints/3"),
        ("checkpoints/3/params/_METADATA", "checkpoints/3"),
        ("checkpoints/2/ema/manifest.ocdbt", "checkpoints/2"),
        ("store/all/train-00001.tokens.npy", "store/all"),
        ("store/all/manifest.json", "store/all"),
    ],
)
def test_what_is_damaged_is_named(workdir, capsys, file, damaged):
    data = bytearray((workdir / file).read_bytes())
    data[len(data) // 2] ^= 4
    (workdir / file).write_bytes(data)
    status, found = lines(capsys, workdir)
    assert status == 65
    assert [path for state, path in found if state == "damaged"] == [str(workdir / damaged)]
    assert sum(state == "ok" for state, _ in found) == 2


def test_a_folder_of_nothing_is_an_error(tmp_path, capsys):
    assert fsck.main([str(tmp_path)]) == 1
    assert "neither checkpoints nor a token store" in capsys.readouterr().err
