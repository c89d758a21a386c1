"""The sizes and options of a Transformer, and how it is run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from jaxlm.models.layers import ACTIVATIONS, GATED

NORMS = ("layer_norm", "rms_norm")
NORM_POSITIONS = ("pre", "post", "sandwich")
POSITIONS = ("learned", "sinusoidal", "rotary", "relative", "none")
PROJECTIONS = ("query", "key", "value", "out", "up", "gate", "down")  # that adapters can have
NOT_NEGATIVE = (
    "position_offset",
    "embed_factor_dim",
    "rope_local_theta",
    "query_scale",
    "embed_init_std",
    "logit_scale",
    "num_decoder_layers",
    "pipeline_micro_batches",
)
REMATS = ("none", "attention", "dots", "full")
# How a model is run: these never change the parameters, or what is computed from them.
EXECUTION = (
    "dtype",
    "param_dtype",
    "remat",
    "unroll",
    "attention_kernel",
    "pipeline_micro_batches",
    "merge_rows",
)


def unlike(config: TransformerConfig, always: Mapping[str, Any]) -> list[str]:
    """A line for each option of `config` that is not what a family always has."""
    return [
        f"{name}={getattr(config, name)!r}: set it to {value!r}"
        for name, value in always.items()
        if getattr(config, name) != value
    ]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """One Block's options, orthogonal to each other; the same for decoders and encoders.

    attention_windows: how far the layers see, repeated over them: (4096, 0) is a layer that sees itself and 4,095
    places behind (in an encoder also ahead), then one that sees everything, and so on; () is (0,).
    rope_local_theta: rope_theta of the layers with a window, which then know no rope_scaling; 0 means the same as all.
    rope_scaling: see `layers.rotary_frequencies`. position_offset: rows of the position table before position 0.
    relative_buckets, relative_max_distance: of the biases of position='relative' (`relative`).
    norm_bias applies to layer norms only. norm_scale_offset: norms multiply by this plus their `scale`.
    first_norm False: the first layer's attention reads its input as it is (ModernBERT, whose embeddings are normed).
    query_scale: what q k is multiplied by; 0 means 1 / sqrt(head_dim).
    scale_embeddings: token embeddings are multiplied by the root of their width (arXiv:1706.03762, section 3.4).
    embed_norm: a norm after the embeddings (BART; BERT has one whatever this says). embed_init_std: of the token
    table; 0 means init_std. logit_scale: what logits are multiplied by; 0 means 1.
    num_decoder_layers: of an encoder-decoder, whose encoder has num_layers; 0 means as many.
    embed_factor_dim: width of the embedding tables, which a matrix then brings to emb_dim (arXiv:1909.11942,
    section 3.1); 0 means emb_dim and no matrix. share_layers: one layer's parameters serve all (ibid.).
    num_experts: of the MLP of each layer, 0 for one that serves all tokens; each is mlp_dim wide, and a token uses
    experts_per_token of them. normalise_router: their weights sum to 1. expert_capacity_factor: room for tokens in
    training, 0 drops none; router_aux_weight, router_z_weight: of the losses that the router adds (`moe`).
    num_token_types 0 means none. zero_init_out starts every block as the identity.
    lora_rank: of the adapters that the projections `lora_targets` have, times lora_alpha / lora_rank (`lora`); 0: none.
    Execution (never changes the parameters): dtype is the compute dtype; unroll 0 means all layers; remat says
    what is recomputed in the backward pass: nothing; attention's scores; all but the matmul outputs; the whole layer.
    pipeline_micro_batches: that pass through the mesh's stages, if it has several (`pipeline`); 0 chooses.
    merge_rows: matmuls take batch and length as one axis, for CPUs (`layers.project`).
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
    norm_scale_offset: float = 0.0
    first_norm: bool = True
    position: str = "learned"
    position_offset: int = 0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    rope_theta: float = 10000.0
    rope_scaling: tuple[float, ...] = ()
    rope_local_theta: float = 0.0
    activation: str = "gelu_tanh"
    attention_windows: tuple[int, ...] = ()
    query_scale: float = 0.0
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = True
    scale_embeddings: bool = False
    embed_norm: bool = False
    embed_init_std: float = 0.0
    logit_scale: float = 0.0
    embed_factor_dim: int = 0
    share_layers: bool = False
    num_decoder_layers: int = 0
    num_experts: int = 0
    experts_per_token: int = 2
    normalise_router: bool = True
    expert_capacity_factor: float = 0.0
    router_aux_weight: float = 0.0
    router_z_weight: float = 0.0
    num_token_types: int = 0
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    zero_init_out: bool = False
    init_std: float = 0.02
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ("query", "value")
    # execution
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    attention_kernel: str = "xla"
    pipeline_micro_batches: int = 0
    merge_rows: bool = True

    def __post_init__(self) -> None:
        problems = find_problems(self)
        if problems:
            raise ValueError("TransformerConfig:\n  " + "\n  ".join(problems))

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layers multiply by a gate."""
        return self.activation in GATED

    @property
    def table_dim(self) -> int:
        """Width of the embedding tables, and of what is multiplied with the output table."""
        return self.embed_factor_dim or self.emb_dim

    @property
    def decoder(self) -> TransformerConfig:
        """Of an encoder-decoder's decoder alone; of any other model, itself."""
        layers = self.num_decoder_layers
        if layers in (0, self.num_layers):
            return self
        return dataclasses.replace(
            self, num_layers=layers, num_decoder_layers=0, unroll=min(self.unroll, layers)
        )

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """The attention window of every layer; 0 sees everything."""
        return tuple(
            itertools.islice(itertools.cycle(self.attention_windows or (0,)), self.num_layers)
        )


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
    if config.position == "sinusoidal" and config.table_dim % 2:
        name = "embed_factor_dim" if config.embed_factor_dim else "emb_dim"
        problems.append(f"{name}={config.table_dim}: sinusoidal positions need an even one")
    if config.norm == "rms_norm" and config.norm_bias:
        problems.append(
            "norm_bias=True with norm='rms_norm': RMS norm has no bias, set it to False"
        )
    if len(config.rope_scaling) not in (0, 1, 4):
        problems.append(
            f"rope_scaling={config.rope_scaling}: (), (factor,) or (factor, low, high, original_len)"
        )
    if len(config.attention_windows) > config.num_layers:
        problems.append(
            f"attention_windows={config.attention_windows}: at most num_layers={config.num_layers} of them"
        )
    if any(window < 0 for window in config.attention_windows):
        problems.append(f"attention_windows={config.attention_windows}: 0 (no limit) or more")
    for field in NOT_NEGATIVE:
        if getattr(config, field) < 0:
            problems.append(f"{field}={getattr(config, field)}: must be at least 0")
    if not config.first_norm and config.norm_position == "post":
        problems.append(
            "first_norm=False with norm_position='post': there is no norm before attention, set it to True"
        )
    for field in ("dropout_rate", "attention_dropout_rate"):
        if not 0.0 <= getattr(config, field) < 1.0:
            problems.append(f"{field}={getattr(config, field)}: must be in [0, 1)")
    if not 0 <= config.unroll <= config.num_layers:
        problems.append(f"unroll={config.unroll}: 0 (all) to num_layers={config.num_layers}")
    problems += find_relative_problems(config)
    return problems + find_expert_problems(config) + find_adapter_problems(config)


