"""The sizes and options of a Transformer, and how it is run."""

from __future__ import annotations

import dataclasses

from jaxlm.models.layers import ACTIVATIONS, GATED

NORMS = ("layer_norm", "rms_norm")
NORM_POSITIONS = ("pre", "post")
POSITIONS = ("learned", "sinusoidal", "rotary", "none")
REMATS = ("none", "attention", "dots", "full")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """One Block's options, orthogonal to each other; the same for decoders and encoders.

    norm_bias applies to layer norms only. rope_scaling: see `layers.rotary_frequencies`.
    num_token_types 0 means none. zero_init_out starts every block as the identity.
    Execution (never changes the parameters): dtype is the compute dtype; unroll 0 means all layers; remat says
    what is recomputed in the backward pass: nothing; attention's scores; all but the matmul outputs; the whole layer.
    """

    vocab_size: int
    emb_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_len: int
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    norm_position: str = "pre"
    position: str = "learned"
    rope_theta: float = 10000.0
    rope_scaling: tuple[float, ...] = ()
    activation: str = "gelu_tanh"
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = True
    num_token_types: int = 0
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    zero_init_out: bool = False
    init_std: float = 0.02
    # execution
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    attention_kernel: str = "xla"

    def __post_init__(self) -> None:
        problems = find_problems(self)
        if problems:
            raise ValueError("TransformerConfig:\n  " + "\n  ".join(problems))

    @property
    def is_gated(self) -> bool:
        return self.activation in GATED


def find_problems(config: TransformerConfig) -> list[str]:
    """Everything that is wrong with `config`, each with what was found and what to change."""
    problems = []
    choices = {
        "norm": NORMS,
        "norm_position": NORM_POSITIONS,
        "position": POSITIONS,
        "activation": tuple(ACTIVATIONS),
        "remat": REMATS,
    }
    for field, known in choices.items():
        if (value := getattr(config, field)) not in known:
            problems.append(f"{field}={value!r}: use one of {', '.join(known)}")
    sizes = "vocab_size emb_dim num_layers num_heads num_kv_heads head_dim mlp_dim max_len".split()
    for field in sizes:
        if getattr(config, field) < 1:
            problems.append(f"{field}={getattr(config, field)}: must be at least 1")
    if config.num_kv_heads > 0 and config.num_heads % config.num_kv_heads:
        problems.append(
            f"num_heads={config.num_heads} is not a multiple of num_kv_heads={config.num_kv_heads}: "
            "every kv head serves the same number of heads"
        )
    if config.position == "rotary" and config.head_dim % 2:
        problems.append(f"head_dim={config.head_dim}: rotary positions need an even one")
    if config.position == "sinusoidal" and config.emb_dim % 2:
        problems.append(f"emb_dim={config.emb_dim}: sinusoidal positions need an even one")
    if config.norm == "rms_norm" and config.norm_bias:
        problems.append(
            "norm_bias=True with norm='rms_norm': RMS norm has no bias, set it to False"
        )
    if len(config.rope_scaling) not in (0, 4):
        problems.append(
            f"rope_scaling={config.rope_scaling}: () or (factor, low, high, original_len)"
        )
    for field in ("dropout_rate", "attention_dropout_rate"):
        if not 0.0 <= getattr(config, field) < 1.0:
            problems.append(f"{field}={getattr(config, field)}: must be in [0, 1)")
    if not 0 <= config.unroll <= config.num_layers:
        problems.append(f"unroll={config.unroll}: 0 (all) to num_layers={config.num_layers}")
    return problems
