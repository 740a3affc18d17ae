"""Tell the C library to keep the memory that training frees.

A step of training takes hundreds of megabytes for activations and gradients and frees them again, and the next step
takes as much. glibc, the C library of most Linux systems, gives freed blocks of that size back to the system at once:
each step then gets its memory page by page anew, which the system clears first (40,000 to 255,000 page faults a step,
a tenth to a quarter of its time on one core). Told to keep them, it hands the same pages out again. What numbers come
out does not change, and the peak of memory little.

This changes the whole process, so only commands do it, never `import moeviz` or `moeviz.watch`. No torch here.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3), as malloc.h has them."""


_TRIED = 4 << 20
"""Bytes of a block that shows whose allocator gives it."""


def keep_freed_memory(variables: Mapping[str, str] = os.environ) -> bool:
    """Have every block come from the heap, and the heap never shrink. Call it before large tensors are made.

    Returns whether glibc will: not where the process has another allocator, or where `variables` already say how
    glibc is to behave (MALLOC_..., or glibc.malloc in GLIBC_TUNABLES).
    """
    if not _is_glibc() or _is_told(variables):
        return False
    library = ctypes.CDLL(None)
    # A threshold would not do: glibc allows none above 32 MB, and gradients of experts are larger.
    kept: bool = library.mallopt(_M_MMAP_MAX, 0) == 1
    return library.mallopt(_M_TRIM_THRESHOLD, -1) == 1 and kept


def give_back() -> None:
    """Return what is free to the system now: before asking the system how much memory is left."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _is_told(variables: Mapping[str, str]) -> bool:
    """Whether a person has decided about glibc's memory."""
    named = any(name.startswith("MALLOC_") for name in variables)
    return named or "glibc.malloc" in variables.get("GLIBC_TUNABLES", "")


def _is_glibc() -> bool:
    """Whether memory comes from glibc, by trial: from no other C library and no allocator in front of it."""
    try:
        known = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError):
        return False
    before = _handed_out()
    block = ctypes.create_string_buffer(_TRIED)
    return bool(known) and (_handed_out() - before) % (1 << 32) >= len(block)


def _handed_out() -> int:
    """Bytes that glibc's allocator has given to somebody, mallinfo(3); modulo 4 GB before version 2.33."""
    library = ctypes.CDLL(None)
    new = hasattr(library, "mallinfo2")
    number = ctypes.c_size_t if new else ctypes.c_uint
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    fields = [(name, number) for name in names.split()]
    ask = library.mallinfo2 if new else library.mallinfo
    ask.restype = type("Counts", (ctypes.Structure,), {"_fields_": fields})
    counts = ask()
    total: int = counts.hblkhd + counts.uordblks
    return total
