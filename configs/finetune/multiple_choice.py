"""A question with a few choices, one of which is right: reading comprehension, common sense, the next sentence.

    python -m jaxlm.finetune --config=configs/finetune/multiple_choice.py:train=swag.csv --config.init_from=W --workdir=F

Columns: question (may be missing), choices (a list, or columns such as choice0 … choice3), label (the right one by
number from 0, by letter or by its text). A record is a row of its own or packed with others, with all its choices; so
seq_len has to hold the question once for each choice. BERT-base on SWAG: 81.6 accuracy (arXiv:1810.04805, table 4;
3 epochs, learning rate 2e-5, batch size 16).
"""

from ml_collections import ConfigDict

from configs.finetune.common import base


def get_config(arg: str = "") -> ConfigDict:
    """arg: 'train=FILE[,dev=FILE][,test=FILE][,label_column=…][,learning_rate=…]…'."""
    task, columns = dict(name="multiple_choice"), ("question", "choices", "label")
    return base(task, arg, learning_rate=2e-5, columns=columns, batch_size=16, seq_len=256)
