"""How far each layer sees and the rotary angles that it takes: what Mistral, Gemma and ModernBERT spell differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.models.config import TransformerConfig

FULL, SLIDING = "full_attention", "sliding_attention"


def windows_from_layer_types(
    layer_types: Any, window: int, default: Sequence[str]
) -> tuple[int, ...]:
    """attention_windows of `layer_types`, or of `default` where that is None; () if no layer has a window.

    Raises:
      ValueError: if it is not a list of one known word for each layer.
    """
    kinds = default if layer_types is None else layer_types
    if not isinstance(kinds, list | tuple) or len(kinds) != len(default):
        raise ValueError(
            f"layer_types={kinds!r}: expected one word for each of {len(default)} layers"
        )
    if unknown := sorted({str(kind) for kind in kinds} - {FULL, SLIDING}):
        raise ValueError(f"layer_types has {unknown}: only {FULL} and {SLIDING} can be converted")
    return shortest_period([0 if kind == FULL else window for kind in kinds])


def shortest_period(windows: Sequence[int]) -> tuple[int, ...]:
    """The shortest tuple that repeats to `windows`; () if all see everything."""
    if not any(windows):
        return ()
    for length in range(1, len(windows)):
        if all(w == windows[i % length] for i, w in enumerate(windows)):
            return tuple(windows[:length])
    return tuple(windows)


def layer_types(config: TransformerConfig) -> list[str]:
    """What their config.json calls each layer, by whether it has a window."""
    return [SLIDING if window else FULL for window in config.layer_windows]


def only_window(config: TransformerConfig, default: int) -> int:
    """The width of the layers that have a window; `default` if there are none.

    Raises:
      ValueError: if there are several.
    """
    widths = sorted({window for window in config.layer_windows if window})
    if len(widths) > 1:
        raise ValueError(
            f"attention_windows={config.attention_windows}: all layers with a window have the same one"
        )
    return widths[0] if widths else default


def global_every(kinds: Sequence[str], first: int) -> int:
    """n if exactly the layers first, first + n, … are global for some n, else 0."""
    for n in range(1, len(kinds) + 1):
        if all((kind == FULL) == (i % n == first % n) for i, kind in enumerate(kinds)):
            return n
    return 0


def positive(hf: Mapping[str, Any], key: str, default: Any, kinds: Any = (int, float)) -> Any:
    """hf[key], or `default` where it is absent or null; raises ValueError if it is not a positive number."""
    value = default if hf.get(key) is None else hf[key]
    if type(value) not in kinds or not 0 < value < 1e12:
        raise ValueError(f"{key}={value!r}: expected a positive number")
    return value
