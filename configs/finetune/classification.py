"""Texts, or pairs of texts, to classes or to a number: sentiment, intents, entailment, similarity.

    python -m jaxlm.finetune --config=configs/finetune/classification.py:train=my.csv --config.init_from=W --workdir=F
    python -m jaxlm.finetune --config=configs/finetune/classification.py:train=my.csv,label_column=intent,num_epochs=5 \\
        --config.init_from=hf:sentence-transformers/all-MiniLM-L6-v2 --workdir=F

problem: 'single_label' (one of several classes), 'multi_label' (any number of them, separated by | in a column), or
'regression' (a number).
pooling: '' is the head that the model's family has; 'mean' reads the mean of all tokens, which is better for models that
were trained so, such as all-MiniLM-L6-v2.
Learning rates from 2e-5 (large models) to 3e-4 (small ones) are usual: Devlin et al. 2018, arXiv:1810.04805, appendix A.3.
"""

from ml_collections import ConfigDict

from configs.finetune.common import base


def get_config(arg: str = "") -> ConfigDict:
    """arg: 'train=FILE[,dev=FILE][,test=FILE][,text_column=…][,problem=…][,learning_rate=…]…'."""
    task = dict(
        name="sequence_classification",
        problem="single_label",
        label_smoothing=0.0,
        class_weights="",
        pooling="",
    )
    return base(task, arg)
