"""A long prompt that a decoder-only model reads piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from yunque.runtime.rows import LANES, Rows, whole


class PromptReader:
    """Reads a prompt in empty ``rows`` of its own, so that a batch goes on between two pieces; then it joins there.

    The numbers are, to the last bit, those of the prompt read at once.
    """

    def __init__(self, rows: Rows, prompt: Sequence[int], max_positions: int | None) -> None:
        rows.append(1, len(prompt))
        self.rows = rows
        self.prompt = prompt
        self._max_positions = max_positions or 1 << 30

    @property
    def left(self) -> int:
        """Tokens still to be read."""
        return len(self.prompt) - int(self.rows.lengths[0])

    def read(self, most: int) -> None:
        """Read about ``most`` tokens more: whole vectors of them, one at least."""
        begin = int(self.rows.lengths[0])
        piece = self.prompt[begin : begin + max(LANES, most // LANES * LANES)]
        tokens = np.zeros((1, min(whole(len(piece)), self._max_positions - begin)), np.int64)
        tokens[0, : len(piece)] = piece
        self.rows.extend(0, tokens, len(piece))
