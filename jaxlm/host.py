"""What the host process is told before it computes."""

import ctypes
import sys

# glibc's mallopt parameters, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets glibc's malloc keep freed memory for the next step instead of giving it back to the system.

    XLA:CPU allocates its temporaries anew in every step. By default each large one is a fresh mapping,
    whose pages the kernel must zero and map again, step after step: that cost as much as the arithmetic.
    The price is that the process stays as large as its largest step. Call it before anything large is
    allocated; a C library without mallopt is left as it is. Returns whether malloc took the settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    # One arena, grown in place: the only one that glibc extends without a mapping for each block.
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    return all([mallopt(name, value) == 1 for name, value in settings])
