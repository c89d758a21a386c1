"""tools/make_demo.py writes files; what is in them is tested in tests/data/test_demos.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.data import demos
from tools import make_demo

ROOT = Path(__file__).resolve().parents[2]


def test_three_files_are_written_and_counted(tmp_path, capsys):
    assert make_demo.main(["package", f"--out={tmp_path / 'new' / 'demo'}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    for split, line in zip(demos.SPLITS, printed, strict=True):
        records = demos.demo_records("package", split)
        path = tmp_path / "new" / "demo" / f"{split}.jsonl"
        assert line == f"{path}: {len(records):,} records"
        written = path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(row) for row in written] == [record.fields for record in records]


def test_the_command_explains_itself_and_refuses_what_it_does_not_know():
    command = [sys.executable, str(ROOT / "tools" / "make_demo.py")]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert all(name in shown.stdout for name in demos.DEMOS)
    wrong = subprocess.run([*command, "words", "--out=x"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "docstring" in wrong.stderr


def test_a_limit_below_one_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_demo.main(["package", f"--out={tmp_path}", "--limit=0"])
    assert "found: --limit=0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
