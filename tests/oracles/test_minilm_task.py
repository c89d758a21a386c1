"""The embedding task gives all-MiniLM-L6-v2's published vectors: as sentence-transformers makes them, with no parameters
above the encoder, and packed several in a row."""

import jax
import numpy as np
import pytest

from jaxlm import config_files
from jaxlm.data.examples import EvalExamples, Examples, plan_shapes
from jaxlm.data.records import Record
from jaxlm.interop import convert, parity
from jaxlm.interop.arrays import open_item
from jaxlm.models import MODELS, Head
from jaxlm.tasks.base import make_layout
from jaxlm.tasks.embedding import Embedding
from jaxlm.tokenizers import load_tokenizer
from tests.oracles.test_published_minilm import (  # noqa: F401 (fixtures)
    SENTENCES,
    published,
    their_embeddings,
    workdir,
)

pytestmark = pytest.mark.oracles


def our_vectors(workdir, packed):  # noqa: F811
    """(sentences, D) of the task's predictions; each record is a pair: a sentence and the next."""
    tokenizer = load_tokenizer(workdir / "tokenizer")
    layout = make_layout(tokenizer, 128, causal=False, num_token_types=2)
    task = Embedding(tokenizer, layout, Embedding.infer([]))
    pairs = zip(SENTENCES, SENTENCES[1:] + SENTENCES[:1], strict=True)
    rows = [Record("f", i, dict(text=a, text_pair=b)) for i, (a, b) in enumerate(pairs)]
    features = [task.features(row)[0][0] for row in rows]
    examples = Examples(features)
    shapes = plan_shapes(examples, len(rows), 0, packed=packed, seq_len=128)
    batches = EvalExamples(examples, shapes, len(rows))
    config = convert.model_config(config_files.saved_config(workdir / "config.json"))
    model = MODELS["bert"](config, head=Head(config, **task.head))
    params = parity.load_float32(open_item(workdir / "checkpoints" / "0" / "params"))
    params = {name: params[name] for name in ("embed", "layers")}
    run = jax.jit(lambda batch: task.predict(model.apply({"params": params}, batch), batch))
    batch, places = batches.laid_out(0)
    said = batches.taken_apart(places, jax.device_get(run(batch)))
    found = [task.decode(rows[i], [features[i]], [said[i]]) for i in range(len(rows))]
    np.testing.assert_allclose(  # the same sentence at another place
        [p.vectors[0] for p in found[1:]], [p.vectors[1] for p in found[:-1]], atol=1e-5
    )
    return np.stack([p.vectors[0] for p in found])


def check_vectors(ours, theirs):
    theirs = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_the_task_gives_the_published_vectors(packed, workdir, published):  # noqa: F811
    check_vectors(our_vectors(workdir, packed), their_embeddings(published))


def test_the_vectors_of_another_order_are_found(workdir, published):  # noqa: F811
    with pytest.raises(AssertionError):
        check_vectors(our_vectors(workdir, True)[::-1], their_embeddings(published))
