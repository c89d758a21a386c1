"""A tiny model's loss falls on every objective; in a mixture each objective's own loss does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.data.pipeline import TrainBatches
from jaxlm.data.store_writer import write_store
from jaxlm.data.token_store import TokenStore
from jaxlm.models import MODELS
from jaxlm.objectives import OBJECTIVES, Mixture
from jaxlm.objectives.mixture import FOR_DECODERS, FOR_ENCODER_DECODERS
from jaxlm.tokenizers import make_tokenizer
from tests.models.tiny import MODERN, make_config

FAMILIES = {"gpt": FOR_DECODERS, "encoder_decoder": FOR_ENCODER_DECODERS}
TOKENIZER = make_tokenizer("bytes", num_sentinels=16)
SEQ_LEN = 32


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Forty repetitive documents of bytes."""
    texts = [f"def f{i}(x):\n    return x + {i}\n\n" * 4 for i in range(40)]
    path = tmp_path_factory.mktemp("text") / "store"
    write_store(path, {"train": [TOKENIZER.encode(text) for text in texts]}, TOKENIZER)
    return TokenStore(path)


def make_params(model, batch):
    """Small random parameters by numpy, which compiles nothing."""
    boxed = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(0.0, 0.1, leaf.shape), leaf.dtype)
    return jax.tree.map(draw, nn.meta.unbox(boxed))


def train(family, objective, store, rate=0.02, steps=60):
    """The metrics of each step, {name: [(total, weight), …]}: a model of one layer, 16 wide, and plain Adam."""
    model = MODELS[family](
        make_config(vocab_size=TOKENIZER.vocab_size, num_layers=1, max_len=2 * SEQ_LEN, **MODERN)
    )
    batches = TrainBatches({"x": store}, {"x": 1.0}, objective, SEQ_LEN, 16, seed=0)
    params, optimizer = make_params(model, batches[0]), optax.adam(rate)

    def loss(params, batch):
        (total, weight), metrics = objective.loss(model.apply({"params": params}, batch), batch)
        return total / weight, metrics

    @jax.jit
    def step(params, state, batch):
        gradients, metrics = jax.grad(loss, has_aux=True)(params, batch)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, metrics

    state, found = optimizer.init(params), {}
    for k in range(steps):
        params, state, metrics = step(params, state, batches[k])
        for name, pair in jax.device_get(metrics).items():
            found.setdefault(name, []).append(pair)
    return found


def check_falls(metrics, names):
    """Each mean loss of the last ten steps is a nat below that of the first two."""
    for name in names:
        pairs = np.array(metrics[name])
        first, last = (part.sum(0)[0] / part.sum(0)[1] for part in (pairs[:2], pairs[-10:]))
        assert last < first - 1, (name, first, last)


@pytest.mark.parametrize("family", [pytest.param("gpt", marks=pytest.mark.slow), "encoder_decoder"])
def test_every_objective_is_learned_in_one_mixture(store, family):
    names = FAMILIES[family]
    parts = {name: {"name": name} for name in names}
    mixture = Mixture(TOKENIZER, parts, adapt=1.0 if family == "encoder_decoder" else 0.0)
    metrics = train(family, mixture, store)
    check_falls(metrics, ["loss", *(f"{name}_loss" for name in names)])
    weights = np.array([metrics[f"{name}_weight"] for name in names])[
        ..., 0
    ]  # 0 = not in the batch
    assert (weights < 4).all() and set(weights.ravel()) <= {0.0, 1.0} or mixture.adapt


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls_on_each_objective_alone_and_not_without_training(store, family):
    for name in FAMILIES[family]:
        objective = OBJECTIVES[name](tokenizer=TOKENIZER)
        check_falls(train(family, objective, store), ["loss"])
    with pytest.raises(AssertionError):
        check_falls(train(family, objective, store, rate=0.0), ["loss"])
