"""Texts as token ids, the beginning that a tokenizer puts before a text (``<s>``) never twice."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from yunque.runtime.tokenizer import leading_tokens, without_second


def encode(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """Token ids of each text as a transformers ``tokenizer`` makes them; ``options`` are its own.

    A text that begins with the tokenizer's beginning, as one that was rendered by a chat template, gets no second one.
    """
    if not texts:
        return []
    rows = tokenizer(list(texts), return_attention_mask=False, verbose=False, **options)["input_ids"]
    lead = beginning(tokenizer) if options.get("add_special_tokens", True) else []
    return [without_second(lead, row, row) for row in rows]


def beginning(tokenizer: Any) -> list[int]:
    """Special tokens that ``tokenizer`` puts before every text."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return leading_tokens(plain, whole)


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
