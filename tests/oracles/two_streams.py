"""XLNet's two streams in a tiny model: a batch with an order, and what transformers makes of it.

python -m tests.oracles.two_streams        writes xlnet.json (needs torch and transformers)
"""

import json
from pathlib import Path

import numpy as np

from tests.oracles import tiny_families as families
from tests.oracles.tiny_models import random_weights

PATH = Path(__file__).parent / "xlnet.json"
PLACES = np.array([[2, 3, 7, 11], [0, 9, 10, 19]], np.int32)
ORDER = np.array([[3, 1, 4, 2], [2, 4, 1, 3]], np.int32)


def make_batch(use_types=True):
    """Places to predict with their order, and two token types; the first row ends in padding."""
    batch = families.make_batch(2 if use_types else 0)
    order = np.zeros_like(batch["tokens"])
    np.put_along_axis(order, PLACES, ORDER, axis=1)
    return batch | {"masked_positions": PLACES, "order": order}


def run_theirs(batch):
    """(weights by name, logits (B, M, V)) of transformers' model."""
    import torch

    from tests.oracles import record_logits

    model = record_logits.make_family_model(families.Twin("xlnet"))
    named = dict(model.named_parameters())
    weights = random_weights({name: tuple(p.shape) for name, p in named.items()})
    order = batch["order"]
    context = order == 0  # sees context alone; a place to predict also what is before it
    rank = np.where(context, 0, order)
    hidden = (rank[:, None, :] >= np.maximum(rank, 1)[:, :, None]).astype(np.float32)
    mapping = (np.arange(order.shape[1]) == PLACES[..., None]).astype(np.float32)
    about = dict(perm_mask=hidden, target_mapping=mapping)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(weights[name]))
        out = model(
            input_ids=torch.from_numpy(batch["tokens"]).long(),
            attention_mask=torch.from_numpy(batch["segment_ids"]).float(),
            token_type_ids=torch.from_numpy(batch["token_types"]).long()
            if "token_types" in batch
            else None,
            **{name: torch.from_numpy(array) for name, array in about.items()},
        )
    return weights, out.logits.numpy()


if __name__ == "__main__":
    _, logits = run_theirs(make_batch())
    rows = [
        [float(f"{x:.6g}") for x in row] for row in logits.reshape(-1, logits.shape[-1])[:, :12]
    ]
    PATH.write_text(json.dumps(rows) + "\n", encoding="utf-8")
