"""A run says in a log what it says in a terminal, in lines that a log can hold."""

import io
import logging
import os
import pty
import sys
import termios

import pytest

from jaxlm.training.progress import SHOWN, Progress, rewrites_lines

VALUES = {"loss": 3.25, "tokens_per_second": 5371.4, "mfu": 0.763, "step_seconds": 1.5}


def run(shown=True):
    with Progress(8, 10, shown) as progress:
        for step in (9, 10):
            progress.did_step(step)
            progress.logged(VALUES)
        progress.evaluated({"params": "ema", "loss": 3.5} | {f"class_{k}": 0.5 for k in range(9)})


def test_a_log_has_lines_and_no_bar(monkeypatch, caplog):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with caplog.at_level(logging.INFO, "jaxlm"):
        run()
    first, second, held_out = caplog.messages
    assert first == "step 9 of 10: loss 3.2500, 5,371 tokens/s, MFU 76.3%, 0:00:02 left"
    assert second.startswith("step 10 of 10") and second.endswith("0:00:00 left")
    assert held_out.startswith("step 10 of 10, held out: loss 3.5, class_0 0.5, ")
    assert held_out.count("class_") == SHOWN - 1 and "ema" not in held_out
    assert file.getvalue() == ""


def test_a_notebook_has_a_bar_and_a_program_that_only_knows_notebooks_has_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    import ipykernel  # noqa: F401
    import IPython

    assert not rewrites_lines()
    monkeypatch.setattr(IPython, "get_ipython", object)
    assert rewrites_lines()


def test_a_terminal_has_a_bar_and_lines_of_evaluations(monkeypatch, caplog):
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 100))
    with open(writer, "w") as terminal, caplog.at_level(logging.INFO, "jaxlm"):
        monkeypatch.setattr(sys, "stderr", terminal)
        run()
        terminal.flush()
        text = os.read(reader, 100_000).decode()
    os.close(reader)
    assert "10/10" in text and "loss 3.2500" in text and "held out: loss 3.5" in text
    assert not caplog.messages


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_where_nothing_is_asked_for(terminal, monkeypatch, caplog, capfd):
    monkeypatch.setattr("jaxlm.training.progress.rewrites_lines", lambda: terminal)
    with caplog.at_level(logging.INFO, "jaxlm"):
        run(shown=False)
    assert not caplog.messages and capfd.readouterr() == ("", "")
