"""Prompts that are the first few tokens of texts, and the text of tokens that go on from them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from yunque.data.arguments import OpeningArguments
from yunque.data.encoding import beginning
from yunque.data.loading import ROW, LoadedData, RawSplit, load_pair, require_column, row_as_json, text_of
from yunque.errors import InputError
from yunque.runtime.tokenizer import without_second

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 1000


@dataclass(frozen=True)
class PreparedOpenings:
    """The rows that are left, with "query" (the opening as text) and "input_ids" added, and how many were dropped."""

    dataset: datasets.Dataset
    rows_read: int
    dropped_chars: int
    dropped_tokens: int

    def __str__(self) -> str:
        """One line for the user."""
        return (
            f"prompts: {self.rows_read:,} rows read, {self.dropped_chars:,} dropped by characters,"
            f" {self.dropped_tokens:,} with fewer tokens than their prompt, {len(self.dataset):,} kept"
        )


def load_texts(args: OpeningArguments, seed: int, *, keep_columns: bool = False) -> LoadedData:
    """Load train and test rows with the columns "number" (of the row in its split) and "text".

    ``keep_columns`` adds "row": all of the file's own columns as JSON, for reward functions.

    Raises:
        InputError: nothing readable under ``dataset_name``, a missing split or column, no usable row.
    """
    return load_pair(args, seed, functools.partial(_text_rows, args, keep_columns))


def prepare_openings(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: OpeningArguments,
    *,
    seed: int,
    model_limit: int | None = None,
) -> PreparedOpenings:
    """Filter ``dataset`` by "text" and keep of each text the first n tokens, n uniform in the range of ``args``.

    n depends on ``seed`` and the row's "number" only, whichever rows beside it are used. Special tokens that the
    tokenizer puts before a text stand before its opening too and do not count; those it puts behind are left out.

    Raises:
        InputError: no row is left, or a prompt has more than ``model_limit`` tokens.
    """
    low, high = args.min_text_chars or 1, args.max_text_chars or float("inf")
    rows = [row for row in dataset if low <= len(row["text"]) <= high]
    kept: list[dict[str, Any]] = []
    first = beginning(tokenizer)
    for start in range(0, len(rows), BATCH_ROWS):
        batch = rows[start : start + BATCH_ROWS]
        encoded = tokenizer([row["text"] for row in batch], return_special_tokens_mask=True, verbose=False)
        for row, found, mask in zip(batch, encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
            ids, special = (without_second(first, found, values) for values in (found, mask))
            size = _prompt_tokens(args, seed, row["number"])
            lead = special.index(0) if 0 in special else len(special)
            if sum(special[lead : lead + size]) == 0 and len(ids) >= lead + size:
                opening = tokenizer.decode(ids[lead : lead + size], clean_up_tokenization_spaces=False)
                kept.append({**row, "query": opening, "input_ids": ids[: lead + size]})
    if not kept:
        raise InputError(
            f"min_text_chars={args.min_text_chars}, max_text_chars={args.max_text_chars},"
            f" prompt_tokens_low={args.prompt_tokens_low}: no row of {len(dataset):,} is left; widen them"
        )
    longest = max(len(row["input_ids"]) for row in kept)
    if model_limit is not None and longest > model_limit:
        raise InputError(f"prompt_tokens_high: prompts of {longest} tokens, but the model has room for {model_limit}")
    return PreparedOpenings(
        datasets.Dataset.from_list(kept), len(dataset), len(dataset) - len(rows), len(rows) - len(kept)
    )


def continuation_decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    """Return the function from tokens to their text inside a longer text.

    Tokenizers of the SentencePiece kind drop the space before the first word of what they decode; a response glued to
    its query without it is another text. So an ordinary token is decoded in front and its text taken off again.
    """

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    special = set(tokenizer.all_special_ids)
    ordinary = (token for token in sorted(tokenizer.get_vocab().values()) if token not in special)
    anchor = next(token for token in ordinary if decode([token]).isalnum())
    return lambda tokens: decode([anchor, *tokens])[len(decode([anchor])) :]


def _text_rows(args: OpeningArguments, keep_columns: bool, raw: RawSplit) -> list[dict[str, Any]]:
    require_column(raw, args.text_column, "text_column")
    rows = []
    for number, row in enumerate(raw.rows):
        text = text_of(row.get(args.text_column), f"text_column: '{args.text_column}'")
        if text is not None:
            kept = {ROW: row_as_json(raw, row)} if keep_columns else {}
            rows.append({"number": number, "text": text, **kept})
    return rows


def _prompt_tokens(args: OpeningArguments, seed: int, number: int) -> int:
    stream = np.random.default_rng([seed, number])
    return int(stream.integers(args.prompt_tokens_low, args.prompt_tokens_high + 1))
