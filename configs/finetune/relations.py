"""How two marked entities of a sentence are related: SemEval-2010 task 8 and the like.

    python -m jaxlm.finetune --config=configs/finetune/relations.py:train=TRAIN_FILE.TXT,test=TEST_FILE_FULL.TXT \\
        --config.init_from=W --workdir=F

Files: SemEval's own, or CSV, JSONL and Parquet with `text`, where both entities are marked <e1>…</e1> and <e2>…</e2>, or
with `text` and `spans`, two pairs [start, end) of characters; and `label`. Labels such as Cause-Effect(e1,e2) are scored
by the official macro-F1 (semeval_f1), others as classes. BERT-large: 89.25 (arXiv:1905.08284; 5 epochs, learning rate
2e-5, batch size 16).
"""

from ml_collections import ConfigDict

from configs.finetune.common import base


def get_config(arg: str = "") -> ConfigDict:
    """arg: 'train=FILE[,dev=FILE][,test=FILE][,class_weights=balanced][,learning_rate=…]…'."""
    task = dict(
        name="relation_classification",
        # before and after the first entity and the second: two signs that the tokenizer knows
        markers="$ #",
        label_smoothing=0.0,
        class_weights="",
    )
    return base(task, arg, num_epochs=5.0, columns=("text", "label", "spans"))
