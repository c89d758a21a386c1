"""Self-supervised objectives: each one's corruption (numpy, host) beside its loss (device)."""

from jaxlm.objectives.causal import CausalLM
from jaxlm.objectives.denoising import Denoising
from jaxlm.objectives.fim import FillInTheMiddle
from jaxlm.objectives.mixture import Mixture
from jaxlm.objectives.mlm import MaskedLM
from jaxlm.objectives.pairs import NextSentence, SentenceOrder
from jaxlm.objectives.permutation import PermutationLM
from jaxlm.objectives.prefix_lm import PrefixLM, Seq2SeqPrefixLM
from jaxlm.objectives.rtd import ReplacedTokens
from jaxlm.objectives.span_corruption import SpanCorruption
from jaxlm.objectives.ul2 import UL2

OBJECTIVES = {
    "causal": CausalLM,
    "prefix_lm": PrefixLM,
    "fim": FillInTheMiddle,
    "mlm": MaskedLM,
    "mlm_nsp": NextSentence,
    "mlm_sop": SentenceOrder,
    "rtd": ReplacedTokens,
    "permutation": PermutationLM,
    "span_corruption": SpanCorruption,
    "denoising": Denoising,
    "ul2": UL2,
    "seq2seq_prefix_lm": Seq2SeqPrefixLM,
    "mixture": Mixture,
}
