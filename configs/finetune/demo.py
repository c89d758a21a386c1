"""Five tasks on the standard library of the running Python, with labels that it gives for free: nothing to download.

    python -m jaxlm.finetune --config=configs/finetune/demo.py:package --config.init_from=runs/quickstart --workdir=F

variant    what (see jaxlm/data/demos.py)
package    which of 20 packages a function is from, its names hidden: classification
tokens     the kind of each token of a statement: tagging
docstring  where a function says what it does: question answering
search     the function that a docstring belongs to: embeddings
summary    the first line of a function's docstring, written from its code: summarisation (pip install 'jaxlm[eval]')

Minutes on two CPU cores from the quickstart's checkpoint. It has read the files of all splits, without these labels.
It was trained with Muon, and its weights are larger than fresh ones: AdamW learns `package` best from it at 3e-3, from
random weights (`--config.init=random`) at 1e-3.
"""

from ml_collections import ConfigDict

from configs.finetune.classification import get_config as classification
from configs.finetune.embedding import get_config as embedding
from configs.finetune.question_answering import get_config as question_answering
from configs.finetune.summarisation import get_config as summarisation
from configs.finetune.tagging import get_config as tagging

DEFAULTS = "seq_len=256,num_epochs=1,learning_rate=1e-3"
OWN_DEFAULTS = {
    "package": "pooling=mean,learning_rate=3e-3",
    "summary": "target_len=32,baseline=,metrics=chrf+rouge",
}

VARIANTS = {
    "package": classification,
    "tokens": tagging,
    "docstring": question_answering,
    "search": embedding,
    "summary": summarisation,
}


def get_config(arg: str = "package") -> ConfigDict:
    """arg: 'VARIANT[,key=value…]', with the keys of the task's own config."""
    variant, _, rest = arg.partition(",")
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    files = ",".join(f"{split}=demo:{variant}:{split}" for split in ("train", "dev", "test"))
    parts = (files, DEFAULTS, OWN_DEFAULTS.get(variant), rest)
    return VARIANTS[variant](",".join(filter(None, parts)))
