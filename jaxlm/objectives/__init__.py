"""Self-supervised objectives: each one's corruption (numpy, host) beside its loss (device)."""

from jaxlm.objectives.causal import CausalLM
from jaxlm.objectives.mlm import MaskedLM
from jaxlm.objectives.pairs import NextSentence, SentenceOrder
from jaxlm.objectives.permutation import PermutationLM
from jaxlm.objectives.rtd import ReplacedTokens
from jaxlm.objectives.span_corruption import SpanCorruption

OBJECTIVES = {
    "causal": CausalLM,
    "mlm": MaskedLM,
    "mlm_nsp": NextSentence,
    "mlm_sop": SentenceOrder,
    "rtd": ReplacedTokens,
    "permutation": PermutationLM,
    "span_corruption": SpanCorruption,
}
