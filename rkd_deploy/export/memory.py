"""Memory that is free, and that the process holds nevertheless."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def give_back() -> None:
    """Let the C library return to the system what was freed, where it is glibc.

    It keeps freed blocks of up to 32 MB for itself, as large as weights are, and what loads a model next takes its own
    besides: of a ResNet-18's export that was a tenth of the peak.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
