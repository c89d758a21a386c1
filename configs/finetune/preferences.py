"""Answers that are preferred to others, for decoders that were tuned on instructions: direct preference optimisation.

    python -m jaxlm.finetune --config=configs/finetune/preferences.py:train=pairs.jsonl --config.init_from=F --workdir=P

Files: JSON, JSONL or Parquet with `instruction` (or prompt), `input` (may be missing), `chosen` and `rejected`; or with
`chosen` and `rejected` as lists of messages. init_from is the model to start from, and the reference: a run of
configs/finetune/instructions.py, whose chat template is taken, too. Half of seq_len is for either answer with what it
answers. Rafailov et al. 2023, arXiv:2305.18290: beta 0.1, learning rate 1e-6 with RMSprop for models of billions.
"""

from ml_collections import ConfigDict

from configs.finetune.writing import writing


def get_config(arg: str = "") -> ConfigDict:
    """arg: 'train=FILE[,dev=FILE][,test=FILE][,beta=…][,learning_rate=…]…'."""
    task = dict(
        name="preference",
        beta=0.1,
        # '' is the one that init_from was tuned with
        template="",
        system="",
        # tokens of an answer at most
        target_len=128,
        metrics="",
    )
    columns = ("instruction", "input", "system", "chosen", "rejected")
    return writing(task, arg, learning_rate=5e-6, columns=columns, seq_len=1024, dropout_rate=0.0)
