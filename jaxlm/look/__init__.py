"""Looking into a trained model: attention maps, embeddings laid out on a plane, and linear probes of its layers.

    lm = api.load("W")
    (found,) = look.attention_maps(lm, "def f(x):")
    look.draw_attention(found, layer=0).savefig("attention.png")

Each kind has a function that computes and one that draws a matplotlib Figure, which a notebook shows as it is.
"""

from jaxlm.look.attention import AttentionMap, attention_maps, draw_attention
from jaxlm.look.probes import Probe, check_labels, draw_probe, layer_states, probe, probe_states
from jaxlm.look.projection import Projection, draw_projection, project, token_vectors

__all__ = [
    "AttentionMap",
    "Probe",
    "Projection",
    "attention_maps",
    "check_labels",
    "draw_attention",
    "draw_probe",
    "draw_projection",
    "layer_states",
    "probe",
    "probe_states",
    "project",
    "token_vectors",
]
