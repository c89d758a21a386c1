"""Cross-entropy over a large vocabulary, without ever holding the logits of all positions."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.spread import mesh_axes, num_devices

# float32 logits that one device may hold at a time (128 MB). Below it there is a single chunk.
LOGITS_PER_DEVICE = 2**25

Pair = tuple[jax.Array, jax.Array]


class _Options(NamedTuple):
    softcap: float
    z_loss: float
    label_smoothing: float
    length: int  # positions of the last label axis in a chunk
    shards: tuple[int, int]  # of the first two label axes; each has its own gradient of the matrix


def cross_entropy(
    hidden_XD: jax.Array,
    unembed_VD: jax.Array,
    labels_X: jax.Array,
    weights_X: jax.Array,
    *,
    bias_V: jax.Array | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk_tokens: int = 0,
    groups_B: jax.Array | None = None,
    num_groups: int = 0,
) -> tuple[Pair, dict[str, Pair]]:
    """Weighted cross-entropy of softmax(softcap(hidden . unembed + bias)), in chunks.

    The gradient of a softmax needs nothing from above but a scale, so the forward pass computes it
    chunk by chunk: three matmuls in all, nothing is computed twice, and only one chunk of logits
    is alive. X stands for any label shape, (B, T) or (B, M). Matmuls run in the dtype of `hidden_XD`
    and accumulate in float32; logits, softmax and sums are float32.

    Devices that share rows, lengths or the vocabulary each make the logits of their own part. A chunk
    takes the next few positions of every device's part of the length, so all of them have work:

        length 8 on two devices      0 1 2 3 | 4 5 6 7
        the first of two chunks      0 1       4 5

    In a chunk they exchange a few numbers per position (and, for the gradient of `hidden_XD`, as much
    as that is); what each adds to the gradient of the matrix is summed once, after the last chunk.

    Per position, with logits z, label y, and q = (1 - s) onehot(y) + s / V:
        loss = -sum_v q_v log_softmax(z)_v + z_loss * logsumexp(z)^2
    (label smoothing s: Szegedy et al. 2016, section 7; z-loss: PaLM, section 5.)

    Args:
      labels_X: int ids below V, also where the weight is 0.
      weights_X: float; positions with weight 0 count for nothing.
      softcap: logits become softcap * tanh(logits / softcap); 0 = off.
      chunk_tokens: positions per chunk over all devices; 0 picks LOGITS_PER_DEVICE worth of them.
      groups_B: int ids below `num_groups`, one for each row of labels (B, T).

    Returns:
      ((total, weight), metrics): scalar float32 sums. metrics are such pairs too and carry no
      gradient: `nll` in nats, without smoothing or z-loss, and `accuracy` (tied maxima share it);
      with groups `loss_by_group`, each (num_groups,): the total and weight of the rows of each.
    """
    weight = weights_X.astype(jnp.float32).sum()
    hidden_XD, labels_X, weights_X = (
        _by_shard(x, labels_X.ndim) for x in (hidden_XD, labels_X, weights_X.astype(jnp.float32))
    )
    length = _chunk_length(labels_X.shape, unembed_VD.shape[0], chunk_tokens)
    shards = _batch_shards(labels_X.shape[0]), labels_X.shape[1]
    options = _Options(softcap, z_loss, label_smoothing, length, shards)
    sums = _sums(options, hidden_XD, unembed_VD, bias_V, labels_X, weights_X)
    total = sums[0]
    nll, correct, loss_X, count = jax.lax.stop_gradient((*sums[1:], weight))
    metrics = {"nll": (nll, count), "accuracy": (correct, count)}
    if groups_B is not None:
        is_in_GB = (groups_B[None] == jnp.arange(num_groups)[:, None]).astype(jnp.float32)
        by_row = ((loss_X * weights_X).sum((1, 2)), weights_X.sum((1, 2)))
        metrics["loss_by_group"] = tuple(is_in_GB @ x_B for x_B in jax.lax.stop_gradient(by_row))
    return (total, weight), metrics


def label_cross_entropy(
    outputs: Any, batch: Mapping[str, jax.Array], **options: Any
) -> tuple[Pair, dict[str, Pair]]:
    """`cross_entropy` of a model's `Outputs` against the batch's labels and weights; options: those of `cross_entropy`."""
    return cross_entropy(
        outputs.hidden,
        outputs.unembed,
        batch["labels"],
        batch["weights"],
        bias_V=outputs.unembed_bias,
        softcap=outputs.softcap,
        **options,
    )


def plain_cross_entropy(
    hidden_XD: jax.Array,
    unembed_VD: jax.Array,
    labels_X: jax.Array,
    weights_X: jax.Array,
    *,
    bias_V: jax.Array | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Pair, dict[str, Pair]]:
    """The definition of `cross_entropy`, with all logits at once: for tests and benchmarks."""
    logits_XV = jnp.einsum(
        "...d,vd->...v", hidden_XD, unembed_VD, preferred_element_type=jnp.float32
    )
    logits_XV = logits_XV if bias_V is None else logits_XV + _row(bias_V, logits_XV.ndim)
    logits_XV = softcap * jnp.tanh(logits_XV / softcap) if softcap else logits_XV
    log_probs_XV = jax.nn.log_softmax(logits_XV)
    nll_X = loss_X = -jnp.take_along_axis(log_probs_XV, labels_X[..., None], axis=-1)[..., 0]
    if label_smoothing:
        loss_X = (1 - label_smoothing) * nll_X - label_smoothing * log_probs_XV.mean(-1)
    if z_loss:
        loss_X = loss_X + z_loss * jax.nn.logsumexp(logits_XV, axis=-1) ** 2
    correct_X = logits_XV.argmax(-1) == labels_X
    weight = weights_X.sum()
    return ((loss_X * weights_X).sum(), weight), {
        "nll": ((nll_X * weights_X).sum(), weight),
        "accuracy": ((correct_X * weights_X).sum(), weight),
    }


def _chunk_length(shape: tuple[int, ...], vocab_size: int, chunk_tokens: int) -> int:
    """How much of the last label axis makes a chunk; chunks as equal as they can be."""
    devices = max(1, jax.sharding.get_abstract_mesh().size)
    chunk_tokens = chunk_tokens or LOGITS_PER_DEVICE * devices // vocab_size
    rows = max(1, math.prod(shape[:-1]))
    chunks = -(-shape[-1] // max(1, chunk_tokens // rows))
    return -(-shape[-1] // max(1, chunks))


def _by_shard(x: jax.Array, ndim: int) -> jax.Array:
    """X as (rows, shards of the length, positions of a shard); the end is filled up with weight 0."""
    shards = num_devices("length")
    rows, length = math.prod(x.shape[: ndim - 1]), x.shape[ndim - 1]
    size = -(-length // shards)
    x = x.reshape(rows, length, *x.shape[ndim:])
    if size * shards > length:
        x = jnp.pad(x, [(0, 0), (0, size * shards - length)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(rows, shards, size, *x.shape[2:])
    return nn.with_logical_constraint(x, ("batch", "length", *[None] * (x.ndim - 2)))


def _batch_shards(rows: int) -> int:
    """Over how many devices rows are spread, if they divide them."""
    shards = num_devices("batch")
    return shards if rows % shards == 0 else 1


def _row(x_V: jax.Array, ndim: int) -> jax.Array:
    return x_V.astype(jnp.float32).reshape((1,) * (ndim - 1) + (-1,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(options, hidden_XD, unembed_VD, bias_V, labels_X, weights_X):
    """(total, nll, correct) summed over X, and the loss (X) of each position, which has no gradient.

    Without a gradient this is one matmul per chunk.
    """
    compute_VD = _whole_rows(unembed_VD, hidden_XD.dtype)

    def chunk(hidden_XD, labels_X, weights_X):
        logits_XV = _logits(options, hidden_XD, compute_VD, bias_V)
        return (), _losses(options, logits_XV, labels_X)[0]

    _, parts = _over_chunks(chunk, options.length, hidden_XD, labels_X, weights_X)
    return (*((part_X * weights_X).sum() for part_X in parts), parts[0])


def _sums_and_gradients(options, hidden_XD, unembed_VD, bias_V, labels_X, weights_X):
    """`_sums`, and as residuals the gradients of the total."""
    compute_VD = _whole_rows(unembed_VD, hidden_XD.dtype)

    def chunk(hidden_XD, labels_X, weights_X):
        logits_XV = _logits(options, hidden_XD, compute_VD, bias_V)
        parts, lse_X = _losses(options, logits_XV, labels_X)
        grad_XV = _logits_gradient(options, logits_XV, lse_X, labels_X, weights_X)
        grad_SV = None if bias_V is None else _per_shard("rsnv->rsv", options, grad_XV)
        grad_XV = grad_XV.astype(hidden_XD.dtype)
        grad_XD = _matmul("...v,vd->...d", grad_XV, compute_VD).astype(hidden_XD.dtype)
        grad_SVD = _per_shard("rsnv,rsnd->rsvd", options, grad_XV, hidden_XD)
        return (grad_SVD, grad_SV), (grad_XD, parts)

    (grad_SVD, grad_SV), (grad_XD, parts) = _over_chunks(
        chunk, options.length, hidden_XD, labels_X, weights_X
    )
    grad_V = None if grad_SV is None else grad_SV.sum((0, 1)).astype(bias_V.dtype)
    grad_VD = _sum_shards(grad_SVD).astype(unembed_VD.dtype)
    grad_VD = nn.with_logical_constraint(grad_VD, ("vocab", "embed"))
    # Summed over devices here, before the layers' backward pass begins: XLA would rather add the embedding's gradient first and
    # hold this one, whole, until then.
    grad_VD, grad_XD = jax.lax.optimization_barrier((grad_VD, grad_XD))
    sums = (*((part_X * weights_X).sum() for part_X in parts), parts[0])
    return sums, (grad_XD, grad_VD, grad_V, parts[0])


def _scale_gradients(options, residuals, cotangents):
    """The chain rule's last step: gradients of the total times its cotangent."""
    grad_XD, grad_VD, grad_V, loss_X = residuals
    scaled = jax.tree.map(
        lambda grad: (grad * cotangents[0]).astype(grad.dtype), (grad_XD, grad_VD, grad_V, loss_X)
    )
    return *scaled[:3], None, scaled[3]


