"""What the C library says of the memory that this process has allocated."""

from __future__ import annotations

import ctypes
import gc
import sys

import pytest


class _Info(ctypes.Structure):
    # glibc's struct mallinfo2: "arena" to "hblks", "hblkhd" (mapped), …, "uordblks" (in use), …
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ord", "sm", "hbl", "mapped", "us", "fsm", "used", "free", "top")
    ]


needs_glibc = pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")


def allocated() -> int:
    """Bytes in use, after garbage is gone."""
    gc.collect()
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _Info
    found = libc.mallinfo2()
    return found.used + found.mapped
