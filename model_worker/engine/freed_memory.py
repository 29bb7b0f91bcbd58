"""Giving memory that is not used any more back to the system."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """After loading: the C library keeps what tensors that are gone have left, some hundred megabytes, for later.

    Only glibc has to be asked; elsewhere this does nothing.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))
