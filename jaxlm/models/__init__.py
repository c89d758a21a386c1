"""Transformer models: pure Linen modules that name their axes and know nothing of meshes, losses or data."""

from jaxlm.models.bert import BERT
from jaxlm.models.config import TransformerConfig
from jaxlm.models.electra import ELECTRA
from jaxlm.models.encoder_decoder import EncoderDecoder
from jaxlm.models.gpt import GPT
from jaxlm.models.heads import HEADS, Head
from jaxlm.models.layers import Outputs
from jaxlm.models.xlnet import XLNet

MODELS = {
    "gpt": GPT,
    "bert": BERT,
    "encoder_decoder": EncoderDecoder,
    "electra": ELECTRA,
    "xlnet": XLNet,
}

# What models of a family are once they are pretrained, where that is another family: of ELECTRA's the discriminator stays.
BODIES = {"electra": "bert"}

__all__ = [
    "BERT",
    "BODIES",
    "ELECTRA",
    "GPT",
    "HEADS",
    "MODELS",
    "EncoderDecoder",
    "Head",
    "Outputs",
    "TransformerConfig",
    "XLNet",
]
