"""Sentence embeddings: vectors whose cosine says how near two texts are, for search and similarity.

    python -m jaxlm.finetune --config=configs/finetune/embedding.py:train=pairs.csv --config.init_from=W --workdir=F
    python -m jaxlm.finetune --config=configs/finetune/embedding.py:train=sts.csv,loss=cosine,max_score=5.0 \\
        --config.init_from=W --workdir=F

loss: 'contrastive' learns from pairs that belong together (columns text, text_pair and, if there is one, negative), with
all other texts of the batch as negatives (arXiv:1705.00652): the larger the batch the better, and no accumulation.
'cosine' learns from pairs with a score from 0 or -max_score to max_score (arXiv:1908.10084). Temperature 0.05 is
arXiv:2104.08821's. A record's texts share seq_len.
"""

from ml_collections import ConfigDict

from configs.finetune.common import base


def get_config(arg: str = "") -> ConfigDict:
    """arg: 'train=FILE[,dev=FILE][,test=FILE][,loss=…][,pooling=mean|cls][,learning_rate=…]…'."""
    task = dict(
        name="embedding",
        loss="contrastive",
        pooling="mean",
        temperature=0.05,
        symmetric=False,
        max_score=1.0,
    )
    columns = ("text", "text_pair", "label", "negative")
    return base(task, arg, columns=columns, batch_size=64)
