"""Chat templates: a dialogue as text, as transformers renders it, and which of it the model itself says.

    messages   [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    text       <bos>[user]↵Hi↵[assistant]↵Hello!<eos>          by DEFAULT_TEMPLATE
    answers                               ^^^^^^^^^^^

A template comes from a model's folder, so it is somebody else's program: it runs in Jinja's sandbox, in a process of its own
(`chat_renderer`). What a message says stays text, also where it spells a special token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.tasks.chat_renderer import BEGIN, END, renderer

Message = Mapping[str, str]

DEFAULT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '[' + message.role + ']\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '\\n' if not loop.last or add_generation_prompt }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant]\\n' }}{% endif %}
"""

# Another noncharacter of Unicode: inside what a message spells like a special token. They are taken out of messages first.
GUARD = "\ufdd2"
_MARKS = re.compile(f"[{BEGIN}{END}{GUARD}]")


class Part(NamedTuple):
    """A piece of a rendered dialogue; is_answer: whether the model says it."""

    text: str
    is_answer: bool


class ChatTemplate:
    """A template and the tokenizer whose special tokens it writes.

        template = ChatTemplate(DEFAULT_TEMPLATE, tokenizer)
        ids, is_answer = template.encode(messages)          # int32 (n,), bool (n,)
        template.encode_prompt(messages)                    # int32 (m,): up to where the next answer begins

    The ids of a prompt are the first ones of the dialogue that goes on with an answer: an answer is encoded by itself.
    What of a dialogue is an answer, the template says by {% generation %}…{% endgeneration %}; for one that does not, it
    is what each of the assistant's messages adds to the dialogue before it, up to its last special token.

    end_id: the token that ends an answer.

    Raises:
      ValueError: if the template cannot be read, or cannot write a dialogue of two messages.
    """

    def __init__(self, source: str, tokenizer: Any):
        self.source, self.tokenizer = source, tokenizer
        self._names = {f"{r}_token": tokenizer.token(i) for r, i in tokenizer.roles.items()}
        self._special = {tokenizer.token(i): i for i in tokenizer.special_ids if tokenizer.token(i)}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._marks_answers = "endgeneration" in source
        self.end_id = self._find_end()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The dialogue as text, without our marks.

        Raises:
          ValueError: with what the template says of messages that it does not take.
        """
        return _MARKS.sub("", self._render(messages, add_generation_prompt))

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """The rendered dialogue, cut where an answer begins and where it ends; together they are `render(messages)`, but that
        what a message spells like a special token has a GUARD in it.

        Raises:
          ValueError: as `render` does, and if the template writes a dialogue another way once it goes on.
        """
        return self._cut(messages, self._render(messages))

    def _cut(self, messages: Sequence[Message], text: str) -> list[Part]:
        if self._marks_answers:
            spans = [m.span() for m in re.finditer(f"{BEGIN}[^{END}]*{END}", text)]
        else:
            spans = self._added_by_answers(messages, text)
        parts, done = [], 0
        for start, end in spans:
            parts += [Part(text[done:start], False), Part(text[start:end], True)]
            done = end
        parts.append(Part(text[done:], False))
        return [Part(p.text.strip(BEGIN + END), p.is_answer) for p in parts]

    def encode(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """(ids, is_answer), int32 and bool (n,), of a dialogue; raises as `parts` does."""
        parts = self.parts(messages)
        encoded = [self._encode(part.text) for part in parts]
        return np.concatenate(encoded), np.repeat(
            [p.is_answer for p in parts], [*map(len, encoded)]
        )

    def encode_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """int32 (n,): the dialogue up to where the assistant's next message begins; raises as `parts` does."""
        parts = self._cut(messages, self._render(messages, add_generation_prompt=True))
        return np.concatenate([self._encode(part.text) for part in parts])

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        guarded = [{key: self._guard(value) for key, value in m.items()} for m in messages]
        variables = dict(messages=guarded, add_generation_prompt=add_generation_prompt)
        return renderer.render(self.source, variables | self._names)

    def _guard(self, text: str) -> str:
        return self._pattern.sub(lambda m: m[0][0] + GUARD + m[0][1:], _MARKS.sub("", text))

    def _added_by_answers(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], add_generation_prompt=True)
            after = self._render(messages[: number + 1])
            if not after.startswith(before) or not text.startswith(after):
                raise ValueError(
                    f"the chat template writes the first {number} messages another way once message {number + 1} follows, "
                    "so what the answer is cannot be told: mark it there by {% generation %}…{% endgeneration %}"
                )
            special = [m.end() for m in self._pattern.finditer(after, len(before))]
            spans.append((len(before), special[-1] if special else len(after)))
        return spans

    def _encode(self, text: str) -> np.ndarray:
        """The ids of a piece: special tokens by their names, the text between them by itself."""
        ids, done = [], 0
        plain = lambda part: self.tokenizer.encode(_MARKS.sub("", part)) if part else []
        for match in self._pattern.finditer(text):
            ids += [*plain(text[done : match.start()]), self._special[match[0]]]
            done = match.end()
        return np.array([*ids, *plain(text[done:])], np.int32)

    def _find_end(self) -> int:
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            ids, is_answer = self.encode(probe)
        except ValueError as error:
            raise ValueError(f"this chat template cannot be used: {error}") from error
        answer = ids[is_answer].tolist()
        if not answer or answer[-1] not in self.tokenizer.special_ids:
            raise ValueError(
                "this chat template cannot be used: its answers do not end with a special token of the tokenizer, so "
                "that none would ever end; write {{ eos_token }} after the assistant's content"
            )
        return answer[-1]
