"""A run's life in its workdir: how it ends is what one is told."""

import errno
import json
import os

import pytest
from ml_collections import ConfigDict

from jaxlm.exits import Damaged, NotSaved
from jaxlm.files import Appender
from jaxlm.parallel import processes
from jaxlm.workdir import begun, refuse_other_data

CONFIG = ConfigDict(dict(guards=dict(watchdog_seconds=0)))


def test_a_full_disk_ends_a_run_with_the_status_for_it(tmp_path):
    with pytest.raises(NotSaved, match="No space left on device: make room"):
        with begun(CONFIG, tmp_path):
            Appender("/dev/full").write(b"a line of metrics")


def test_other_errors_of_files_are_none_of_the_disk(tmp_path):
    with pytest.raises(FileNotFoundError):
        with begun(CONFIG, tmp_path):
            (tmp_path / "no.json").read_text()


def test_a_ledger_that_cannot_be_written_does_not_hide_why_the_run_ended(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(Damaged, match="the reason"):
        with begun(CONFIG, tmp_path):
            monkeypatch.setattr(Appender, "write", fail)
            raise Damaged("the reason")


@pytest.mark.parametrize(
    "other, says",
    [
        (dict(data={"a": "1234"}), r"data of a \(fingerprint\): 1234 -> abcd"),
        (dict(dtype="bfloat16"), "dtype: bfloat16 -> float32"),
        (dict(tokenizer_sha256="00"), r"tokenizer \(sha256\): 00 -> ff"),
    ],
)
def test_a_process_that_has_read_other_data_than_the_first_is_refused(other, says, monkeypatch):
    mine = dict(data={"a": "abcd"}, dtype="float32", tokenizer_sha256="ff")
    first = mine
    monkeypatch.setattr(processes, "gather", lambda name, text: [json.dumps(first), text])
    refuse_other_data(mine)
    first = mine | other
    with pytest.raises(ValueError, match=says):
        refuse_other_data(mine)


def test_every_start_is_a_life_in_the_ledger(tmp_path):
    for _ in range(3):
        with begun(CONFIG, tmp_path):
            pass
    lines = (tmp_path / "goodput.jsonl").read_text().splitlines()
    assert [json.loads(line)["life"] for line in lines] == [0, 1, 2]
