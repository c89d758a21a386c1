"""Copying, reversing and sorting: what an encoder-decoder must learn, and a small one that does."""

import flax.linen as nn
import jax
import numpy as np

from configs.common import OPTIMIZERS
from jaxlm.models import EncoderDecoder
from jaxlm.objectives.losses import cross_entropy
from jaxlm.parallel import mesh as meshes
from jaxlm.training import optimizers
from jaxlm.training.state import new_state
from jaxlm.training.step import make_train_step
from tests.models.tiny import make_config

PAD, START, END, FIRST = 0, 1, 2, 3  # ids; symbols are from FIRST on
SYMBOLS, SHORTEST, LONGEST = 26, 8, 16
TASKS = {"copy": lambda x: x, "reverse": lambda x: x[::-1], "sort": np.sort}

FIELDS = dict(
    vocab_size=32,
    emb_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    mlp_dim=128,
    max_len=LONGEST + 2,
    norm="rms_norm",
    activation="swiglu",
    init_std=0.02,
    unroll=0,
)


def draw(rng):
    """The ids of one sequence of 8 to 16 symbols."""
    length = rng.integers(SHORTEST, LONGEST + 1)
    return rng.integers(FIRST, FIRST + SYMBOLS, length).astype(np.int32)


def make_batch(task, rng, rows):
    """`rows` sequences and what the task makes of them, as a batch of an encoder-decoder."""
    batch = {
        key: np.zeros((rows, LONGEST + 1), np.int32)
        for key in ("encoder_tokens", "encoder_segment_ids", "tokens", "segment_ids", "labels")
    }
    for row in range(rows):
        source = draw(rng)
        target, n = TASKS[task](source), len(source) + 1
        batch["encoder_tokens"][row, :n] = [*source, END]
        batch["tokens"][row, :n] = [START, *target]
        batch["labels"][row, :n] = [*target, END]
        batch["encoder_segment_ids"][row, :n] = batch["segment_ids"][row, :n] = 1
    return batch | {"weights": batch["segment_ids"].astype(np.float32)}


def loss(outputs, batch):
    total, metrics = cross_entropy(
        outputs.hidden, outputs.unembed, batch["labels"], batch["weights"]
    )
    return total, {"loss": total, **metrics}


def learn(task, steps, *, rows=64, optimizer="muon", rate=0.02, seed=0, **fields):
    """(model, parameters, loss of each 50th step) after `steps` steps of `rows` new sequences each."""
    model, rng = EncoderDecoder(make_config(**FIELDS | fields)), np.random.default_rng(seed)
    boxed = jax.eval_shape(model.init, jax.random.key(0), make_batch(task, rng, 1))["params"]
    axes = meshes.logical_axes(boxed)
    options = OPTIMIZERS[optimizer] | dict(weight_decay=0.0)
    optimizer = optimizers.make_optimizer(optimizer, axes=axes, **options)
    schedule = optimizers.make_schedule(
        "linear",
        learning_rate=rate,
        num_train_steps=steps,
        warmup_steps=steps // 20,
        final_ratio=0.0,
    )
    step = jax.jit(make_train_step(model, loss, optimizer, schedule, seed=0), donate_argnums=0)

    @jax.jit
    def make_state():
        params = model.init(jax.random.key(seed), make_batch(task, np.random.default_rng(0), 1))
        return new_state(nn.meta.unbox(params["params"]), optimizer)

    state, losses, metrics = make_state(), [], None
    for index in range(steps):
        before = metrics
        state, metrics = step(state, make_batch(task, rng, rows))
        if before is not None and index % 50 == 0:
            losses.append(float(before["loss"][0] / before["loss"][1]))
    return model, state.params, losses
