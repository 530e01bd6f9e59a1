"""Large pages for what every step reads from end to end: a process's weights, the caches of its rows."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_LARGE_PAGE = 2 << 20
_VECTOR = 64
_COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1, for which mmap has no name yet

Ranges = list[tuple[int, int]]


def anonymous_ranges() -> Ranges:
    """Begins and ends of the writable memory of this process that belongs to no file; empty where not on Linux."""
    if sys.platform != "linux":
        return []
    ranges = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, access, _, _, inode, *path = line.split(maxsplit=5)
        if access == "rw-p" and inode == "0" and path in ([], ["[heap]"]):
            begin, end = (int(number, 16) for number in span.split("-"))
            ranges.append((begin, end))
    return ranges


def use_large_pages(former: Ranges) -> None:
    """Put memory that was not among ``former`` ranges on pages of 2 MB where the system lets us.

    A processor fetches ahead within a page only, so reading weights from small pages stalls at each of them.
    """
    if sys.platform != "linux":
        return
    known = set(former)
    library = ctypes.CDLL(None)
    for begin, end in anonymous_ranges():
        first, last = -(-begin // _LARGE_PAGE) * _LARGE_PAGE, end // _LARGE_PAGE * _LARGE_PAGE
        if (begin, end) in known or last <= first:
            continue
        address, size = ctypes.c_void_p(first), ctypes.c_size_t(last - first)
        # A refusal (an old kernel, pages switched off) costs speed only.
        library.madvise(address, size, mmap.MADV_HUGEPAGE)
        library.madvise(address, size, _COLLAPSE)


def zeros(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """An array of zeros that begins where a vector does, or a large page if it fills one: NumPy asks for those."""
    count = math.prod(shape)
    edge = (_LARGE_PAGE if 4 * count >= _LARGE_PAGE else _VECTOR) // 4
    memory = np.zeros(count + edge, np.float32)  # what is not touched costs nothing
    first = -memory.ctypes.data // 4 % edge
    return memory[first : first + count].reshape(shape)
