"""The answer to a question as a span of a text, or that it has none: SQuAD v1.1 and v2.

    python -m jaxlm.finetune --config=configs/finetune/question_answering.py:train=train-v1.1.json,dev=dev-v1.1.json \\
        --config.init_from=W --workdir=F

Files: SQuAD's JSON, or CSV, JSONL and Parquet with question, context and the answer (`answers` or `answer` with
`answer_start`). Where some training questions have no answer, some predictions have none: whose score of none is more than
no_answer_threshold above that of the best answer. The report names the threshold that is best on the development file; set
it here for the next evaluation. seq_len is that of a window (question and part of the context), and a batch is that many
windows. BERT-base on SQuAD v1.1: 80.8 EM, 88.5 F1 (arXiv:1810.04805, table 2; 3 epochs, learning rate 5e-5, batch 32).
"""

from ml_collections import ConfigDict

from configs.finetune.common import base


def get_config(arg: str = "") -> ConfigDict:
    """arg: 'train=FILE[,dev=FILE][,test=FILE][,doc_stride=…][,no_answer_threshold=…][,learning_rate=…]…'."""
    task = dict(
        name="question_answering",
        # in tokens; from the start of one window to the start of the next
        doc_stride=128,
        max_question_len=64,
        max_answer_len=30,
        n_best=20,
        no_answer_threshold=0.0,
    )
    columns = ("question", "context", "answers", "answer_start")
    return base(task, arg, seq_len=384, columns=columns)
