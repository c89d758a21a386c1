"""Runs over data that makes steps bad: the text is real, and so is what goes wrong.

An objective divides by how much a row's tokens differ, and there is a source whose tokens do not.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.store_writer import write_store
from jaxlm.data.token_store import TokenStore
from jaxlm.objectives.causal import CausalLM
from jaxlm.tokenizers import make_tokenizer
from tests import tiny


class PerSpread(CausalLM):
    """Next-token prediction, weighted by how much the tokens of a row differ: 0 / 0 for a row of one token."""

    def loss(self, outputs, batch):
        (total, weight), metrics = super().loss(outputs, batch)
        tokens_BT = batch["tokens"]
        spread = (tokens_BT.max(axis=1) - tokens_BT.min(axis=1)).min().astype(jnp.float32)
        total, weight = total / spread, weight / spread
        return (total, weight), {**metrics, "loss": (total, weight)}


def make_stores(folder):
    """Text, and documents of one letter each; both with the same held-out text."""
    text = tiny.make_store(folder / "text")
    tokenizer = make_tokenizer("bytes", num_sentinels=0)
    documents = [tokenizer.encode(letter * 400) for letter in "abcdefgh"]
    held_out = TokenStore(text, "validation")
    spans = map(held_out.document_span, range(held_out.num_documents))
    validation = [held_out.tokens(start + 1, stop - 1) for start, stop in spans]
    write_store(folder / "letters", {"train": documents, "validation": validation}, tokenizer)
    return text, folder / "letters"


def make_config(stores, letters=(), **overrides):
    """A tiny run on text, and on letters in the steps [first, stop) of `letters`, counted from 1."""
    text, other = stores
    weights = ["0:1,0"]
    for first, stop in letters:
        weights += [f"{first - 1}:0,1", f"{stop - 1}:1,0"]
    fields = dict(
        data__sources=(f"text={text}", f"letters={other}"),
        data__weights=tuple(weights),
        objective__name="per_spread",
        eval_every_steps=0,
        eval__num_batches=1,
        checkpoint__keep_last=10,
        log_every_steps=1,
        guards__max_bad_steps=10,
    )
    spec = "configs/gpt.py:tiny,optimizer=adamw,schedule=constant"
    return tiny.tiny_config(spec, text, **fields | overrides)


def kept(state):
    """On the host, all that a bad step must leave as it was."""
    return jax.device_get((state.params, state.opt_state, state.ema))


def same(one, other):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def check_dump(workdir, first, count, source):
    """The folder has the batch of the first bad step, and of each where its rows are from."""
    (folder,) = (workdir / "bad_steps").iterdir()
    assert folder.name == f"{first}-{first - 1}"
    said = json.loads((folder / "documents.json").read_text())
    assert [entry["step"] for entry in said] == list(range(first, first + count))
    batch = np.load(folder / "batch.npz", allow_pickle=False)
    for row in said[0]["rows"]:
        assert row["source"] == source
        start, _ = row["examples"][0]["tokens"]
        store = TokenStore(row["store"], row["split"])
        found = batch["tokens"][row["row"]][: batch["segment_ids"][row["row"]].astype(bool).sum()]
        np.testing.assert_array_equal(found, store.tokens(start, start + len(found)))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [entry["step"] for entry in metrics] == list(range(first, first + count))
    assert {entry["loss"] for entry in metrics} <= {"nan", "inf"}
