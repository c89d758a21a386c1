"""The certificate of a conversion: our model and theirs give the same numbers, and every tensor comes back as it was.

It is written as `parity.json`; a conversion whose certificate does not hold is undone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from jaxlm.interop.arrays import Array, read_theirs
from jaxlm.interop.mapping import Piece
from jaxlm.interop.source import Source
from jaxlm.models import Head, TransformerConfig, XLNet
from jaxlm.models.encoder_decoder import EncoderDecoder, Stack
from jaxlm.models.transformer import make_norm

TOLERANCE = 1e-4  # of |difference|, relative to the largest value where that is over 1
# By the key of MODELS, the class of transformers that predicts tokens.
AUTO_LM = {
    "gpt": "AutoModelForCausalLM",
    "bert": "AutoModelForMaskedLM",
    "encoder_decoder": "AutoModelForSeq2SeqLM",
    "xlnet": "AutoModelForCausalLM",
}
AGAINST = ("auto", "transformers", "round_trip")
TEXTS = (
    "Nobody starts from nothing: a published model comes in, and one's own goes out.",
    "def area(width, height):\n    return width * height  # in m²\n",
)
Params = Any


class Failed(RuntimeError):
    """A certificate that does not hold; the message says where."""


def certify(
    source: Source,
    arrays: Mapping[str, Array],
    pieces: Sequence[Piece],
    *,
    model: nn.Module,
    tokenizer: Any,
    against: str = "auto",
) -> dict[str, Any]:
    """Compares a Hugging Face folder with our stored arrays; returns what parity.json says.

    pieces: those that both sides have. model: ours, in float32.
    against: 'transformers' compares the outputs on fixed text, 'round_trip' the tensors only; 'auto' is the first where
      transformers and torch are installed and memory holds three copies of the model in float32, else the second.

    Raises:
      Failed: if they differ.
    """
    if against not in AGAINST:
        raise ValueError(f"against={against!r}: use one of {', '.join(AGAINST)}")
    certificate: dict[str, Any] = {"round_trip": compare_tensors(source, arrays, pieces)}
    size = sum(int(np.prod(array.shape)) for array in arrays.values())
    if against == "auto":
        against = (
            "transformers" if _has_transformers() and 12 * size < _free_bytes() else "round_trip"
        )
    certificate["against"] = against
    if against == "transformers":
        version = importlib.metadata.version("transformers")
        certificate["against"] = f"transformers {version}"
        certificate |= compare_outputs(source, arrays, pieces, model, tokenizer)
    problems = list(certificate["round_trip"]["different"][:50])
    if not certificate.get("passed", True):
        problems.append(summary(certificate))
    certificate["passed"] = not problems
    if problems:
        raise Failed("the converted model is not the original:\n  - " + "\n  - ".join(problems))
    return certificate


def write(certificate: Mapping[str, Any], path: Path) -> None:
    """Writes a certificate as JSON."""
    path.write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")


def summary(certificate: Mapping[str, Any]) -> str:
    """One line for people."""
    count = certificate["round_trip"]["tensors"]
    if "max_abs_difference" not in certificate:
        return f"{count} tensors equal bit by bit after the way there and back"
    c = certificate
    layer = c["first_diverging_layer"]
    where = "" if layer is None else f"; the first layer that diverges is {layer}"
    return (
        f"against {c['against']}: max |Δ{c['compared']}| {c['max_abs_difference']:.2g} "
        f"(largest {c['max_abs_value']:.3g}), mean {c['mean_abs_difference']:.2g}, top-1 agreement "
        f"{c['top1_agreement']:.4f}, KL {c['kl']:.2g}; {count} tensors equal{where}"
    )


def compare_tensors(
    source: Source, arrays: Mapping[str, Array], pieces: Sequence[Piece]
) -> dict[str, Any]:
    """sha256 of every tensor of theirs and of what our arrays give for it, in the narrower of the two dtypes."""
    total, different = hashlib.sha256(), []
    for piece in pieces:
        theirs, ours = source.tensors[piece.name].read(), read_theirs(piece, arrays)
        if theirs.dtype.itemsize < ours.dtype.itemsize:
            ours = ours.astype(theirs.dtype)
        else:
            theirs = theirs.astype(ours.dtype, copy=False)
        wanted, got = (_sha256(array) for array in (theirs, ours))
        if wanted != got:
            different.append(f"{piece.name}: sha256 {got[:16]}…, expected {wanted[:16]}…")
        total.update(f"{piece.name} {got}\n".encode())
    return {"tensors": len(pieces), "different": different, "sha256": total.hexdigest()}


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


def _has_transformers() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def _free_bytes() -> float:
    """MemAvailable, where the system says it."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return float("inf")
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


