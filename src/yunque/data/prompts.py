"""Turn texts into prompts: length filters, the template, truncation that cuts the text only and is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import datasets

from yunque.data.arguments import TEXT_FIELD, DataArguments
from yunque.data.chat import MESSAGES, prompt_text
from yunque.data.encoding import encode
from yunque.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNLIMITED_TOKENS = 10**9  # transformers writes 10**30 where a tokenizer states no limit
BATCH_ROWS = 1000


@dataclass(frozen=True)
class TruncationReport:
    """What became of the rows: every one of them is kept, dropped or cut, and counted."""

    rows_read: int
    dropped_chars: int
    dropped_tokens: int
    truncated: int
    tokens_lost: int
    prompt_tokens_limit: int | None

    @property
    def rows_kept(self) -> int:
        """Prompts that are left."""
        return self.rows_read - self.dropped_chars - self.dropped_tokens

    def __str__(self) -> str:
        """One line for the user."""
        cut = (
            f"{self.truncated:,} cut to {self.prompt_tokens_limit:,} tokens ({self.truncated / self.rows_kept:.1%} of"
            f" them, {self.tokens_lost:,} tokens lost)"
            if self.truncated
            else "none cut"
        )
        return (
            f"prompts: {self.rows_read:,} rows read, {self.dropped_chars:,} dropped by characters,"
            f" {self.dropped_tokens:,} by tokens, {self.rows_kept:,} kept, {cut}"
        )


@dataclass(frozen=True)
class PreparedPrompts:
    """The rows that are left, with "query" (the prompt as text) and "input_ids" added, and the report."""

    dataset: datasets.Dataset
    report: TruncationReport


def prepare_prompts(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    *,
    append_eos: bool = True,
    model_limit: int | None = None,
    special_tokens: bool = True,
) -> PreparedPrompts:
    """Filter ``dataset`` by "text", put each text into the template and tokenize it.

    A prompt of more than ``max_prompt_length`` tokens (default: the tokenizer's limit; never more than
    ``model_limit``) loses the end of its text, never the template around it. ``append_eos`` leaves the tokenizer to
    end a prompt as it does (encoder-decoder models); without it no prompt ends with eos (decoder-only models).
    Rows with columns "head" and "tail" (``yunque.data.instructions``) have templates of their own, which stand in for
    that of ``args``; those with a chat template hold the special tokens too (``special_tokens`` off).

    Raises:
        InputError: no row is left (the filter is named), the template alone fills the limit.
    """
    if MESSAGES in dataset.column_names:
        return _prepare_conversations(dataset, tokenizer, args, model_limit)
    texts = list(dataset["text"])
    kept = _filter(
        list(range(len(texts))), [len(text) for text in texts], args, "min_text_chars", "max_text_chars", "characters"
    )
    prompter = _Prompter(tokenizer, append_eos, special_tokens)
    frames = _frames(dataset, args.prompt_template)
    ids = dict(zip(kept, prompter.encode([texts[row] for row in kept], [frames[row] for row in kept]), strict=True))
    dropped_chars = len(texts) - len(kept)
    kept = _filter(
        kept, [len(ids[row]) for row in kept], args, "min_prompt_tokens", "max_prompt_tokens", "tokens of the prompt"
    )
    dropped_tokens = len(texts) - dropped_chars - len(kept)
    queries = {row: _fill(texts[row], frames[row]) for row in kept}
    limit = _limit(tokenizer, args, model_limit)
    long_rows = [row for row in kept if limit is not None and len(ids[row]) > limit]
    tokens_lost = 0
    if limit is not None and long_rows:
        long_frames = [frames[row] for row in long_rows]
        num_tokens = [len(ids[row]) for row in long_rows]
        cut = prompter.truncate([texts[row] for row in long_rows], long_frames, num_tokens, limit)
        for row, (text, text_ids) in zip(long_rows, cut, strict=True):
            tokens_lost += len(ids[row]) - len(text_ids)
            queries[row], ids[row] = _fill(text, frames[row]), text_ids
    report = TruncationReport(len(texts), dropped_chars, dropped_tokens, len(long_rows), tokens_lost, limit)
    columns = {name: list(dataset.select(kept)[name]) for name in dataset.column_names}
    columns |= {"query": [queries[row] for row in kept], "input_ids": [ids[row] for row in kept]}
    return PreparedPrompts(datasets.Dataset.from_dict(columns), report)


def _prepare_conversations(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments, model_limit: int | None
) -> PreparedPrompts:
    """Prompts by the tokenizer's chat template; a conversation that is too long is left out: it has no end to cut."""
    queries = [prompt_text(tokenizer, row) for row in dataset[MESSAGES]]
    ids = encode(tokenizer, queries, add_special_tokens=False)
    limit = _limit(tokenizer, args, model_limit)
    rows = list(range(len(queries)))
    kept = _filter(rows, [len(query) for query in queries], args, "min_text_chars", "max_text_chars", "characters")
    fitting = [row for row in kept if limit is None or len(ids[row]) <= limit]
    if not fitting:
        raise InputError(f"max_prompt_length: no conversation has at most {limit} tokens; raise it")
    report = TruncationReport(len(rows), len(rows) - len(kept), len(kept) - len(fitting), 0, 0, limit)
    columns = {name: list(dataset.select(fitting)[name]) for name in dataset.column_names}
    columns |= {"query": [queries[row] for row in fitting], "input_ids": [ids[row] for row in fitting]}
    return PreparedPrompts(datasets.Dataset.from_dict(columns), report)


