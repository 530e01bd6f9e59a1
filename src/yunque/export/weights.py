"""The one file that holds the weights of all graphs of a folder, as ONNX external data."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

WEIGHTS = "weights.bin"
_PAGE = 4096
_CACHE_LINE = 64
_LARGE_BYTES = 1 << 20


class Region(NamedTuple):
    """Where an array lies in the weights file, in bytes."""

    offset: int
    length: int


class WeightFile:
    """Writes each array once, whatever the number of graphs and initializers that read it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / WEIGHTS
        self._regions: dict[str, Region] = {}
        self._file: BinaryIO

    def __enter__(self) -> WeightFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, key: str, array: NDArray[np.generic]) -> Region:
        """Append ``array`` unless ``key`` is there already, and say where it lies."""
        if key not in self._regions:
            # ONNX Runtime maps an initializer from the start of its page: large ones share no page with a neighbour.
            alignment = _PAGE if array.nbytes >= _LARGE_BYTES else _CACHE_LINE
            offset = -(-self._file.tell() // alignment) * alignment
            self._file.seek(offset)
            self._file.write(np.ascontiguousarray(array).data)
            self._regions[key] = Region(offset, array.nbytes)
        return self._regions[key]


class Unwritten(WeightFile):
    """Takes the arrays and writes nothing."""

    def __init__(self) -> None:
        super().__init__(Path())

    def add(self, key: str, array: NDArray[np.generic]) -> Region:
        """Say how long ``array`` is."""
        return Region(0, array.nbytes)
