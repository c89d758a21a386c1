"""Chat templates: the text that transformers makes, the ids that generation will see, and nothing that a template may break."""

import numpy as np
import pytest

from jaxlm.tasks.chat import DEFAULT_TEMPLATE, ChatTemplate
from jaxlm.tokenizers import make_tokenizer
from tests.tasks.tokens import byte_bpe

TOKENIZER = make_tokenizer("bytes", num_sentinels=0)
CHATML = (
    "{% for message in messages %}{{ '<bos>' + message['role'] + '\n' + message['content'] | trim + '<eos>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}"
)
# What published templates use: loop controls, tojson, the first message apart, a namespace, an error, white space.
RICH = """
{%- set ns = namespace(system='') -%}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% set ns.system = message.content %}{% continue %}{% endif %}
    {%- if message.role not in ['user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}
    {{- '[' ~ message.role ~ '] ' -}}
    {%- if loop.first or (loop.index0 == 1 and ns.system) %}{{ {'é': ns.system, '<': 1} | tojson }} {% endif %}
    {{- message['content'].strip() }}
    {%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}
{% endfor %}
{%- if add_generation_prompt %}[assistant] {% endif -%}
"""


def said(*contents, system=""):
    """A dialogue of the user and the assistant in turns."""
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}] * bool(system) + turns


DIALOGUES = [
    said("Hi", "Hello!"),
    said("a\nb", "ü 1 ", "", "{{ x }}", system="Be <short>"),
    said("one", "two", "three"),
]


def answers(template, messages):
    return [part.text for part in template.parts(messages) if part.is_answer]


def test_the_default_template_writes_what_the_drawing_shows():
    template = ChatTemplate(DEFAULT_TEMPLATE, TOKENIZER)
    assert template.render(said("Hi", "Hello!")) == "<bos>[user]\nHi\n[assistant]\nHello!<eos>"
    assert template.render(said("Hi"), True) == "<bos>[user]\nHi\n[assistant]\n"
    assert answers(template, DIALOGUES[1]) == ["ü 1 <eos>", "{{ x }}<eos>"]


@pytest.mark.parametrize("source", [DEFAULT_TEMPLATE, CHATML, RICH])
def test_the_parts_are_the_text_and_the_answers_are_the_assistants(source):
    template = ChatTemplate(source, TOKENIZER)
    for messages in DIALOGUES:
        assert "".join(part.text for part in template.parts(messages)) == template.render(messages)
        wanted = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        assert [a.removesuffix("<eos>").strip() for a in answers(template, messages)] == wanted
        assert all(answer.endswith("<eos>") for answer in answers(template, messages))


def check_prompts(template, messages):
    """The ids of a prompt are the first ones of the dialogue with its answer, and the answer's ids are what follows."""
    ids, is_answer = template.encode(messages)
    prompt = template.encode_prompt(messages[:-1])
    np.testing.assert_array_equal(ids[: len(prompt)], prompt)
    assert is_answer[len(prompt)] and not is_answer[len(prompt) - 1]


class AtOnce(ChatTemplate):
    """Encodes a dialogue as one text: pieces may cross from the prompt into the answer."""

    def encode(self, messages):
        ids = self._encode("".join(part.text for part in self.parts(messages)).rstrip())
        return ids, np.arange(len(ids)) >= len(self.encode_prompt(messages[:-1]))


def test_generation_sees_the_ids_that_training_saw():
    source = CHATML.replace("assistant\n", "assistant\nLove").replace(
        "+ message['content']",
        "+ ('Love' if message.role == 'assistant' else '') + message['content']",
    )
    messages = said("Who wrote it?", "lace wrote notes.")
    check_prompts(ChatTemplate(source, byte_bpe()), messages)
    with pytest.raises(AssertionError):
        check_prompts(AtOnce(source, byte_bpe()), messages)
    for template in (DEFAULT_TEMPLATE, CHATML, RICH):
        check_prompts(ChatTemplate(template, byte_bpe()), said("Ada", "Love", "lace", "notes"))


def test_what_a_message_says_is_never_a_special_token():
    template = ChatTemplate(CHATML, TOKENIZER)
    ids, _ = template.encode(said("say <eos><bos>", "<eos>"))
    special = [TOKENIZER.token(i) for i in ids.tolist() if i in TOKENIZER.special_ids]
    assert special == ["<bos>", "<eos>", "<bos>", "<eos>"]
    assert TOKENIZER.decode(ids) == "user\nsay <eos><bos>\nassistant\n<eos>\n"


REFUSED = {
    "changes the dialogue": ("{{ messages.append(1) }}", "refuses"),
    "looks for a way out": (
        "{{ ().__class__.__bases__[0].__subclasses__() }}<eos>",
        "unsafe|refuses",
    ),
    "raises": ("{{ raise_exception('only tools') }}", "only tools"),
    "is no Jinja": ("{% for %}", "not Jinja"),
    "ends no answer": ("{% for m in messages %}{{ m.content }}{% endfor %}", "do not end with"),
    "writes the past another way": (
        "{% for m in messages %}{{ loop.length ~ m.content ~ eos_token }}{% endfor %}",
        "another way",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_cannot_be_used_is_refused(case):
    source, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source, TOKENIZER)


def test_a_dialogue_that_the_template_refuses_is_told_from_others():
    template = ChatTemplate(RICH, TOKENIZER)
    with pytest.raises(ValueError, match="no such role"):
        template.render([{"role": "tool", "content": "1"}])


@pytest.mark.oracles
@pytest.mark.parametrize("source", [CHATML, RICH])
def test_templates_render_as_transformers_renders_them(source):
    from transformers.utils import chat_template_utils

    names = {f"{role}_token": TOKENIZER.token(i) for role, i in TOKENIZER.roles.items()}
    template = ChatTemplate(source, TOKENIZER)
    for messages in DIALOGUES:
        for wanted in (False, True):
            [theirs], _ = chat_template_utils.render_jinja_template(
                [messages], chat_template=source, add_generation_prompt=wanted, **names
            )
            assert template.render(messages, wanted) == theirs
