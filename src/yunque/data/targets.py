"""Reference answers as labels, cut to a length and counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import datasets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_targets(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_target_length: int
) -> tuple[datasets.Dataset, str]:
    """Rows of "input_ids" and "labels" (the first reference, at most ``max_target_length`` tokens) for a Trainer.

    A cut answer keeps its end-of-sequence token. Also returns one line that says how many were cut.
    """
    texts = [references[0] for references in dataset["references"]]
    whole = tokenizer(text_target=texts, verbose=False)["input_ids"]
    labels = tokenizer(text_target=texts, truncation=True, max_length=max_target_length)["input_ids"]
    lost = [len(full) - len(cut) for full, cut in zip(whole, labels, strict=True) if len(full) > len(cut)]
    report = f"answers: {len(texts):,}, cut to {max_target_length} tokens: {len(lost):,} ({sum(lost):,} tokens lost)"
    return datasets.Dataset.from_dict({"input_ids": list(dataset["input_ids"]), "labels": labels}), report
