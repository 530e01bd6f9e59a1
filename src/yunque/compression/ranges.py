"""What the inputs of layers look like on calibration texts: ranges, mean squares, a sample of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

_BINS = 4096
_LEVELS = 128  # of one sign of an 8-bit number
_ROWS_PER_CALL = 8
_MOST_ROWS = 256

Floats = NDArray[np.float32]
Range = tuple[float, float]


@dataclass
class Inputs:
    """What was seen of one layer's inputs."""

    low: float = np.inf
    high: float = -np.inf
    squares: NDArray[np.float64] | None = None  # sums [in]
    count: int = 0
    rows: list[Floats] = field(default_factory=list)
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))  # of low to high

    @property
    def importance(self) -> Floats:
        """Mean square [in] of every input."""
        assert self.squares is not None
        return np.asarray(self.squares / max(1, self.count), np.float32)

    @property
    def sample(self) -> Floats:
        """Some rows [rows, in]."""
        return np.concatenate(self.rows)


def observe(
    modules: Mapping[str, nn.Module], forward_all: Callable[[], None], *, with_histograms: bool
) -> dict[str, Inputs]:
    """Watch the inputs of ``modules`` while ``forward_all`` runs the model; twice where histograms are wanted.

    The first pass finds the ends between which the second counts. A module that no text reaches is left out.
    """
    seen = {name: Inputs() for name in modules}
    with _watching(modules, lambda name, rows: _first(seen[name], rows)):
        forward_all()
    seen = {name: inputs for name, inputs in seen.items() if inputs.count}
    if with_histograms:
        with _watching({name: modules[name] for name in seen}, lambda name, rows: _count(seen[name], rows)):
            forward_all()
    return seen


@contextmanager
def _watching(modules: Mapping[str, nn.Module], look: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            look(name, value.detach().float().reshape(-1, value.shape[-1]).cpu())

        return hook

    handles = [module.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(inputs: Inputs, rows: torch.Tensor) -> None:
    inputs.low, inputs.high = min(inputs.low, float(rows.min())), max(inputs.high, float(rows.max()))
    squares = rows.square().sum(dim=0, dtype=torch.float64).numpy()
    inputs.squares = squares if inputs.squares is None else inputs.squares + squares
    inputs.count += len(rows)
    if sum(map(len, inputs.rows)) < _MOST_ROWS:
        step = max(1, len(rows) // _ROWS_PER_CALL)
        inputs.rows.append(rows[::step][:_ROWS_PER_CALL].numpy().copy())


def _count(inputs: Inputs, rows: torch.Tensor) -> None:
    counts, _ = np.histogram(rows.numpy(), bins=_BINS, range=_ends(inputs))
    inputs.histogram += counts


def _ends(inputs: Inputs) -> Range:
    return (inputs.low, inputs.high) if inputs.low < inputs.high else (inputs.low - 0.5, inputs.low + 0.5)


# --- ranges -----------------------------------------------------------------------------------------------------------


def find_range(inputs: Inputs, method: str, percentile: float) -> Range:
    """The range that 8 bits are spread over, by "minmax", "percentile" or "entropy"."""
    if method == "minmax":
        return inputs.low, inputs.high
    if method == "percentile":
        return percentile_range(inputs.histogram, _ends(inputs), percentile)
    return entropy_range(inputs.histogram, _ends(inputs))


def percentile_range(histogram: NDArray[np.int64], ends: Range, percentile: float) -> Range:
    """The range that leaves out an equal share of the values at both ends, ``percentile`` per cent lying in it."""
    edges = np.linspace(*ends, len(histogram) + 1)
    shares = np.cumsum(histogram) / max(1, histogram.sum())
    outside = (100 - percentile) / 200
    first = int(np.searchsorted(shares, outside, side="right"))
    last = int(np.searchsorted(shares, 1 - outside, side="left"))
    return float(edges[min(first, len(histogram) - 1)]), float(edges[min(last, len(histogram) - 1) + 1])


def entropy_range(histogram: NDArray[np.int64], ends: Range) -> Range:
    """The range whose 8-bit picture of the values' sizes diverges least from them.

    min over t of KL(P || Q): P is the histogram of |x| cut at t with what lies beyond added to the last bin, Q the same
    without that, spread evenly over 128 levels (Migacz 2017, 8-bit inference with TensorRT, GTC).
    """
    sizes = _sizes(histogram, ends)
    largest = max(-ends[0], ends[1])
    width = largest / len(sizes)
    candidates = range(_LEVELS, len(sizes) + 1, max(1, len(sizes) // 256))
    divergences = [_divergence(sizes, count) for count in candidates]
    threshold = candidates[int(np.argmin(divergences))] * width
    return max(ends[0], -threshold), min(ends[1], threshold)


def _sizes(histogram: NDArray[np.int64], ends: Range) -> NDArray[np.float64]:
    """The histogram [bins] of |x| between 0 and the larger end."""
    edges = np.linspace(*ends, len(histogram) + 1)
    middles = np.abs((edges[1:] + edges[:-1]) / 2)
    counts, _ = np.histogram(middles, bins=len(histogram) // 2, range=(0, max(-ends[0], ends[1])), weights=histogram)
    return np.asarray(counts, np.float64)


def _divergence(sizes: NDArray[np.float64], count: int) -> float:
    """KL of the first ``count`` bins, with the rest in the last of them, from their picture in 128 levels."""
    inside = sizes[:count]
    if not inside.any():
        return np.inf
    reference = inside.copy()
    reference[-1] += sizes[count:].sum()
    levels = np.arange(count) * _LEVELS // count
    present = reference > 0
    totals = np.bincount(levels, inside, _LEVELS)
    numbers = np.bincount(levels, present, _LEVELS)
    picture = np.where(present, totals[levels] / np.maximum(1, numbers[levels]), 0)
    p, q = reference / reference.sum(), picture / picture.sum()
    chosen = present & (q > 0)
    # What the picture has lost altogether diverges without bound: a very small probability stands for it.
    lost = p[present & (q <= 0)]
    return float((p[chosen] * np.log(p[chosen] / q[chosen])).sum() + (lost * np.log(lost / 1e-9)).sum())
