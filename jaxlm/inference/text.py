"""Text of tokens as they come, up to a stop string."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

BROKEN = "\ufffd"  # what broken UTF-8 decodes to: also the first bytes of a character, until its last one is there
ANCHOR = 16  # tokens that are decoded again with the new ones
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class TextStream:
    """Turns ids into text piece by piece; what was given out is never withdrawn.

        stream = TextStream(tokenizer, stop=["\\n\\n"])
        while not stream.stopped: print(stream.push(next_ids), end="")
        print(stream.finish())

    The pieces joined are `tokenizer.decode` of all ids, cut before the first place where a stop string begins, however
    the ids were grouped. Held back until more is known: bytes that may still become a character, and text that may still
    become a stop string.

    before: ids that come before, such as a prompt's last ones; their text is not given again, but decides on the space
    between (many tokenizers drop a space at the beginning). A stop string must begin after them.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), before: Iterable[int] = ()):
        if isinstance(stop, str) or not all(stop):
            raise ValueError(f"stop={stop!r}: expected a list of strings that are not empty")
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []  # the last ones only, see `_forget`
        self._used = 0  # characters of their text that were taken
        self._pending = ""  # taken, but perhaps the beginning of a stop string
        self._take(before)
        self._pending = ""

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain with these ids."""
        if self.stopped:
            return ""
        self._take(ids)
        return self._release(at_end=False)

    def finish(self) -> str:
        """The rest, when no ids follow."""
        if self.stopped:
            return ""
        self._pending += self._tokenizer.decode(self._ids)[self._used :]
        self._ids, self._used = [], 0
        return self._release(at_end=True)

    def _take(self, ids: Iterable[int]) -> None:
        """Moves the text that ids after these cannot change to `_pending`."""
        special = (
            self._tokenizer.special_ids
        )  # they have no text, nor do they part the bytes of a character
        self._ids += [int(i) for i in ids if int(i) not in special]
        text = self._tokenizer.decode(self._settled())
        end = len(text) - text.endswith(BROKEN)
        self._pending += text[self._used : end]
        self._used = max(self._used, end)
        if end == len(text):
            self._forget(text)

    def _settled(self) -> list[int]:
        """The ids without bytes at the end: a decoder may judge a run of them as one, valid or not."""
        end = len(self._ids)
        if not self._tokenizer.is_exact:
            while end and _BYTE.fullmatch(self._tokenizer.token(self._ids[end - 1])):
                end -= 1
        return self._ids[:end]

    def _forget(self, text: str) -> None:
        """Keeps the last ids only, so that a token's cost does not grow with the text: if they alone have the same text."""
        if len(self._ids) < 2 * ANCHOR or len(self._settled()) < len(self._ids):
            return
        tail = self._tokenizer.decode(self._ids[-ANCHOR:])
        if tail.strip() and text.endswith(tail.lstrip()):
            self._ids, self._used = self._ids[-ANCHOR:], len(tail)

    def _release(self, at_end: bool) -> str:
        """What of `_pending` is before a stop string, and before what may become one."""
        text, self._pending = self._pending, ""
        longest = max(map(len, self._stop), default=0)
        for start in range(len(text)) if longest else ():
            if text.startswith(self._stop, start):
                self.stopped = True
                return text[:start]
            rest = text[start : start + longest]
            if not at_end and start + len(rest) == len(text):
                if any(stop.startswith(rest) for stop in self._stop):
                    self._pending = rest
                    return text[:start]
        return text
