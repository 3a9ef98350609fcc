"""Gives memory that is free in the process back to the system.

Python's collector goes through old objects seldom, as there are so many of loaded modules: tensors
in a reference cycle, as of a session that failed, could stay for hours. And glibc shrinks a heap
only at its end: many sessions that come and go leave holes between what stays.

What oneDNN compiles is bounded, too: code of its own for each shape of a product, of which it and
torch would keep a thousand each.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

# glibc's parameter for from how many bytes on an allocation is a mapping of its own. It raises it
# by itself up to the second number, as such allocations are freed.
_M_MMAP_THRESHOLD, _MMAP_MOST = -3, 32 << 20
# Smaller than a packed matrix of the demo model's, larger than its scales.
_APART = 64 << 10

# Products of 128 lengths of a prompt with the demo model's four shapes of weights in bfloat16 took
# 303 MB for good, 0.6 MB each, and 38 so; making one anew takes 0.9 ms (two cores of an AMD EPYC).
# A step of up to 16 sessions still has all of its own.
_COMPILED = "64"


def bound_compiled() -> None:
    """Let oneDNN, and what torch has around it, keep few products; before the first of them.

    Who has set these variables is not overruled.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, _COMPILED)


def freeze() -> None:
    """Exclude what is there now from garbage collection, so that it is quick from now on."""
    gc.collect()
    gc.freeze()
    trim()


def trim() -> None:
    """Give free memory back to the system, where the C library can.

    It takes milliseconds, for which other threads cannot allocate.
    """
    # Only glibc has it; neither musl nor macOS do.
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))


@contextmanager
def apart() -> Iterator[None]:
    """What is allocated meanwhile, and not small, leaves nothing behind when it is freed.

    For weights in few bits: what they are made of is many times as large, and comes and goes
    between them. With the demo model at 4.5 bits, a server's heap had grown by 85 MB for 57.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _APART)
    try:
        yield
    finally:
        # Activations come and go for as long as a server lives, and mappings are slow to make.
        mallopt(_M_MMAP_THRESHOLD, _MMAP_MOST)