# --- outputs ----------------------------------------------------------------------------------------------------------


def make_batch(
    tokenizer: Any, vocab_size: int, max_len: int, pad_id: int = 0
) -> dict[str, np.ndarray]:
    """Rows of text (if there is a tokenizer) and of random ids, of several lengths: tokens and segment_ids (B, T).

    Only padding is `pad_id`: some of transformers' models find a row's end, or count positions, by that.
    """
    rng, length = np.random.default_rng(0), min(48, max_len)
    others = np.delete(np.arange(vocab_size), pad_id) if vocab_size > 1 else np.zeros(1, np.int64)
    rows = [rng.choice(others, size) for size in (length, max(1, length // 2))]
    if tokenizer is not None:
        ids = [np.append(tokenizer.bos_id, tokenizer.encode(text))[:length] for text in TEXTS]
        rows += [row[(row < vocab_size) & (row != pad_id)] for row in ids]
    rows = [row for row in rows if len(row)]
    tokens = np.full((len(rows), length), pad_id, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    real = np.arange(length)[None] < np.array([len(row) for row in rows])[:, None]
    return {"tokens": tokens, "segment_ids": real.astype(np.int32)}


def with_source(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch of an encoder-decoder: its decoder reads the rows, its encoder those above them."""
    return {**batch, **{f"encoder_{key}": np.roll(rows, 1, axis=0) for key, rows in batch.items()}}


def compare_outputs(
    source: Source,
    arrays: Mapping[str, Array],
    pieces: Sequence[Piece],
    model: nn.Module,
    tokenizer: Any,
) -> dict[str, Any]:
    """Both models in float32 on `make_batch`; logits where both have the head, else the last hidden states."""
    config = model.config
    params = load_float32(arrays)
    pad_id, vocab_size = source.config.get("pad_token_id"), source.config["vocab_size"]
    pad_id = pad_id if type(pad_id) is int and 0 <= pad_id < vocab_size else 0
    batch = make_batch(tokenizer, vocab_size, config.max_len, pad_id)
    if isinstance(model, EncoderDecoder):
        batch = with_source(batch)
    if isinstance(model, XLNet):
        batch = padded_in_front(batch)
    real = batch["segment_ids"] > 0
    auto, compared = output_of(source, model, pieces)
    theirs, states = run_theirs(source.folder, auto, batch, pad_id)
    run = {"logit": run_logits, "hidden": run_states, "head": run_head}[compared]
    ours = run(model, params, batch)[..., : theirs.shape[-1]]
    if theirs.ndim == 2:  # one vector for each row
        ours, real = ours[:, 0], np.ones(len(theirs), bool)
    result = compare(ours[real], theirs[real])
    result["compared"] = compared
    result["first_diverging_layer"] = None
    if not result["passed"]:
        result["first_diverging_layer"] = first_diverging_layer(model, params, batch, states)
    return result


def padded_in_front(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same rows as transformers' XLNet has them, whose classifiers read a row's last place."""
    missing = (batch["segment_ids"] == 0).sum(1)
    roll = lambda x: np.stack([np.roll(row, n) for row, n in zip(x, missing, strict=True)])
    return {key: roll(x) for key, x in batch.items()}


def output_of(source: Source, model: nn.Module, pieces: Sequence[Piece]) -> tuple[str, str]:
    """(class of transformers, what is compared): a task's logits, the vocabulary's, or the last hidden states."""
    if source.task:
        return source.task, "head"
    if source.family.model in ("bert", "xlnet"):
        has_head = any(piece.group == "mlm" for piece in pieces)
    else:
        has_head = model.config.tie_embeddings or any("unembed" in p.paths for p in pieces)
    auto = AUTO_LM.get(source.family.model, "AutoModelForMaskedLM")
    return (auto, "logit") if has_head else ("AutoModel", "hidden")


def compare(ours_XV: np.ndarray, theirs_XV: np.ndarray) -> dict[str, Any]:
    """Differences over all positions X; KL is that of theirs from ours, in nats."""
    ours, theirs = ours_XV.astype(np.float64), theirs_XV.astype(np.float64)
    gap, largest = np.abs(ours - theirs), float(np.abs(theirs).max())
    p, q = _log_softmax(theirs), _log_softmax(ours)
    most = float(gap.max())
    return {
        # NaN on either side fails, because no comparison with it is true.
        "passed": bool(most <= TOLERANCE * max(1.0, largest)),
        "positions": len(ours),
        "max_abs_difference": most,
        "mean_abs_difference": float(gap.mean()),
        "max_abs_value": largest,
        "top1_agreement": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        "kl": max(0.0, float((np.exp(p) * (p - q)).sum(-1).mean())),
    }


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def load_float32(arrays: Mapping[str, Array]) -> Params:
    """The parameters whole, in float32."""
    held = {path: jnp.asarray(array.read().astype(np.float32)) for path, array in arrays.items()}
    return unflatten_dict(held, sep="/")


def run_logits(model: nn.Module, params: Params, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Our logits (B, T, V)."""

    def apply(params, batch):
        out = model.apply({"params": params}, batch)
        logits = jnp.einsum("BTD,VD->BTV", out.hidden, out.unembed.astype(out.hidden.dtype))
        if out.unembed_bias is not None:
            logits = logits + out.unembed_bias[None, None]
        return out.softcap * jnp.tanh(logits / out.softcap) if out.softcap else logits

    return np.asarray(jax.jit(apply)(params, batch))


def run_states(model: nn.Module, params: Params, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Our last hidden states (B, T, D), of an encoder before its masked-token head."""
    if not isinstance(model, EncoderDecoder):
        model = type(model)(model.config, head=Head(model.config, 0))
    apply = jax.jit(lambda p, b: model.apply({"params": p}, b).hidden)
    return np.asarray(apply(params, batch))


def run_head(model: nn.Module, params: Params, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """The logits of our task's head, (B, 1, C) or (B, T, C)."""
    apply = jax.jit(lambda p, b: model.apply({"params": p}, b).head_logits)
    return np.asarray(apply(params, batch))


def run_theirs(
    folder: Path, auto: str, batch: Mapping[str, np.ndarray], pad_id: int
) -> tuple[np.ndarray, dict[str, list[np.ndarray]]]:
    """(logits or last hidden states, by stack the hidden states of every layer with the embeddings first) of transformers'
    model.

    Raises:
      Failed: if transformers misses tensors in the folder, or finds some that it does not know.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # it reports heads that the class does not have
    transformers.logging.disable_progress_bar()
    model, about = getattr(transformers, auto).from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        use_safetensors=True,
        trust_remote_code=False,  # without it transformers asks
        output_loading_info=True,
    )
    # Poolers are made new where a class wants one that the folder's does not have.
    missing = [name for name in about["missing_keys"] if "pooler" not in name]
    if missing:
        raise Failed(f"transformers misses tensors in {folder}: {', '.join(sorted(missing)[:50])}")
    model.config.pad_token_id = pad_id  # classifiers of several rows ask for one
    names = {"tokens": "input_ids", "segment_ids": "attention_mask"}
    if "encoder_tokens" in batch:
        names = {f"encoder_{ours}": theirs for ours, theirs in names.items()}
        names |= {"tokens": "decoder_input_ids", "segment_ids": "decoder_attention_mask"}
    inputs = {theirs: torch.from_numpy(batch[ours]).long() for ours, theirs in names.items()}
    with torch.no_grad():
        out = model.eval()(**inputs, output_hidden_states=True)
    if "start_logits" in out:
        last = torch.stack([out.start_logits, out.end_logits], -1)
    else:
        last = out.logits if "logits" in out else out.last_hidden_state
    if type(model).__name__.endswith("ForPreTraining"):  # ELECTRA's: one logit a token
        last = last[..., None]
    keys = [key for key in out if key.endswith("hidden_states")]
    states = {key.removesuffix("hidden_states"): [s.numpy() for s in out[key]] for key in keys}
    return last.numpy(), states


def first_diverging_layer(
    model: nn.Module,
    params: Params,
    batch: Mapping[str, np.ndarray],
    states: Mapping[str, Sequence[np.ndarray]],
) -> int | str | None:
    """The first layer (from 1) after which the hidden states differ, or 'head' if none does.

    A number; of an encoder-decoder as in 'encoder 2', then those of the decoder, which here reads their encoder's states.
    states: as `run_theirs` gives them.
    """
    if isinstance(model, EncoderDecoder):
        return _diverging_stack(model, params, batch, states)
    run = lambda cut, stack: run_states(type(model)(cut), stack, batch)
    return _diverging(model.config, params, run, batch["segment_ids"], states[""]) or "head"


def _diverging_stack(
    model: nn.Module,
    params: Params,
    batch: Mapping[str, np.ndarray],
    states: Mapping[str, Sequence[np.ndarray]],
) -> str:
    table_VD, prefix = params["embed"]["embedding"], "encoder_"
    inputs = {k.removeprefix(prefix): x for k, x in batch.items() if k.startswith(prefix)}
    source = jnp.asarray(states[prefix][-1]), inputs["segment_ids"]
    for name, config, rows, read in (
        ("encoder", model.config, inputs, None),
        ("decoder", model.config.decoder, batch, source),
    ):

        def run(cut, stack, name=name, rows=rows, read=read):
            apply = Stack(cut, causal=name == "decoder").apply
            return np.asarray(jax.jit(apply)({"params": stack}, rows, table_VD, None, read)[0])

        theirs = states[f"{name}_"]
        if layer := _diverging(config, params[name], run, rows["segment_ids"], theirs):
            return f"{name} {layer}"
    return "head"


def _diverging(
    config: TransformerConfig,
    params: Params,
    run: Callable[[TransformerConfig, Params], np.ndarray],
    segment_ids: np.ndarray,
    states: Sequence[np.ndarray],
) -> int | None:
    """Ours after k layers is the model (run by its config and parameters) cut to k layers. A cut model ends with the final
    norm where it has one, so theirs goes through that norm, too."""
    real = segment_ids > 0
    for k in range(1, config.num_layers + 1):
        cut = dataclasses.replace(
            config, num_layers=k, unroll=1, attention_windows=config.layer_windows[:k]
        )
        shared = config.share_layers
        layers = params["layers"] if shared else jax.tree.map(lambda x: x[:k], params["layers"])
        ours = run(cut, {**params, "layers": layers})
        theirs = states[k]
        if config.norm_position != "post" and k < config.num_layers:
            norm = make_norm(config, "final_norm")
            theirs = np.asarray(norm.apply({"params": params["final_norm"]}, theirs))
        if not compare(ours[real], theirs[real])["passed"]:
            return k
    return None
