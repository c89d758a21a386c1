"""The harness without lm-eval; with it: tests/oracles/test_harness.py."""

import importlib
import subprocess
import sys

import pytest

from tests import tiny

WITHOUT = "import runpy, sys; sys.modules['lm_eval'] = None; runpy.run_module('jaxlm.harness', run_name='__main__')"


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "jaxlm.harness", raising=False)
    with pytest.raises(ImportError, match=r"needs lm-eval \(pip install 'jaxlm\[eval\]'\)"):
        importlib.import_module("jaxlm.harness")


def test_without_lm_eval_the_command_says_one_line():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=tiny.environment(), capture_output=True, text=True
    )
    assert result.returncode == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "pip install 'jaxlm[eval]'" in line