def find_relative_problems(config: TransformerConfig) -> list[str]:
    """What is wrong with the buckets of relative positions, where there are some."""
    buckets, furthest = config.relative_buckets, config.relative_max_distance
    problems: list[str] = []
    if config.position != "relative":
        return problems
    if buckets < 4 or buckets % 4:
        problems.append(
            f"relative_buckets={buckets}: a multiple of 4, for near and far ones ahead and behind"
        )
    if furthest <= buckets // 2:
        problems.append(
            f"relative_max_distance={furthest}: more than relative_buckets / 2, the distances with a bucket each"
        )
    return problems


def find_expert_problems(config: TransformerConfig) -> list[str]:
    """What is wrong with the mixture of experts, or with its options where there is none."""
    c, problems = config, []
    for field in ("num_experts", "expert_capacity_factor", "router_aux_weight", "router_z_weight"):
        if getattr(c, field) < 0:
            problems.append(f"{field}={getattr(c, field)}: must be at least 0")
    if c.num_experts <= 0:
        for field in ("expert_capacity_factor", "router_aux_weight", "router_z_weight"):
            if getattr(c, field) > 0:
                problems.append(
                    f"{field}={getattr(c, field)} without experts: set it to 0, or num_experts"
                )
        return problems
    if not 1 <= c.experts_per_token <= c.num_experts:
        problems.append(
            f"experts_per_token={c.experts_per_token}: 1 to num_experts={c.num_experts}"
        )
    if c.mlp_bias:
        problems.append("mlp_bias=True with num_experts: experts have no biases, set it to False")
    if c.lora_rank and (found := {"up", "gate", "down"} & set(c.lora_targets)):
        problems.append(
            f"lora_targets has {sorted(found)}: experts have no adapters; name some of query, key, value, out"
        )
    return problems


def find_adapter_problems(config: TransformerConfig) -> list[str]:
    """What is wrong with the adapters, where there are some."""
    c, problems = config, []
    if c.lora_rank < 0:
        problems.append(f"lora_rank={c.lora_rank}: 0 (no adapters) or more")
    if c.lora_rank <= 0:
        return problems
    if c.lora_alpha <= 0:
        problems.append(f"lora_alpha={c.lora_alpha}: must be over 0, or the adapters do nothing")
    if not c.lora_targets:
        problems.append(f"lora_targets=(): name some of {', '.join(PROJECTIONS)}, or lora_rank=0")
    if unknown := [name for name in c.lora_targets if name not in PROJECTIONS]:
        problems.append(f"lora_targets has {unknown}: use some of {', '.join(PROJECTIONS)}")
    if "gate" in c.lora_targets and not c.is_gated:
        problems.append(
            f"lora_targets has 'gate': activation={c.activation!r} has no gate, remove it"
        )
    return problems
