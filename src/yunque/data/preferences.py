"""Preference pairs: a prompt with a chosen and a rejected answer, from pairs, hh-rlhf's dialogues or rankings."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from yunque.data import chat
from yunque.data.arguments import PreferenceArguments
from yunque.data.loading import (
    LoadedData,
    LoadedSplit,
    RawSplit,
    find_split,
    group_columns,
    load_one,
    load_pair,
    open_source,
    require_column,
    text_of,
)
from yunque.errors import InputError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
EQUAL = "pairs with two equal answers"
MISSING = "rows without a prompt or an answer"
UNLIKE = "rows whose dialogues differ before the last answer"
NO_DIALOGUE = "rows whose dialogues do not end with an answer"
TIED = "pairs of tied answers"
UNRANKED = "answers without a rank"
SINGLE = "rankings of fewer than two answers"


@dataclass
class LoadedPairs(LoadedData):
    """Train and test pairs with "prompt", "chosen", "rejected" and maybe "margin" and "group", and what was left out.

    ``left_out`` counts by split and reason; ``prompt + chosen`` is the whole text, whatever it came from.
    """

    left_out: dict[str, dict[str, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for the user."""
        pairs = ", ".join(f"{source['split']} {source['rows']:,} pairs" for source in self.sources)
        dropped = "".join(
            f"; left out of {split}: " + ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
            for split, reasons in self.left_out.items()
            if reasons
        )
        return f"data {self.sources[0]['name']}: {pairs}{dropped}"


def load_preferences(args: PreferenceArguments, seed: int) -> LoadedPairs:
    """Load train and test pairs with "prompt", "chosen", "rejected" and, where asked for, "margin" and "group".

    Without a test split the pairs of one opening question are held out together. Of hh-rlhf's dialogues the prompt
    ends with "Assistant:" and the answers begin with the space that follows it.

    Raises:
        InputError: as ``load_splits``, lists of unequal lengths, no usable pair; what was left out is said.
    """
    left_out: dict[str, dict[str, int]] = {}

    def normalise(raw: RawSplit) -> list[dict[str, Any]]:
        pairs, left_out[raw.split] = _usable_pairs(args, raw)
        return pairs

    data = load_pair(args, seed, normalise, together=lambda pair: opening_question(pair["prompt"]))
    dropped = {split: sum(counts.values()) for split, counts in left_out.items()}
    return LoadedPairs(data.train, data.test, data.sources, dropped, left_out)


def load_preference_split(args: PreferenceArguments) -> LoadedSplit:
    """Load all usable pairs of the split ``train_split``, for a second test set.

    Raises:
        InputError: as ``load_preferences``.
    """
    loaded = load_one(args, "train_split", lambda raw: _usable_pairs(args, raw)[0])
    return LoadedSplit(loaded.rows, loaded.source, max(0, loaded.dropped_empty))


def holds_pairs(args: PreferenceArguments) -> bool:
    """Whether the train split has the columns of pairs or of rankings.

    Raises:
        InputError: nothing readable under ``dataset_name``, or no such split.
    """
    readers = open_source(args)
    columns = readers[find_split(args, readers, "train_split")]().columns
    return any(name in columns for name in (args.chosen_column, args.rejected_column, args.completions_column))


def opening_question(prompt: str) -> str:
    """The prompt up to the assistant's first answer: what belongs to one conversation begins alike."""
    return prompt.split(ASSISTANT, 1)[0].strip()


def split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str] | str:
    """Split two of hh-rlhf's dialogues into their common prompt and their last answers; else the reason why not."""
    ends = [text.rfind(ASSISTANT) + len(ASSISTANT) for text in (chosen, rejected)]
    if any(ASSISTANT not in text or HUMAN in text[end:] for text, end in zip((chosen, rejected), ends, strict=True)):
        return NO_DIALOGUE
    if chosen[: ends[0]] != rejected[: ends[1]]:
        return UNLIKE
    return chosen[: ends[0]], chosen[ends[0] :], rejected[ends[1] :]


def _usable_pairs(args: PreferenceArguments, raw: RawSplit) -> tuple[list[dict[str, Any]], dict[str, int]]:
    counts: Counter[str] = Counter()
    pairs = [pair for pair in _pairs(args, raw, counts) if _unequal(pair, counts)]
    if not pairs:
        why = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        raise InputError(f"dataset_name: split '{raw.split}' of '{raw.name}' holds no usable pair: {why}")
    return pairs, dict(counts)


