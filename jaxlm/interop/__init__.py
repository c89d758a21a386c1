"""Hugging Face folders in and out. Names of Hugging Face live here and nowhere else.

    safetensors_io  files and folders of tensors: checked, lazy, streamed
    mapping         what a family's table is made of, and what binds it to a model
    gpt2 llama …    one module for each family or group of them: its table
    task_heads      the classes with the head of a task, by family
    arrays          the arrays of an Orbax item, read and written slice by slice
    source          a Hugging Face folder, whatever its files are, as tensors by name
    convert         from_hf, and parameters on the fly
    export          to_hf
    tokenizer_files the tokenizer's files on both sides
    parity          the certificate that every conversion writes
    hub             ids of the hub to folders

To add a family, write a `Family` (see `mapping`) in a module of its own and add it to FAMILIES:

1. `fields`: one `Field(ours, key of config.json, default)` for each option that varies; `fixed`: what it always is.
   An option that neither names must have TransformerConfig's default, and `to_hf` refuses it by name otherwise. What
   two keys say together (rope scaling, a head_dim that follows from two others) goes into `extra_from`, `extra_to` and
   `extra_fields`. What we cannot do goes into `expected`, or `extra_from` raises ValueError.
2. `rows`: one `Row(ours, theirs, transform, group)` for each tensor of theirs. The same rows convert both ways, because
   a transform is an invertible pair: SAME, FLAT, linear(), conv1d(), fused(). Rows of a head carry its group.
3. `architectures`: the classes of transformers and which groups each has. `prefix`, `ties`, `repeats`, `copies`,
   `ignored`, `zeros`, `renames`: how files spell and repeat names.
4. Classes with the head of a task: a line of `task_heads.TASKS`.
5. A case in `tests/interop/tiny_hf.py` or `tests/oracles/tiny_families.py`: the laws (every tensor equal after both ways, logits within 1e-4) run it.
"""

from jaxlm.interop.albert import ALBERT
from jaxlm.interop.bart import BART
from jaxlm.interop.bert import BERT
from jaxlm.interop.distilbert import DISTILBERT
from jaxlm.interop.electra import ELECTRA
from jaxlm.interop.gemma import GEMMA2, GEMMA3
from jaxlm.interop.gpt2 import GPT2
from jaxlm.interop.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from jaxlm.interop.mapping import BadModel, Family
from jaxlm.interop.mixtral import MIXTRAL
from jaxlm.interop.modernbert import MODERNBERT
from jaxlm.interop.qwen3_moe import QWEN3_MOE
from jaxlm.interop.roberta import ROBERTA
from jaxlm.interop.t5 import T5
from jaxlm.interop.xlnet import XLNET

# By `model_type`. An export without a named family takes the first that can express the model.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(GPT2, LLAMA, QWEN3, QWEN2, MISTRAL, GEMMA2, GEMMA3, MIXTRAL, QWEN3_MOE),
        *(BERT, ROBERTA, DISTILBERT, ELECTRA, ALBERT, MODERNBERT),
        *(T5, BART, XLNET),
    )
}


def find_family(model_type: object) -> Family:
    """Raises BadModel with the known families for any other."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise BadModel(f"unknown model_type {str(model_type)[:100]!r}: known are {known}")
    return FAMILIES[model_type]
