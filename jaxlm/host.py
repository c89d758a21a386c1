"""What the host process is told before it computes."""

import ctypes
import os
import sys

# glibc's mallopt parameters, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_MADV_HUGEPAGE = 14  # from Linux's mman.h


def keep_freed_memory() -> bool:
    """Lets glibc's malloc keep freed memory for the next step instead of giving it back to the system.

    XLA:CPU allocates its temporaries anew in every step. By default each large one is a fresh mapping,
    whose pages the kernel must zero and map again, step after step: that cost as much as the arithmetic.
    The price is that the process stays as large as its largest step. Call it before anything large is
    allocated; a C library without mallopt is left as it is. Returns whether malloc took the settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mallopt"):  # musl
        return False
    # One arena, grown in place: the only one that glibc extends without a mapping for each block.
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    kept = all([libc.mallopt(name, value) == 1 for name, value in settings])
    if kept:
        _ask_for_huge_pages(libc)
    return kept


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Has the heap's next half of the machine's memory backed by pages of 2 MB where the kernel gives them on request.

    Reserving costs addresses only; pages come when they are written. A kernel that has no room or no such pages
    leaves everything as it was.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    size = os.sysconf("SC_PHYS_PAGES") // 2 * page
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if start := libc.malloc(size):
        libc.madvise(-(-start // page) * page, size - page, _MADV_HUGEPAGE)
        libc.free(start)
