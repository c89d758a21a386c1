"""Model FLOPs of a train step, counted from the sizes.

XLA's own count cannot serve: it counts the body of a loop once, and a kernel not at all. Counted are matmuls, the
attention scores among them, at 2 FLOPs for each multiply-add; elementwise work is about 1% and left out, and so is
recomputation (remat). The backward pass has two matmuls for each one of the forward pass. Attention windows save
nothing here: the reference attention computes all scores and masks them. Of experts those count that a token uses, whether
dropped or not, and the router. An encoder-decoder's cross attention counts its keys and values at the encoder's places. Heads of tasks and adapters are not counted, and
parameters that do not train count like all others.
"""

from __future__ import annotations

from jaxlm.models.config import TransformerConfig


def layer_flops(config: TransformerConfig, seq_len: int, *, causal_half: bool = False) -> float:
    """Forward FLOPs of one layer for one token.

    Scores and their sum over values are counted at all `seq_len` places, as the reference attention computes them;
    with causal_half at the average (seq_len + 1) / 2 of them, which is what a causal kernel needs.
    """
    c = config
    span = (seq_len + 1) / 2 if causal_half else seq_len
    projections = 2 * c.emb_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    attention = 2 * 2 * span * c.num_heads * c.head_dim
    mlp = 2 * c.emb_dim * c.mlp_dim * (3 if c.is_gated else 2)
    if c.num_experts:
        mlp = c.experts_per_token * mlp + 2 * c.emb_dim * c.num_experts
    return projections + attention + mlp


def cross_flops(config: TransformerConfig, target_len: int, source_len: int) -> float:
    """Forward FLOPs of one layer's cross attention for a row of the decoder."""
    c = config
    queries = target_len * 2 * 2 * c.emb_dim * c.num_heads * c.head_dim  # and the output
    keys = source_len * 2 * 2 * c.emb_dim * c.num_kv_heads * c.head_dim  # and the values
    return queries + keys + target_len * source_len * 2 * 2 * c.num_heads * c.head_dim


def forward_flops(
    config: TransformerConfig,
    batch_size: int,
    seq_len: int,
    num_predictions: int,
    causal: bool,
    *,
    causal_half: bool = False,
    target_len: int = 0,
) -> float:
    """Forward FLOPs of a batch: all layers at `seq_len` places a row, the head at `num_predictions` of them.

    causal=False is an encoder: its head has one more matmul, of D x table_dim, before the vocabulary's.
    target_len: of an encoder-decoder, the decoder's places a row, where the head is; seq_len is then the encoder's.
    """
    c, half = config, causal and causal_half
    layers = seq_len * c.num_layers * layer_flops(c, seq_len, causal_half=half and not target_len)
    if target_len:
        decoder = target_len * layer_flops(c, target_len, causal_half=half)
        layers += c.decoder.num_layers * (decoder + cross_flops(c, target_len, seq_len))
    projection = seq_len * 2 * c.embed_factor_dim * c.emb_dim
    head = 2 * c.table_dim * c.vocab_size + (0 if causal else 2 * c.emb_dim * c.table_dim)
    return float(batch_size * (projection + layers + num_predictions * head))


def train_step_flops(
    config: TransformerConfig,
    batch_size: int,
    seq_len: int,
    num_predictions: int,
    causal: bool,
    *,
    causal_half: bool = False,
    target_len: int = 0,
) -> float:
    """Model FLOPs of one train step, forward and backward; see `forward_flops`. The optimizer is not counted."""
    sizes = batch_size, seq_len, num_predictions, causal
    return 3.0 * forward_flops(config, *sizes, causal_half=causal_half, target_len=target_len)


def electra_step_flops(
    config: TransformerConfig,
    generator: TransformerConfig,
    batch_size: int,
    seq_len: int,
    num_predictions: int,
) -> float:
    """Of a train step of both parts of ELECTRA: the generator with its head, a second forward pass of that head to draw
    tokens from, and the discriminator with a dense layer on every token."""
    sizes = batch_size, seq_len
    judged = 3.0 * batch_size * seq_len * 2 * config.emb_dim * (config.emb_dim + 1)
    drawn = 2.0 * batch_size * num_predictions * generator.table_dim * generator.vocab_size
    both = train_step_flops(generator, *sizes, num_predictions, causal=False)
    return drawn + both + train_step_flops(config, *sizes, 0, causal=False) + judged


def xlnet_step_flops(
    config: TransformerConfig, batch_size: int, seq_len: int, num_predictions: int
) -> float:
    """Of a train step of XLNet: content and queries go through all layers, and meet keys at all `seq_len` places and
    at 2 `seq_len` distances; no head but the vocabulary's."""
    c, places = config, seq_len + num_predictions
    inner = c.num_heads * c.head_dim
    projections = 2 * c.emb_dim * inner * (2 * places + 2 * seq_len + 2 * seq_len / batch_size)
    scores = 2 * inner * places * seq_len * (1 + 2 + 1)
    mlp = places * 2 * c.emb_dim * c.mlp_dim * (3 if c.is_gated else 2)
    head = num_predictions * 2 * c.emb_dim * c.vocab_size
    return 3.0 * batch_size * (c.num_layers * (projections + scores + mlp) + head)
