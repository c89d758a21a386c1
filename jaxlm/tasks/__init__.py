"""Tasks to fine-tune for: records -> features, a head, a loss, predictions, scores and a report.

A task is one file and one line here. What it must have is in docs/how_to/add_a_task.md; the shortest example is
`sequence_classification`.
"""

from jaxlm.tasks.dialogue import Dialogue
from jaxlm.tasks.embedding import Embedding
from jaxlm.tasks.multiple_choice import MultipleChoice
from jaxlm.tasks.preference import Preference
from jaxlm.tasks.question_answering import QuestionAnswering
from jaxlm.tasks.relation_classification import RelationClassification
from jaxlm.tasks.seq2seq import Seq2Seq
from jaxlm.tasks.sequence_classification import SequenceClassification
from jaxlm.tasks.token_classification import TokenClassification

TASKS = {
    "sequence_classification": SequenceClassification,
    "token_classification": TokenClassification,
    "question_answering": QuestionAnswering,
    "relation_classification": RelationClassification,
    "multiple_choice": MultipleChoice,
    "embedding": Embedding,
    "dialogue": Dialogue,
    "preference": Preference,
    "seq2seq": Seq2Seq,
}
