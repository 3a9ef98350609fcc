"""Gives memory that is free in the process back to the system.

Python's collector goes through old objects seldom, as there are so many of loaded modules: tensors
in a reference cycle, as of a session that failed, could stay for hours. And glibc shrinks a heap
only at its end: many sessions that come and go leave holes between what stays.
"""

from __future__ import annotations

import ctypes
import gc


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
