"""BLEU with the sacrebleu library, in its points (0 to 100)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from yunque.errors import InputError


def sentence_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """BLEU of each row in 0..100, shape [num_rows]: exponential smoothing, effective order (sacrebleu's defaults).

    BLEU was made for corpora; a row's value serves to pair rows, not to be quoted.

    Raises:
        InputError: unequal numbers of rows, a row without references.
    """
    from sacrebleu.metrics import BLEU

    _check(predictions, references)
    metric = BLEU(effective_order=True)
    pairs = zip(predictions, references, strict=True)
    return np.array([metric.sentence_score(prediction, list(targets)).score for prediction, targets in pairs])


def corpus_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of all rows together in 0..100 (13a tokens, exponential smoothing); rows may differ in their references.

    Raises:
        InputError: as ``sentence_bleu``; no rows.
    """
    from sacrebleu.metrics import BLEU

    _check(predictions, references)
    if not predictions:
        raise InputError("BLEU: there are no rows")
    streams = [list(stream) for stream in itertools.zip_longest(*references)]  # a missing reference is None
    return float(BLEU(force=True).corpus_score(list(predictions), streams).score)


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references):
        raise InputError(f"BLEU: {len(predictions)} predictions but references for {len(references)} rows")
    for row, targets in enumerate(references):
        if not targets:
            raise InputError(f"BLEU: row {row} has no reference")