_sums.defvjp(_sums_and_gradients, _scale_gradients)


def _matmul(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _whole_rows(unembed_VD: jax.Array, dtype) -> jax.Array:
    """The matrix as chunks use it: gathered along D once, outside their loop, and by vocabulary as it lies."""
    return nn.with_logical_constraint(unembed_VD.astype(dtype), ("vocab", None))


def _per_shard(spec: str, options: _Options, *arrays_X: jax.Array) -> jax.Array:
    """An einsum within each shard (r, s) of rows and lengths; n is what is left of X.

    Summed over shards only after the last chunk: otherwise every chunk would wait for an all-reduce
    as large as the vocabulary matrix.
    """
    rows, lengths = options.shards

    def split(x):
        x = x.reshape(rows, -1, lengths, *x.shape[2:]).swapaxes(1, 2)
        return x.reshape(rows, lengths, -1, x.shape[-1])

    result = jnp.einsum(spec, *map(split, arrays_X), preferred_element_type=jnp.float32)
    if rows * lengths == 1:
        return result
    return nn.with_logical_constraint(result, ("batch", "length", "vocab", None)[: result.ndim])


def _sum_shards(grad_SVD: jax.Array) -> jax.Array:
    """The gradients of the matrix that devices have of their own rows and lengths (r, s, V, D), summed: (V, D).

    Devices that share the matrix's width each sum the part that they keep (a reduce-scatter); XLA would have all of them sum all of it.
    """
    names = ("batch", "length", "vocab", "embed")
    rows, lengths, vocab, width = map(mesh_axes, names)
    summed = rows + lengths
    width = tuple(axis for axis in width if axis in summed)
    uneven = any(n % num_devices(name) for n, name in zip(grad_SVD.shape, names, strict=True))
    if not summed or uneven:
        return grad_SVD.sum((0, 1))
    rest = tuple(axis for axis in summed if axis not in width)

    def add(part_SVD):
        part_VD = part_SVD.sum((0, 1))
        if width:
            part_VD = jax.lax.psum_scatter(part_VD, width, scatter_dimension=1, tiled=True)
        return jax.lax.psum(part_VD, rest) if rest else part_VD

    spec = jax.sharding.PartitionSpec
    return jax.shard_map(
        add,
        in_specs=spec(rows, lengths, vocab, None),
        out_specs=spec(vocab, width),
        check_vma=False,
    )(grad_SVD)


def _logits(options, hidden_XD, unembed_VD, bias_V):
    logits_XV = _matmul("...d,vd->...v", hidden_XD, unembed_VD)
    logits_XV = nn.with_logical_constraint(logits_XV, ("batch", "length", None, "act_vocab"))
    if bias_V is not None:
        logits_XV += _row(bias_V, logits_XV.ndim)
    return options.softcap * jnp.tanh(logits_XV / options.softcap) if options.softcap else logits_XV


def _at_labels(logits_XV, labels_X):
    """The label's logit of each position. Where devices share the vocabulary, as a sum: each has its own part of it."""
    if num_devices("act_vocab") == 1:
        return jnp.take_along_axis(logits_XV, labels_X[..., None], axis=-1)[..., 0]
    return jnp.where(_ids(logits_XV, labels_X) == labels_X[..., None], logits_XV, 0.0).sum(-1)


def _ids(logits_XV, labels_X):
    return jax.lax.broadcasted_iota(labels_X.dtype, logits_XV.shape, logits_XV.ndim - 1)


def _losses(options, logits_XV, labels_X):
    """((loss, nll, correct), logsumexp) of each position, float32."""
    max_X = logits_XV.max(-1)
    lse_X = max_X + jnp.log(jnp.exp(logits_XV - max_X[..., None]).sum(-1))
    label_X = _at_labels(logits_XV, labels_X)
    nll_X = loss_X = lse_X - label_X
    if options.label_smoothing:
        smooth_X = lse_X - logits_XV.mean(-1)
        loss_X = (1 - options.label_smoothing) * nll_X + options.label_smoothing * smooth_X
    if options.z_loss:
        loss_X = loss_X + options.z_loss * lse_X**2
    tied_X = (logits_XV == max_X[..., None]).sum(-1)  # cheaper than argmax on every backend
    correct_X = jnp.where(label_X == max_X, 1.0 / tied_X, 0.0)
    return (loss_X, nll_X, correct_X), lse_X


def _logits_gradient(options, logits_XV, lse_X, labels_X, weights_X):
    """d(sum of weights * loss) / d(logits before softcap), float32."""
    vocab_size = logits_XV.shape[-1]
    scale_X = 1 + 2 * options.z_loss * lse_X
    target_XV = jnp.where(
        _ids(logits_XV, labels_X) == labels_X[..., None], 1 - options.label_smoothing, 0.0
    )
    target_XV += options.label_smoothing / vocab_size
    grad_XV = scale_X[..., None] * jnp.exp(logits_XV - lse_X[..., None]) - target_XV
    if options.softcap:
        grad_XV *= 1 - (logits_XV / options.softcap) ** 2
    return grad_XV * weights_X[..., None]


def _over_chunks(chunk, length, hidden_XD, labels_X, weights_X):
    """chunk(...) -> (sums, per position) over the last axis of X: sums added up, the rest joined.

    The end is padded with weight-0 positions. One chunk makes no loop.
    """
    axis, total = labels_X.ndim - 1, labels_X.shape[-1]
    chunks = -(-total // length)
    if chunks <= 1:
        return chunk(hidden_XD, labels_X, weights_X)

    def split(x):
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, chunks * length - total)
        x = jnp.pad(x, pad).reshape(*x.shape[:axis], chunks, length, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], chunks * length, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, total, axis=axis)

    def step(sums, inputs):
        more, per_position = chunk(*inputs)
        return jax.tree.map(jnp.add, sums, more), per_position

    inputs = jax.tree.map(split, (hidden_XD, labels_X, weights_X))
    shapes, _ = jax.eval_shape(chunk, *jax.tree.map(lambda x: x[0], inputs))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, per_position = jax.lax.scan(step, zeros, inputs)
    return sums, jax.tree.map(join, per_position)
