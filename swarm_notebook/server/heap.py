"""Memory that nobody needs any more, but that the process keeps.

Python finds objects that only know each other in rounds, and goes through the old ones so seldom,
for all the modules that are loaded, that the tensors of some session which has failed could stay
for hours. glibc gives memory back to the system from the end of a heap only: crowds of sessions
that come and go leave holes in it, between the few things that stay.
"""

from __future__ import annotations

import ctypes
import gc


def settle() -> None:
    """What is there now stays for good: from now on, garbage is found soon and in little time."""
    gc.collect()
    gc.freeze()
    trim()


def trim() -> None:
    """Give the holes back to the system; does nothing where the C library cannot.

    It takes milliseconds, and other threads that allocate have to wait so long.
    """
    # Only glibc has it; neither musl nor macOS do.
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))
