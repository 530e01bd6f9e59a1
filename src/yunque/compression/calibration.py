"""Batches that importance and ranges are measured on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
from torch import Tensor

from yunque.compression.distillation import collator
from yunque.compression.importance import Batches


def calibration_batches(rows: datasets.Dataset, tokenizer: Any, model: Any, batch_size: int) -> Batches:
    """Rows of "input_ids" and "labels", similar lengths together, as padded inputs of ``model`` on its device."""
    collate = collator(tokenizer, model)
    listed = sorted(rows, key=lambda row: len(row["input_ids"]))

    def batches() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(listed), batch_size):
            yield dict(collate(listed[start : start + batch_size]).to(model.device))

    return batches
