"""A label for each word: named entities and other spans, parts of speech, semantic roles.

    python -m jaxlm.finetune --config=configs/finetune/tagging.py:train=train.conll,dev=dev.conll,test=test.conll \\
        --config.init_from=W --workdir=F

Files: CoNLL columns (the word first, its label last), CoNLL-U, or JSONL and Parquet with lists `words` and `labels`.
Labels of spans are BIO, BIOES, BILOU, IOB1 or IO and are scored by whole entities (entity_f1); others are plain tags
(token_accuracy). Semantic roles: one record for each predicate, with `predicate`, the number of its word from 0.
BERT-base on CoNLL-2003: 92.4 F1 (arXiv:1810.04805, table 7).
"""

from ml_collections import ConfigDict

from configs.finetune.common import base


def get_config(arg: str = "") -> ConfigDict:
    """arg: 'train=FILE[,dev=FILE][,test=FILE][,label_smoothing=…][,learning_rate=…]…'."""
    task = dict(name="token_classification", label_smoothing=0.0)
    return base(task, arg, columns=("words", "labels", "predicate"))
