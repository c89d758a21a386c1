"""Integer mixers: bijections of uint32 whose every input bit turns each output bit about half of the time.

They are the same in numpy and in jax, so what is computed on a device can be computed again on a host.
"""

from typing import Any

import numpy as np

# ((shift, multiplier), (shift, multiplier), last shift): the finalizer of MurmurHash3, and lowbias32 of
# github.com/skeeto/hash-prospector.
MURMUR3 = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), 16)
LOWBIAS32 = ((16, 0x7FEB352D), (15, 0x846CA68B), 16)


def mix(x: Any, mixer: tuple) -> Any:
    """`x` mixed: uint32 of numpy or of jax; every operation wraps around at 2**32.

    Numpy changes `x` in place, which spares it the time of as many new arrays; to jax `^=` is another name for a new one.
    """
    *rounds, last = mixer
    for shift, multiplier in rounds:
        x ^= x >> np.uint32(shift)
        x *= np.uint32(multiplier)
    x ^= x >> np.uint32(last)
    return x