def _pairs(args: PreferenceArguments, raw: RawSplit, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    groups = group_columns(args, raw)
    ranked = args.completions_column in raw.columns
    if ranked:
        require_column(raw, args.prompt_column, "prompt_column")
    else:
        require_column(raw, args.chosen_column, "chosen_column")
        require_column(raw, args.rejected_column, "rejected_column")
    if args.margin_from_scores:
        _check_scores(args, raw, ranked)
    if args.margin_column is not None:
        if ranked:
            raise InputError("margin_column: rankings have no margins of their own; set margin_from_scores instead")
        require_column(raw, args.margin_column, "margin_column")
    for number, row in enumerate(raw.rows, 1):
        where = f"row {number} of split '{raw.split}' of '{raw.name}'"
        for pair in _ranked(args, raw, row, where, counts) if ranked else _single(args, raw, row, where, counts):
            for column in groups:
                pair["group"] = text_of(row.get(column), f"group_column: '{column}'") or ""
            yield pair


def _single(
    args: PreferenceArguments, raw: RawSplit, row: Mapping[str, Any], where: str, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    if chat.is_conversation(row.get(args.chosen_column)):
        yield from _conversations(args, row, where, counts)
        return
    chosen = text_of(row.get(args.chosen_column), f"chosen_column: {where}")
    rejected = text_of(row.get(args.rejected_column), f"rejected_column: {where}")
    if chosen is None or rejected is None:
        counts[MISSING] += 1
        return
    if args.prompt_column in raw.columns:
        prompt = text_of(row.get(args.prompt_column), f"prompt_column: {where}")
    else:
        parts = split_dialogues(chosen, rejected)
        if isinstance(parts, str):
            counts[parts] += 1
            return
        prompt, chosen, rejected = parts
    if prompt is None or not chosen.strip() or not rejected.strip():
        counts[MISSING] += 1
        return
    pair: dict[str, Any] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if args.margin_column is not None:
        pair["margin"] = _margin(row.get(args.margin_column), f"margin_column: {where}")
    yield pair


def _conversations(
    args: PreferenceArguments, row: Mapping[str, Any], where: str, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """A pair of messages: with a prompt of messages or a text, or two conversations that begin alike."""
    if not chat.is_conversation(row.get(args.rejected_column)):
        raise InputError(f"rejected_column: {where}: '{args.chosen_column}' holds messages, and this does not")
    columns = (("chosen_column", args.chosen_column), ("rejected_column", args.rejected_column))
    sides = [chat.read_messages(row[column], f"{option}: {where}") for option, column in columns]
    given = row.get(args.prompt_column)
    if chat.is_conversation(given):
        prompt = chat.read_messages(given, f"prompt_column: {where}")
    else:  # two whole conversations; a text beside them is their first message once more
        same = zip(*sides, strict=False)
        shared = next((place for place, (one, other) in enumerate(same) if one != other), min(map(len, sides)))
        shared = min(shared, *(len(side) - 1 for side in sides))
        prompt, sides = sides[0][:shared], [side[shared:] for side in sides]
    if not prompt or not all(side and side[-1]["role"] == chat.ASSISTANT for side in sides):
        counts[NO_DIALOGUE] += 1
        return
    chosen, rejected = sides
    texts = {name: chat.content_of(side[-1]) for name, side in (("chosen", chosen), ("rejected", rejected))}
    if not all(text.strip() for text in texts.values()):
        counts[MISSING] += 1
        return
    messages = json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    pair: dict[str, Any] = {"prompt": chat.content_of(prompt[0]), **texts, chat.MESSAGES: messages}
    if args.margin_column is not None:
        pair["margin"] = _margin(row.get(args.margin_column), f"margin_column: {where}")
    yield pair


def _ranked(
    args: PreferenceArguments, raw: RawSplit, row: Mapping[str, Any], where: str, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    by_rank = args.ranks_column in raw.columns and not args.margin_from_scores
    option = "ranks_column" if by_rank else "scores_column"
    column = args.ranks_column if by_rank else require_column(raw, args.scores_column, option)[0]
    prompt = text_of(row.get(args.prompt_column), f"prompt_column: {where}")
    answers, values = row.get(args.completions_column), row.get(column)
    if not isinstance(answers, list | tuple) or not isinstance(values, list | tuple) or len(answers) != len(values):
        raise InputError(
            f"{option}: {where}: '{args.completions_column}' and '{column}' must be lists of the same length"
        )
    texts = [text_of(answer, f"completions_column: {where}") for answer in answers]
    goodness = [_goodness(value, by_rank, f"{option}: {where}") for value in values]
    kept = []
    for text, good in zip(texts, goodness, strict=True):
        if text is None or prompt is None:
            counts[MISSING] += 1
        elif good is None and args.unranked == "drop":
            counts[UNRANKED] += 1
        else:
            kept.append((text, -math.inf if good is None else good))
    if len(kept) < 2:
        counts[SINGLE] += 1
    for (first, good_first), (second, good_second) in itertools.combinations(kept, 2):
        if good_first == good_second:
            counts[TIED] += 1
            continue
        chosen, rejected = (first, second) if good_first > good_second else (second, first)
        pair: dict[str, Any] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if args.margin_from_scores:
            pair["margin"] = abs(good_first - good_second)
        yield pair


def _goodness(value: Any, by_rank: bool, where: str) -> float | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    number = _number(value, where)
    return -number if by_rank else number


def _margin(value: Any, where: str) -> float:
    number = _number(value, where)
    if number < 0:
        raise InputError(f"{where}: margin {value} is below 0; swap chosen and rejected, or leave margin_column out")
    return number


def _number(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: {value!r} is no number")
    return number


def _check_scores(args: PreferenceArguments, raw: RawSplit, ranked: bool) -> None:
    if not ranked:
        raise InputError(
            f"margin_from_scores: '{raw.name}' holds no rankings (no column '{args.completions_column}'); for pairs"
            " name their margin_column"
        )
    require_column(raw, args.scores_column, "scores_column")


def _unequal(pair: Mapping[str, Any], counts: Counter[str]) -> bool:
    equal = bool(pair["chosen"].strip() == pair["rejected"].strip())
    counts.update([EQUAL] if equal else [])
    return not equal
