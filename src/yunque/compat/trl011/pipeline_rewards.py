"""Notice rewards that were taken by position from a pipeline whose labels are sorted by score."""

from __future__ import annotations

import warnings
from collections import defaultdict, deque
from collections.abc import Sequence
from functools import wraps
from typing import Any

import numpy as np
from transformers import TextClassificationPipeline

_recent: deque[list[dict[str, Any]]] = deque(maxlen=8192)  # outputs of every pipeline since the last step


def watch_pipelines() -> None:
    """Keep what text-classification pipelines answer from now on; a second call changes nothing."""
    original = TextClassificationPipeline.postprocess
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def kept(*args: Any, **options: Any) -> Any:
        output = original(*args, **options)
        if isinstance(output, list) and len(output) > 1:
            _recent.append(output)
        return output

    TextClassificationPipeline.postprocess = kept  # type: ignore[method-assign]


def warn_of_positions(scores: Sequence[float]) -> bool:
    """Warn, and say so, where all ``scores`` stood at one position of recent outputs but are of several labels.

    Forgets the outputs: those of one step are for its scores.
    """
    found = defaultdict(set)
    for output in _recent:
        for position, entry in enumerate(output):
            found[np.float32(entry["score"])].add((position, entry["label"]))
    _recent.clear()
    places = [found.get(np.float32(score), set()) for score in scores]
    if not places or not all(places):
        return False  # other numbers, or changed ones
    positions = set.intersection(*({position for position, _ in place} for place in places))
    if not positions or set.intersection(*({label for _, label in place} for place in places)):
        return False
    labels = sorted({label for place in places for position, label in place if position in positions})
    warnings.warn(
        f"scores: taken by position {min(positions)} from a pipeline that sorts labels by score, they are of "
        f"{', '.join(labels)}, whichever was larger; take one label: "
        "yunque.compat.evaluate.label_scores(outputs, label)",
        UserWarning,
        stacklevel=3,
    )
    return True
