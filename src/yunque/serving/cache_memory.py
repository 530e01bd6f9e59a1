"""The memory of a running batch's caches, taken little by little: pages that nobody has used are slow to get."""

from __future__ import annotations

import time

from yunque.runtime.rows import Rows

_FEWEST = 8  # texts
_PIECE_S = 0.001


class CacheMemory:
    """Takes what twice as many texts need as ever ran at once, or a few more.

    So hardly a text waits for its memory, and a process soon has its size for good.
    """

    def __init__(self, rows: Rows, most_at_once: int = 0) -> None:
        self.most_at_once = most_at_once
        self._rows = rows
        self._sizes = rows.capacity
        self._taken = 0  # arrays of rows

    @property
    def bytes(self) -> int:
        """What has been taken."""
        _, room, source = self._sizes
        return self._rows.bytes_for(-(-self._taken // max(1, len(self._rows.caches))), room, source)

    def take(self) -> None:
        """Go on for about a millisecond."""
        rows, caches = self._rows, self._rows.caches
        if rows.capacity != self._sizes:
            self._sizes, self._taken = rows.capacity, 0
        self.most_at_once = max(self.most_at_once, rows.count)
        wanted = min(rows.capacity[0], max(_FEWEST, 1 << (2 * self.most_at_once - 1).bit_length())) * len(caches)
        self._taken = max(self._taken, rows.count * len(caches))
        end = time.perf_counter() + _PIECE_S
        while self._taken < wanted and time.perf_counter() < end:
            row, number = divmod(self._taken, len(caches))
            caches[number][row] = 0
            self._taken += 1
