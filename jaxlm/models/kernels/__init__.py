"""Attention kernels that never hold a row of scores: chosen by name, each with what it cannot do.

    kernel   devices   masks                          packed rows                        T x T in memory
    xla      any       any                            in the mask                        mask and scores
    splash   TPU       causal, window, full, softcap  segment ids                        nothing
    cudnn    GPU       causal, window, full           a mask of each row, no softcap     the mask (bfloat16)
    triton   GPU       causal, full                   segment ids                        nothing

All compute softmax(softcap(q k / sqrt(H))) v as `attention.attend_xla`, the reference, does; it alone can drop
probabilities out, add biases to the scores, let a prefix see itself whole, read another sequence (cross attention) and a KV
cache. The names that end in _interpret run the same kernels anywhere, slowly: for tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxlm.models.config import TransformerConfig
from jaxlm.models.kernels import cudnn, splash, triton

REFERENCE = "xla"


class Kernel(NamedTuple):
    """attend: (query_BTNH, key_BSKH, value_BSKH, segment_ids_BT, *, causal, window, softcap) -> (B, T, N, H).

    find_limits: (config, mesh) -> what of the config it cannot do over a mesh of these sizes, each with what to change.
    """

    attend: Callable
    find_limits: Callable[[TransformerConfig, Mapping[str, int]], list[str]]


FUSED: dict[str, Kernel] = {
    "splash": Kernel(splash.attend, splash.find_limits),
    "cudnn": Kernel(cudnn.attend, cudnn.find_limits),
    "triton": Kernel(triton.attend, triton.find_limits),
}
for _name in ("splash", "triton"):
    _kernel = FUSED[_name]
    _interpreted = functools.partial(_kernel.attend, interpret=True)
    FUSED[f"{_name}_interpret"] = _kernel._replace(attend=_interpreted)

ALONE: Mapping[str, int] = {}  # the mesh of one device


def made_for(platform: str, mesh: Mapping[str, int]) -> str:
    """The kernel that is made for the devices of a mesh, before anything is known of the model."""
    if platform == "gpu":
        return "triton" if mesh.get("stage", 1) > 1 else "cudnn"
    return "splash" if platform == "tpu" else REFERENCE


def find_limits(
    config: TransformerConfig,
    mesh: Mapping[str, int] = ALONE,
    *,
    family: str = "",
    has_prefix: bool = False,
    capability: tuple[int, ...] | None = None,
) -> list[str]:
    """What of `config` its kernel cannot do over a mesh of these sizes, each with what to change; empty if it can do all.

    family: the model's. has_prefix: whether batches have `is_prefix`. capability: of the mesh's NVIDIA GPUs, (8, 0) and so on.
    """
    name = config.attention_kernel
    if name == REFERENCE:
        return []
    if name not in FUSED:
        known = ", ".join((REFERENCE, *FUSED))
        return [f"attention_kernel={name!r}: use one of {known}"]
    limits = FUSED[name].find_limits(config, mesh)
    if name == "cudnn" and capability:
        limits += cudnn.find_device_limits(config, capability)
    if config.attention_dropout_rate:
        limits.append(
            f"attention_dropout_rate={config.attention_dropout_rate}: only the reference drops probabilities out; "
            "set it to 0"
        )
    if config.position == "relative":
        limits.append("position='relative': only the reference adds biases to the scores")
    if family == "xlnet":
        limits.append("family 'xlnet': only the reference scores distances and segments")
    if has_prefix:
        limits.append("objective 'prefix_lm': only the reference lets a prefix see itself whole")
    return limits
