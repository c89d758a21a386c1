"""The roles of each task's fields, and the names that files give to them."""

from typing import NamedTuple

# The role's own name comes first and wins over the others.
NAMES: dict[str, tuple[str, ...]] = {
    "text": (
        *("text", "sentence", "sentence1", "sentence_1", "sentence_a", "premise", "review"),
        *("question", "question1", "utterance", "content", "tweet", "text1", "text_1", "text_a"),
        *("query", "anchor", "message", "comment", "comment_text", "body", "document"),
    ),
    "text_pair": (
        *("text_pair", "sentence2", "sentence_2", "sentence_b", "hypothesis", "passage"),
        *("question2", "text2", "text_2", "text_b", "positive", "paraphrase", "answer"),
    ),
    "label": (
        *("label", "labels", "intent", "category", "class", "sentiment", "target", "score", "y"),
        *("relation", "similarity", "similarity_score", "stars", "rating", "emotion", "topic"),
        *("answer", "answerkey", "answer_key", "answer_index", "correct"),
    ),
    "negative": ("negative", "hard_negative"),
    "words": ("words", "tokens", "word", "token", "form"),
    "labels": ("labels", "tags", "label", "tag", "ner_tags", "ner", "pos_tags", "pos", "upos"),
    "predicate": ("predicate", "predicate_index", "verb", "verb_index"),
    "id": ("id", "question_id", "qid", "qas_id", "guid"),
    "question": ("question", "query", "prompt", "stem", "ctx", "sent1", "goal"),
    "context": ("context", "passage", "paragraph", "document", "text"),
    "answers": ("answers", "answer", "answer_text"),
    "answer_start": ("answer_start", "answer_starts", "start"),
    "spans": ("spans", "entities"),
    "choices": ("choices", "options", "endings", "candidates"),
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "turns"),
    "instruction": ("instruction", "prompt", "question", "query"),
    "input": ("input", "context"),
    "output": ("output", "response", "answer", "completion"),
    "system": ("system", "system_prompt"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "source": (
        *("source", "src", "input", "document", "article", "text", "dialogue", "body", "code"),
        *("sentence", "source_text"),
    ),
    "target": (
        *("target", "tgt", "output", "summary", "highlights", "translation", "targets"),
        *("reference", "references", "target_text"),
    ),
    "control": ("control", "style", "control_code"),
}
_ALL_NAMES = frozenset(name for names in NAMES.values() for name in names)
_ALSO_VALUES = frozenset({"y", "positive", "negative", "correct"})  # cells of a first row of data
_OTHER_HEADERS = frozenset({"idx", "index", "title", "split", "lang", "language", "source"})


class Roles(NamedTuple):
    """inputs: every record has them. targets: training needs them. optional: used where found."""

    inputs: tuple[str, ...]
    targets: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


ROLES = {
    "sequence_classification": Roles(("text",), ("label",), ("text_pair",)),
    "token_classification": Roles(("words",), ("labels",), ("predicate",)),
    "question_answering": Roles(("question", "context"), ("answers",), ("id", "answer_start")),
    "relation_classification": Roles(("text",), ("label",), ("spans", "id")),
    "multiple_choice": Roles(("choices",), ("label",), ("question",)),
    "embedding": Roles(("text",), (), ("text_pair", "label", "negative")),
    "dialogue": Roles(("messages",)),
    "instruction": Roles(("instruction",), ("output",), ("input", "system")),
    "preference": Roles(("instruction", "chosen", "rejected"), (), ("input", "system")),
    "preference_messages": Roles(("chosen", "rejected")),
    "seq2seq": Roles(("source",), ("target",), ("control",)),
}
# Other roles of a task whose files come in two forms: those are taken where the file lacks an input of the first.
OTHER_FORMS = {"dialogue": "instruction", "preference": "preference_messages"}


def normal(name: str) -> str:
    """'Sentence 1' and 'sentence-1' are sentence_1."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def is_known_name(cell: str) -> bool:
    """Whether a header has such a cell."""
    return normal(cell) in (_ALL_NAMES | _OTHER_HEADERS) - _ALSO_VALUES