Frame = tuple[str, str]
"""What stands before and behind the text in a prompt."""


def _frames(dataset: datasets.Dataset, template: str) -> list[Frame]:
    if "head" in dataset.column_names:
        return list(zip(dataset["head"], dataset["tail"], strict=True))
    head, _, tail = template.partition(TEXT_FIELD)  # not str.format: other braces are plain text
    return [(head, tail)] * len(dataset)


def _fill(text: str, frame: Frame) -> str:
    return frame[0] + text + frame[1]


class _Prompter:
    """A tokenizer: texts and their frames in, token ids of the prompts out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, append_eos: bool, special_tokens: bool) -> None:
        self.tokenizer, self.append_eos, self.special_tokens = tokenizer, append_eos, special_tokens

    def encode(self, texts: Sequence[str], frames: Sequence[Frame]) -> list[list[int]]:
        filled = [_fill(text, frame) for text, frame in zip(texts, frames, strict=True)]
        ids: list[list[int]] = []
        for start in range(0, len(filled), BATCH_ROWS):
            rows = filled[start : start + BATCH_ROWS]
            ids += encode(self.tokenizer, rows, add_special_tokens=self.special_tokens)
        if not self.append_eos:
            ids = [row[:-1] if row and row[-1] == self.tokenizer.eos_token_id else row for row in ids]
        return ids

    def truncate(
        self, texts: Sequence[str], frames: Sequence[Frame], num_tokens: Sequence[int], limit: int
    ) -> list[tuple[str, list[int]]]:
        """Return for each text its longest head whose prompt has at most ``limit`` tokens, with the prompt's ids.

        A search over lengths in characters, so the prompt stays text that any tokenizer, fast or slow, encodes to
        exactly these ids. Tokens grow almost evenly with characters: interpolation needs few rounds, and every
        fourth one is a bisection, which bounds them.
        """
        fits = [(0, empty) for empty in self.encode([""] * len(texts), frames)]  # characters kept, ids of that prompt
        if (longest := max(len(empty) for _, empty in fits)) >= limit:
            raise InputError(
                f"max_prompt_length: {limit} tokens leave no room for the text, since the template alone takes"
                f" {longest}; raise max_prompt_length or shorten prompt_template"
            )
        too_long = [(len(text), count) for text, count in zip(texts, num_tokens, strict=True)]
        rounds = 0
        while active := [row for row in range(len(texts)) if too_long[row][0] - fits[row][0] > 1]:
            guesses = []
            for row in active:
                (low, ids), (high, count) = fits[row], too_long[row]
                even = rounds % 4 == 3 or len(ids) == limit
                share = 0.5 if even else (limit - len(ids)) / (count - len(ids))
                guesses.append(min(max(low + int((high - low) * share), low + 1), high - 1))
            heads = [texts[row][:guess] for row, guess in zip(active, guesses, strict=True)]
            encoded = self.encode(heads, [frames[row] for row in active])
            for row, guess, ids in zip(active, guesses, encoded, strict=True):
                if len(ids) <= limit:
                    fits[row] = (guess, ids)
                else:
                    too_long[row] = (guess, len(ids))
            rounds += 1
        return [(text[:length], ids) for text, (length, ids) in zip(texts, fits, strict=True)]


def _limit(tokenizer: PreTrainedTokenizerBase, args: DataArguments, model_limit: int | None) -> int | None:
    wanted = args.max_prompt_length if args.max_prompt_length is not None else tokenizer.model_max_length
    limit = wanted if model_limit is None else min(wanted, model_limit)
    return limit if limit < UNLIMITED_TOKENS else None


def _filter(rows: list[int], sizes: list[int], args: DataArguments, minimum: str, maximum: str, unit: str) -> list[int]:
    low, high = getattr(args, minimum), getattr(args, maximum)
    kept = [
        row
        for row, size in zip(rows, sizes, strict=True)
        if (low is None or size >= low) and (high is None or size <= high)
    ]
    if kept:
        return kept
    if not rows:
        raise InputError("dataset_name: there are no rows to make prompts of")
    limits = [f"{name}={value}" for name, value in ((minimum, low), (maximum, high)) if value is not None]
    raise InputError(
        f"{' and '.join(limits)}: no row of {len(rows):,} is left; the lengths run from {min(sizes):,} to"
        f" {max(sizes):,} {unit}"
    )
