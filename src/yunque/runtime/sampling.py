"""From logits to tokens, for all rows of a batch at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_HEAD = 256
"""Tokens looked at first for top-p: nearly always they hold its share of the probability."""


def uniform(seeds: NDArray[np.uint64], steps: Ints) -> NDArray[np.float64]:
    """One number in [0, 1) per row from its seed and step alone: SplitMix64 (Steele et al., 2014) as a hash."""
    with np.errstate(over="ignore"):
        state = _mixed(seeds + np.uint64(0x9E3779B97F4A7C15)) + np.uint64(0x9E3779B97F4A7C15) * (
            steps.astype(np.uint64) + np.uint64(1)
        )
        return (_mixed(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def penalize_repetition(logits: Floats, context: Ints, lengths: Ints, penalty: Floats) -> None:
    """Divide positive and multiply negative logits of the tokens in ``context`` [rows, width] by ``penalty``, in place.

    Row r's context is its first ``lengths[r]`` tokens (Keskar et al., 2019, arXiv:1909.05858).
    """
    width = int(lengths.max())
    context = context[: len(lengths)]
    known = np.arange(width) < lengths[:, None]
    tokens = np.where(known, context[:, :width], context[:, :1])  # the rest repeats the first token
    found = np.take_along_axis(logits, tokens, axis=1)
    scale = penalty[:, None]
    np.put_along_axis(logits, tokens, np.where(found < 0, found * scale, found / scale), axis=1)


def forbid_repeated_ngrams(logits: Floats, context: Ints, lengths: Ints, sizes: Ints) -> None:
    """Set logits to -inf, in place, of tokens that would end a sequence of ``sizes[r]`` tokens that row r has already.

    Row r's context is its first ``lengths[r]`` tokens; size 0 forbids nothing (Paulus et al., 2018, arXiv:1705.04304).
    """
    for size in np.unique(sizes[(sizes > 0) & (lengths >= sizes)]).tolist():
        rows = np.flatnonzero((sizes == size) & (lengths >= size))
        ends = lengths[rows]
        windows = np.lib.stride_tricks.sliding_window_view(context[rows, : int(ends.max())], size, axis=1)
        newest = np.take_along_axis(context[rows], ends[:, None] + np.arange(1 - size, 0), axis=1)
        same = (windows[:, :, : size - 1] == newest[:, None]).all(axis=2)
        found, places = np.nonzero(same & (np.arange(windows.shape[1]) <= ends[:, None] - size))
        logits[rows[found], windows[found, places, size - 1]] = -np.inf


def log_probabilities(logits: Floats, tokens: Ints) -> Floats:
    """Log-probability of one token per row of ``logits`` [rows, vocabulary]."""
    top = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64)) + top[:, 0]
    chosen = np.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return np.asarray(chosen - total, dtype=np.float32)


def top_log_probabilities(logits: Floats, count: int) -> tuple[Ints, Floats]:
    """The ``count`` most probable tokens of every row of ``logits`` [rows, vocabulary], best first, and their logs."""
    count = min(count, logits.shape[1])
    some = np.argpartition(logits, -count, axis=1)[:, -count:]
    falling = np.argsort(-np.take_along_axis(logits, some, axis=1), axis=1, kind="stable")
    tokens = np.take_along_axis(some, falling, axis=1)
    top = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64))[:, None] + top
    return tokens, np.asarray(np.take_along_axis(logits, tokens, axis=1) - total, dtype=np.float32)


def sample(logits: Floats, temperature: Floats, top_k: Ints, top_p: Floats, uniforms: NDArray[np.float64]) -> Ints:
    """Draw one token per row of ``logits`` [rows, vocabulary] by inverting its distribution at ``uniforms``.

    The distribution is the softmax at ``temperature`` of the ``top_k`` best tokens (0: all), of which the fewest are
    kept that hold ``top_p`` of the probability (Holtzman et al., 2019, arXiv:1904.09751).
    """
    scaled = logits / temperature[:, None]
    whole_rows = (top_k == 0) & (top_p >= 1)
    if whole_rows.all():
        return _invert(_exponentials(scaled), uniforms)
    if whole_rows.any():  # they are inverted in another order, so that a row's token must not depend on the others
        tokens = np.empty(len(logits), np.int64)
        for some in (np.flatnonzero(whole_rows), np.flatnonzero(~whole_rows)):
            tokens[some] = sample(logits[some], temperature[some], top_k[some], top_p[some], uniforms[some])
        return tokens
    size = scaled.shape[1]
    limits = np.where(top_k == 0, size, np.minimum(top_k, size))
    width = int(limits.max()) if (top_k > 0).all() else min(_HEAD, size)
    order, weights, whole = _best(scaled, limits, width)
    while width < size and not _holds_share(weights, whole, limits, top_p):
        width = size
        order, weights, whole = _best(scaled, limits, width)
    before = np.cumsum(weights, axis=1) - weights
    weights[before >= top_p[:, None].astype(np.float64) * whole[:, None]] = 0
    places = _invert(weights, uniforms)
    return np.take_along_axis(order, places[:, None], axis=1)[:, 0]


def _best(scaled: Floats, limits: Ints, width: int) -> tuple[Ints, NDArray[np.float64], NDArray[np.float64]]:
    """The ``width`` best tokens of every row in falling order, their weights, and the weight of all allowed tokens."""
    if width < scaled.shape[1]:
        some = np.argpartition(scaled, -width, axis=1)[:, -width:]
        values = np.take_along_axis(scaled, some, axis=1)
        falling = np.argsort(-values, axis=1, kind="stable")
        order = np.take_along_axis(some, falling, axis=1)
    else:
        order = np.argsort(-scaled, axis=1, kind="stable")
    best = np.take_along_axis(scaled, order, axis=1).astype(np.float64)
    weights = np.exp(best - best[:, :1])
    weights[np.arange(width) >= limits[:, None]] = 0
    all_allowed = limits >= scaled.shape[1]
    whole = weights.sum(axis=1)
    if all_allowed.any() and width < scaled.shape[1]:
        whole[all_allowed] = _exponentials(scaled[all_allowed]).sum(axis=1)
    return order, weights, whole


def _holds_share(weights: NDArray[Any], whole: NDArray[Any], limits: Ints, top_p: Floats) -> bool:
    """Whether the best tokens at hand hold all that a row may choose from."""
    enough = (limits <= weights.shape[1]) | (weights.sum(axis=1) >= top_p * whole)
    return bool(enough.all() and not ((top_p >= 1) & (limits > weights.shape[1])).any())


def _exponentials(scaled: Floats) -> NDArray[np.float64]:
    return np.exp(scaled.astype(np.float64) - scaled.max(axis=1, keepdims=True))


def _invert(weights: NDArray[np.float64], uniforms: NDArray[np.float64]) -> Ints:
    """The first place of every row where the running sum passes ``uniforms`` times the whole."""
    running = np.cumsum(weights, axis=1)
    target = uniforms * running[:, -1]
    return np.asarray((running <= target[:, None]).sum(axis=1), dtype=np.int64)
