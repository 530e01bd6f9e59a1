"""How fast an engine has been lately."""

from __future__ import annotations

import math

_RATE_S = 2.0  # over which rates are measured


class Rates:
    """Tokens and finished texts a second, over the last seconds with work."""

    def __init__(self) -> None:
        self._since = 0.0
        self._last = 0.0
        self._tokens = self._ends = 0
        self._ends_s = 0.0

    def made(self, tokens: int, now: float) -> float | None:
        """Count tokens; the rate, when a while has passed."""
        if now - self._last > 1:  # there was nothing to do
            self._since, self._tokens, self._ends = now, 0, 0
        self._last = now
        self._tokens += tokens
        passed = now - self._since
        if passed < _RATE_S:
            return None
        rate, self._ends_s = self._tokens / passed, self._ends / passed
        self._since, self._tokens, self._ends = now, 0, 0
        return rate

    def ended(self, now: float) -> None:
        """Count a text that ended."""
        self._ends += 1
        passed = now - self._since
        if not self._ends_s and 0.1 < passed < 1e5:
            self._ends_s = self._ends / passed

    def seconds_for(self, texts: int) -> int:
        """About how long so many texts take, 1 to 60 s; 1 where nothing was measured."""
        return min(60, max(1, math.ceil(texts / self._ends_s))) if self._ends_s else 1
