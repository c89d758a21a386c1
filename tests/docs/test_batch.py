"""docs/batch.md is run: each block of text is what the block of Python before it prints."""

import contextlib
import io

import numpy as np

from tests.docs.walk import blocks_of
from tests.tiny import ROOT


def test_a_document_goes_the_way_that_the_page_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "")  # which the page sets
    names, printed, shown = {}, "", 0
    with np.printoptions():  # the page sets them, too
        for block in blocks_of((ROOT / "docs" / "batch.md").read_text("utf-8")):
            if block.language == "python":
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    exec(compile(block.text, "docs/batch.md", "exec"), names)
                printed = output.getvalue()
            if block.language == "text":
                assert printed == block.text
                shown += 1
    assert shown == 8
