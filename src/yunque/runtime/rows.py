"""The decoder graph over the rows of a running batch, with preallocated caches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from yunque.runtime.memory import zeros
from yunque.runtime.session import Bound, geometry

_ROOM_STEP = 64
"""Caches grow by at least so many positions."""
LANES = 16
"""Widths are multiples of this where texts of several lengths meet. Kernels add up a row in vectors of so many numbers,
and the rest one by one: with whole vectors a row gives the same numbers, to the last bit, whatever its padding."""
_MASKED = float(np.finfo(np.float32).min) / 2  # two of them still add up to a number


def whole(width: int) -> int:
    """``width`` rounded up to whole vectors."""
    return -(-width // LANES) * LANES


class Rows:
    """Rows 0 to ``count`` - 1 of a decoder: their caches, lengths and newest logits, in buffers that grow.

    Rows share nothing: each has its own length, so they join and leave at any step. ``logits`` [capacity, vocabulary]
    holds what the last ``forward`` over a row gave.
    """

    def __init__(self, session: ort.InferenceSession, vocab_size: int) -> None:
        self._session = session
        shapes = geometry(session)
        self._past_names = [name for name in shapes if name.startswith("past_")]
        self._cross_names = [name for name in shapes if name.startswith("cross_")]
        self._shapes = shapes
        self.count = 0
        self.lengths: NDArray[np.int32] = np.zeros(0, np.int32)
        self.logits: NDArray[np.float32] = np.empty((0, vocab_size), np.float32)
        self._past: dict[str, NDArray[np.float32]] = {}
        self._cross: dict[str, NDArray[np.float32]] = {}
        self._room = self._source = 0
        self._step: Bound | None = None
        self._step_inputs: dict[str, NDArray[Any]] = {}
        self.most: int | None = None  # rows to have room for from the first on: what no text uses takes no memory

    # --- rows join, move and leave ------------------------------------------------------------------------------------

    def append(self, count: int, room: int, source: int = 0) -> range:
        """Add ``count`` empty rows with ``room`` positions (and ``source`` encoder positions); return their numbers."""
        first, total = self.count, self.count + count
        self.reserve(total, room, source)
        self.lengths[first:total] = 0
        self.count, self._step = total, None
        return range(first, total)

    def sizes_after(self, count: int, room: int, source: int) -> tuple[int, int, int]:
        """Capacity, positions and encoder positions of the buffers once they hold rows of these sizes."""
        capacity, room, source = len(self.lengths), whole(room), whole(source)
        if count > capacity:
            capacity = max(count, self.most or 2 * capacity)
        if room > self._room:
            room = room if self._room == 0 else max(room, self._room + _ROOM_STEP)
        return capacity, max(room, self._room), max(source, self._source)

    def reserve(self, count: int, room: int, source: int = 0) -> None:
        """Let the buffers hold ``count`` rows of these sizes."""
        sizes = self.sizes_after(count, room, source)
        if sizes != self.capacity:
            self._resize(*sizes)

    def restart(self, count: int, room: int, source: int) -> None:
        """Drop all rows, and let the buffers be those of ``count`` rows of these sizes: the same ones if they are."""
        self.truncate(0)
        sizes = (count, whole(room), whole(source))
        if sizes != self.capacity:
            self._resize(*sizes)

    def fit(self, room: int, source: int) -> None:
        """Shrink the buffers to ``most`` rows that need no more than ``room`` and ``source`` positions."""
        self._resize(max(self.count, self.most or 0), whole(room), whole(source))

    def _resize(self, capacity: int, room: int, source: int) -> None:
        self._room, self._source = room, source
        used = self.count
        for name in self._past_names:
            self._past[name] = self._grown(self._past.get(name), name, used, capacity)
        for name in self._cross_names:
            self._cross[name] = self._grown(self._cross.get(name), name, used, capacity)
        self.lengths = np.concatenate([self.lengths[:used], np.zeros(capacity - used, np.int32)])
        logits = np.empty((capacity, self.logits.shape[1]), np.float32)
        logits[:used] = self.logits[:used]
        self.logits, self._step = logits, None

    def _grown(self, former: NDArray[np.float32] | None, name: str, used: int, capacity: int) -> NDArray[np.float32]:
        sizes = {"rows": capacity, "room": self._room, "source": self._source}
        shape = tuple(sizes.get(size, size) for size in self._shapes[name])
        if former is not None and former.shape == shape:
            return former
        # Zeros, since a masked position still enters a sum, with weight 0. Masks of padding must be low instead.
        array = np.full(shape, _MASKED, np.float32) if name == "cross_bias" else zeros(shape)
        if former is not None:
            ends = {"rows": used, "room": int(self.lengths[:used].max(initial=0))}
            kept = tuple(
                slice(min(ends.get(size, old), old, new))
                for size, old, new in zip(self._shapes[name], former.shape, shape, strict=True)
            )
            array[kept] = former[kept]
        return array

    def source(self, row: int, count: int, width: int) -> dict[str, NDArray[np.float32]]:
        """Where the encoder writes ``count`` sources from ``row`` on: here, without a copy, where they are as wide."""
        names = [name for name in self._cross_names if name != "cross_bias"]
        if width == self._source:
            return {name: self._cross[name][row : row + count] for name in names}
        sizes = {"rows": count, "source": width}
        shapes = {name: tuple(sizes.get(size, size) for size in self._shapes[name]) for name in names}
        return {name: np.empty(shape, np.float32) for name, shape in shapes.items()}

    def set_source(self, row: int, cross: dict[str, NDArray[np.float32]], lengths: NDArray[np.int64]) -> None:
        """Give rows from ``row`` on what the encoder wrote to the arrays of ``source``, and their sources' lengths."""
        rows = slice(row, row + len(lengths))
        for name, array in cross.items():
            width = array.shape[2]
            if width < self._source:
                self._cross[name][rows, :, :width] = array
                self._cross[name][rows, :, width:] = 0
        known = np.arange(self._source) < lengths[:, None]
        self._cross["cross_bias"][rows, 0, 0] = np.where(known, np.float32(0), np.float32(_MASKED))

    def bytes_for(self, count: int, room: int, source: int) -> int:
        """Bytes of the buffers of ``count`` rows with ``room`` positions and ``source`` encoder positions."""
        sizes = {"rows": count, "room": whole(room), "source": whole(source)}
        names = (*self._past_names, *self._cross_names)
        numbers = sum(math.prod(sizes.get(size, size) for size in self._shapes[name]) for name in names)
        return 4 * (numbers + count * self.logits.shape[1])

    def touch(self) -> None:
        """Write to all that no token uses yet, so that the system really gives its memory."""
        for array in self.caches:
            array[self.count :] = 0
        for array in self._past.values():
            array[:, :, int(self.lengths[: self.count].max(initial=0)) :] = 0

    @property
    def caches(self) -> list[NDArray[np.float32]]:
        """The buffers, whose first axis is that of the rows; those from ``count`` on hold nothing that is needed."""
        return [*self._past.values(), *self._cross.values()]

    @property
    def capacity(self) -> tuple[int, int, int]:
        """Rows, positions and encoder positions that the buffers have now."""
        return len(self.lengths), self._room, self._source

    def truncate(self, count: int) -> None:
        """Drop the rows from ``count`` on."""
        self.count, self._step = count, None

    def remove(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Drop ``rows``; the last rows take their numbers, as the returned (from, to) pairs say."""
        left = self.count - len(rows)
        gone = set(rows)
        movers = [row for row in range(left, self.count) if row not in gone]
        holes = sorted(row for row in gone if row < left)
        moves = list(zip(movers, holes, strict=True))
        if moves:
            source, target = np.array(moves).T
            used = int(self.lengths[source].max(initial=0))
            for array in self._past.values():
                array[target, :, :used] = array[source, :, :used]
            for array in (*self._cross.values(), self.logits):
                array[target] = array[source]
            self.lengths[target] = self.lengths[source]
        self.count, self._step = left, None
        return moves

    def repeat(self, times: int) -> None:
        """Put ``times`` copies of every row in its place."""
        for arrays in (self._past, self._cross):
            for name, array in arrays.items():
                arrays[name] = np.repeat(array[: self.count], times, axis=0)
        self.lengths = np.repeat(self.lengths[: self.count], times)
        self.logits = np.repeat(self.logits[: self.count], times, axis=0)
        self.count, self._step = self.count * times, None

    def copy(self, other: Rows, sources: Sequence[int], room: int = 0) -> None:
        """Add rows that go on from rows ``sources`` of ``other``, which may be these rows themselves."""
        new = self.append(len(sources), room)
        rows, used = slice(new.start, new.stop), int(other.lengths[sources].max())
        for name, array in self._past.items():
            array[rows, :, :used] = other._past[name][sources, :, :used]
        for name, array in self._cross.items():
            array[rows] = other._cross[name][sources]
        self.lengths[rows] = other.lengths[sources]
        self.logits[rows] = other.logits[sources]

    def reorder(self, index: NDArray[np.int64]) -> None:
        """Let row r continue the text of row ``index[r]``, which has the same source."""
        moved = np.flatnonzero(index != np.arange(len(index)))
        if not len(moved):
            return
        source = index[moved]
        used = int(self.lengths[source].max())
        for array in self._past.values():
            array[moved, :, :used] = array[source, :, :used]
        self.lengths[moved] = self.lengths[source]

    # --- running the graph --------------------------------------------------------------------------------------------

    def forward(self, first: int, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Read prompts: ``tokens`` [rows, length], padded on the right, into the empty rows from ``first`` on."""
        count, width = tokens.shape
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": np.ascontiguousarray(tokens),
            "positions": np.ascontiguousarray(np.broadcast_to(np.arange(width), tokens.shape)),
            "last_position": (lengths - 1).astype(np.int32),
            "total_length": np.array(width, np.int32),
            "logit_rows": np.arange(count) * width + lengths - 1,
        }
        self._bind(first, count, inputs).run()
        self.lengths[first : first + count] = lengths

    def extend(self, row: int, tokens: NDArray[np.int64], count: int) -> None:
        """Append the first ``count`` of ``tokens`` [1, length] to what ``row`` holds; the rest is padding."""
        begin = int(self.lengths[row])
        end = begin + tokens.shape[1]
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": tokens,
            "positions": np.arange(begin, end)[None],
            # Attention counts back from here to where the tokens begin, so padding counts; it is overwritten later.
            "last_position": np.array([end - 1], np.int32),
            "total_length": np.array(end, np.int32),
            "logit_rows": np.array([count - 1]),
        }
        self._bind(row, 1, inputs).run()
        self.lengths[row] = begin + count

    def step(self, tokens: NDArray[np.int64]) -> None:
        """Append one token to each of the first ``len(tokens)`` rows."""
        count = len(tokens)
        if self._step is None or len(self._step_inputs["input_ids"]) != count:
            self._step_inputs = {
                "input_ids": np.empty((count, 1), np.int64),
                "positions": np.empty((count, 1), np.int64),
                "last_position": np.empty(count, np.int32),
                "total_length": np.array(0, np.int32),
                "logit_rows": np.arange(count),
            }
            self._step = self._bind(0, count, self._step_inputs)
        inputs, lengths = self._step_inputs, self.lengths[:count]
        inputs["input_ids"][:, 0] = tokens
        inputs["positions"][:, 0] = lengths
        inputs["last_position"][:] = lengths
        inputs["total_length"][...] = lengths.max() + 1
        self._step.run()
        lengths += 1

    def all_logits(self, first: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [rows, length, vocabulary] of every position of ``tokens`` in the empty rows from ``first`` on."""
        count, width = tokens.shape
        logits = np.empty((count * width, self.logits.shape[1]), np.float32)
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": np.ascontiguousarray(tokens),
            "positions": np.ascontiguousarray(np.broadcast_to(np.arange(width), tokens.shape)),
            "last_position": np.full(count, width - 1, np.int32),
            "total_length": np.array(width, np.int32),
            "logit_rows": np.arange(count * width),
        }
        self._bind(first, count, inputs, logits).run()
        self.lengths[first : first + count] = width
        return logits.reshape(count, width, -1)

    def _bind(
        self, first: int, count: int, inputs: dict[str, NDArray[Any]], logits: NDArray[np.float32] | None = None
    ) -> Bound:
        rows = slice(first, first + count)
        past = {name: array[rows] for name, array in self._past.items()}
        cross = {name: array[rows] for name, array in self._cross.items()}
        outputs = {name.replace("past_", "present_"): array for name, array in past.items()}
        outputs["logits"] = self.logits[rows] if logits is None else logits
        return Bound(self._session, {**inputs, **past, **cross}, outputs)
