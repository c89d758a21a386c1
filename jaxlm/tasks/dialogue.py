"""Instructions and dialogues: the model learns what the assistant says in them.

    all        <bos> [user]↵ Hi ↵ [assistant]↵ Hello ! <eos> ↵ [user]↵ …
    tokens     <bos> [user]↵ Hi ↵ [assistant]↵ Hello !  <eos>  …
    labels     [user]↵ Hi ↵ [assistant]↵ Hello ! <eos>   ↵     …
    weights      0     0  0     0           1   1   1    0     …     1: the next token is of an answer

The text around is the chat template's (`jaxlm.tasks.chat`). Every answer of a dialogue counts, and each sees all that was said
before it; what follows the last one is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.tasks.base import Feature
from jaxlm.tasks.chat import ChatTemplate, Message
from jaxlm.tasks.writing import Writer, WritingTask, next_tokens


class Dialogue(WritingTask):
    """Dialogues (`messages`), or instructions with an input and an output, to the assistant's answers.

    template: '' for the one of the tokenizer's folder, or our own where it has none; else a file with another.
    system: what the system says in dialogues where it says nothing; '' for nothing.
    target_len: tokens of an answer at most when one is written.

    What is longer than seq_len loses its oldest tokens, but for target_len before the last answer, then the end of that
    answer.
    """

    kind = "dialogue"
    families = ("gpt",)

    def __init__(
        self,
        tokenizer: Any,
        writer: Writer,
        fitted: Mapping[str, Any],
        *,
        template: str = "",
        system: str = "",
        **options: Any,
    ):
        super().__init__(tokenizer, writer, fitted, **options)
        self.template = ChatTemplate(writer.template, tokenizer)
        self.end_id, self.system = self.template.end_id, system

    def problem(self, record: Any, training: bool) -> str:
        """Why a record cannot be used, or ''."""
        try:
            messages = self.messages(record)
            if training and not any(m["role"] == "assistant" for m in messages):
                return "no message is the assistant's, so there is no answer to learn"
            self.template.parts(messages)
        except ValueError as error:
            return str(error)
        return ""

    def messages(self, record: Any) -> list[Message]:
        """The dialogue of a record, with the system's words.

        Raises:
          ValueError: if it has none.
        """
        fields = record.fields
        if "messages" in fields:
            messages = list(fields["messages"])
        elif asked := str(fields.get("instruction") or fields.get("text") or "").strip():
            given = str(fields.get("input") or "").strip()
            messages = [{"role": "user", "content": f"{asked}\n\n{given}" if given else asked}]
            if fields.get("system"):
                messages.insert(0, {"role": "system", "content": fields["system"]})
            if fields.get("output"):
                messages.append({"role": "assistant", "content": fields["output"]})
        else:
            raise ValueError("there is no instruction and no message")
        if self.system and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        if not messages:
            raise ValueError("there is no message")
        return messages

    def features(self, record: Any) -> tuple[list[Feature], bool]:
        """One feature: the dialogue, with weights on the assistant's words; and whether it was cut."""
        ids, is_answer = self.template.encode(self.messages(record))
        kept = fit(is_answer, self.writer.seq_len + 1, self.target_len)
        was_cut = kept.start > 0 or bool(is_answer[kept.stop :].any())
        # Of an answer whose beginning was cut off nothing is learned: what it answers is gone.
        is_learned = is_answer[kept] & (np.cumsum(~is_answer[kept]) > 0)
        return [next_tokens(ids[kept], is_learned)], was_cut

    def prompt(self, record: Any) -> np.ndarray:
        """The ids (n,) before the last answer, with room for another."""
        ids = self.template.encode_prompt(split_answer(self.messages(record))[0])
        return ids[-(self.writer.seq_len - self.target_len) :]

    def reference(self, record: Any) -> list[str]:
        """The last answer, if there is one."""
        answer = split_answer(self.messages(record))[1]
        return [answer] if answer else []


def split_answer(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """(what was said before the last answer, that answer), which is '' where the last message is not the assistant's."""
    if messages[-1]["role"] == "assistant":
        return list(messages[:-1]), messages[-1]["content"]
    return list(messages), ""


def fit(is_answer: np.ndarray, room: int, target_len: int) -> slice:
    """Which of n tokens are kept: at most `room`, up to the last one that is to be learned. is_answer: bool (n,).

    The oldest go first, but `room - target_len` before the last answer stay; then the end of that answer.
    """
    answers = np.flatnonzero(is_answer)
    end = int(answers[-1]) + 1 if len(answers) else len(is_answer)
    others = np.flatnonzero(~is_answer[:end])
    last_start = int(others[-1]) + 1 if len(others) else 0
    start = min(max(0, end - room), max(0, last_start - (room - target_len)))
    return slice(start, min(end, start + room))
