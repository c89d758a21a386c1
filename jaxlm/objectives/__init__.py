"""Self-supervised objectives: each one's corruption (numpy, host) beside its loss (device)."""

from jaxlm.objectives.causal import CausalLM

OBJECTIVES = {"causal": CausalLM}
