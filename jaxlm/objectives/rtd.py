"""Replaced-token detection: a generator fills masks, and every token is judged (ELECTRA, arXiv:2003.10555)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxlm.objectives.mlm import MaskedLM


@dataclasses.dataclass(frozen=True, eq=False)
class ReplacedTokens(MaskedLM):
    """Masked language modelling for the generator, and replaced-token detection for the discriminator.

        original         [cls] the  cat  sat  [sep]
        tokens           [cls] the [MASK] sat [sep]     as of `MaskedLM`; the rest happens on the device
        the generator's               dog               a sample, so another one in each step
        discriminator    [cls] the   dog  sat  [sep]
        head_labels        0    0     1    0    0       of all real tokens; a sample that hits the original is 0

    mask_share: the released code masks 85% of the chosen tokens and keeps the others as they are.
    discriminator_weight: of the discriminator's mean loss beside the generator's (section 3.2: 50).

    Masks, smoothing and so on: see `MaskedLM`.
    """

    mask_share: float = 0.85
    random_share: float = 0.0
    discriminator_weight: float = 50.0

    families: ClassVar[tuple[str, ...]] = ("electra",)

    def loss(self, outputs: Any, batch: dict) -> tuple[tuple, dict]:
        """((total, weight), metrics): the generator's mean loss plus the weighted mean one of the discriminator.

        A row's mean detection loss weighs as much as its masked positions together, so that both means share one
        denominator and no regrouping of rows changes the loss.

        metrics: loss, the joint one; nll and accuracy of the generator; discriminator_loss (unweighted),
        discriminator_accuracy, and of tokens called replaced: discriminator_precision (they are) and
        discriminator_recall (of those that are, how many are called so); replaced_share of all tokens.

        Raises:
          ValueError: if the model has no discriminator.
        """
        if outputs.head_logits is None or outputs.head_labels is None:
            raise ValueError("objective 'rtd': the model judges no tokens; set family to 'electra'")
        (total, weight), metrics = super().loss(outputs, batch)
        logits_BT = outputs.head_logits[..., 0].astype(jnp.float32)
        labels_BT = outputs.head_labels.astype(jnp.float32)
        real_BT = (batch["segment_ids"] > 0).astype(jnp.float32)
        losses_BT = real_BT * sigmoid_cross_entropy(logits_BT, labels_BT)
        row_weights_B = batch["weights"].astype(jnp.float32).sum(-1)
        means_B = losses_BT.sum(-1) / jnp.maximum(real_BT.sum(-1), 1.0)
        joint = (total + self.discriminator_weight * (means_B * row_weights_B).sum(), weight)
        called_BT = real_BT * (logits_BT > 0)
        hits = (called_BT * labels_BT).sum()
        count, replaced = real_BT.sum(), (real_BT * labels_BT).sum()
        judged = {
            "discriminator_loss": (losses_BT.sum(), count),
            "discriminator_accuracy": ((real_BT * (called_BT == labels_BT)).sum(), count),
            "discriminator_precision": (hits, called_BT.sum()),
            "discriminator_recall": (hits, replaced),
            "replaced_share": (replaced, count),
        }
        return joint, {**metrics, "loss": joint, **jax.lax.stop_gradient(judged)}


def sigmoid_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log of the probability of each label (0 or 1), in nats and the shape of both; large logits do not overflow."""
    return jnp.maximum(logits, 0.0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))
