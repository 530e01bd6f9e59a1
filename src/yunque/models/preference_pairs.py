"""Preference pairs as token ids and batches: both answers of a pair are scored in one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import Tensor

from yunque.data.chat import MESSAGES, pair_texts
from yunque.data.encoding import common_length, encode
from yunque.data.targets import encode_answers
from yunque.errors import InputError
from yunque.models.adapter import ModelAdapter, ScoringBatch
from yunque.models.preference_arguments import PairArguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFERENCE = "reference_B2"
_COMPLETION = 256
_ENDING = 4  # tokens that a chat template may end an answer with: its end token, a line break
_MASK, _RESPONSE = "mask_BR", "response_BR"


def encode_pairs(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, adapter: ModelAdapter, args: PairArguments
) -> tuple[datasets.Dataset, str]:
    """Rows of "row" (its number), "prompt_ids", "chosen_ids" and "rejected_ids", and one line on what was left out.

    Answers end with the end-of-sequence token unless they are cut to ``max_completion_length``. A decoder-only model
    reads prompt and answer as one text: where the tokenizer merges across their border, the answer starts earlier.

    Raises:
        InputError: prompts longer than the model takes and no ``max_prompt_length``, or no pair is left.
    """
    size = args.max_completion_length or min(_COMPLETION, max(1, adapter.positions // 2))
    limit = _prompt_limit(adapter, args, size)
    prompts, *answers = _encode(rows, tokenizer, adapter)
    too_long = sum(len(ids) > limit for ids in prompts)
    if too_long and args.max_prompt_length is None:
        raise InputError(
            f"max_prompt_length: {too_long:,} of {len(prompts):,} prompts have over {limit:,} tokens, all that "
            f"{adapter.config.model_type} takes beside answers of {size}; set it to drop them"
        )
    kept, cut, alike = [], 0, 0
    for number, (prompt, chosen, rejected) in enumerate(zip(prompts, *answers, strict=True)):
        if not 0 < len(prompt) <= limit:
            continue
        if chosen[:size] == rejected[:size]:
            alike += 1
            continue
        cut += (len(chosen) > size) + (len(rejected) > size)
        ids = {"prompt_ids": prompt, "chosen_ids": chosen[:size], "rejected_ids": rejected[:size]}
        kept.append({"row": number, **ids})
    report = (
        f"pairs: {len(prompts):,}, left out {too_long:,} with prompts over {limit:,} tokens and {alike:,} whose "
        f"answers are equal as {size:,} tokens, {len(kept):,} kept; answers cut: {cut:,}"
    )
    if not kept:
        raise InputError(f"max_prompt_length: no pair is left ({report}); raise it or max_completion_length")
    return datasets.Dataset.from_list(kept), report


def _prompt_limit(adapter: ModelAdapter, args: PairArguments, size: int) -> int:
    try:
        limit = adapter.prompt_limit(size)
    except InputError as error:
        raise InputError(str(error).replace("max_new_tokens", "max_completion_length")) from error
    return limit if args.max_prompt_length is None else min(limit, args.max_prompt_length)


def _encode(rows: datasets.Dataset, tokenizer: Any, adapter: ModelAdapter) -> list[list[list[int]]]:
    """Token ids of prompts, chosen and rejected answers."""
    texts = {name: list(rows[name]) for name in ("prompt", "chosen", "rejected")}
    templated = MESSAGES in rows.column_names
    if templated:
        pairs = [pair_texts(tokenizer, row) for row in rows[MESSAGES]]
        texts = {name: [pair[name] for pair in pairs] for name in texts}
    eos_ids = adapter.eos_ids
    prompts = encode(tokenizer, texts["prompt"], add_special_tokens=not templated)
    if adapter.config.is_encoder_decoder:
        return [prompts, *(encode_answers(texts[name], tokenizer, eos_ids) for name in ("chosen", "rejected"))]
    wholes = [
        encode(
            tokenizer,
            [a + b for a, b in zip(texts["prompt"], texts[name], strict=True)],
            add_special_tokens=not templated,
        )
        for name in ("chosen", "rejected")
    ]
    encoded: list[list[list[int]]] = [[], [], []]
    for prompt, *both in zip(prompts, *wholes, strict=True):
        appended = len(prompt) > 0 and prompt[-1] == tokenizer.eos_token_id
        border = min(common_length(prompt[:-1] if appended else prompt, whole) for whole in both)
        encoded[0].append(prompt[:border])
        for part, whole in zip(encoded[1:], both, strict=True):
            answer = whole[border:]
            ended = set(answer[-_ENDING:] if templated else answer[-1:]) & set(eos_ids)
            part.append(answer if ended else [*answer, eos_ids[0]])
    return encoded


class PairCollator:
    """Pads B pairs to one flat batch of 2B rows, the chosen answers first, for a Trainer to move to its device."""

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter
        self.reference: Mapping[int, Sequence[float]] | None = None
        """Log-probabilities of the reference for the chosen and the rejected answer, by number of the row."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Model inputs, response_BR and mask_BR, and (B, 2) log-probabilities of the reference where they are known."""
        answers = [row[name] for name in ("chosen_ids", "rejected_ids") for row in rows]
        batch = self.adapter.scoring_batch([row["prompt_ids"] for row in rows] * 2, answers, torch.device("cpu"))
        tensors = {**batch.inputs, _RESPONSE: batch.response_BR, _MASK: batch.mask_BR}
        if self.reference is not None:
            tensors[REFERENCE] = torch.tensor([list(self.reference[row["row"]]) for row in rows])
        return tensors


def scoring_batch(tensors: Mapping[str, Tensor]) -> ScoringBatch:
    """The batch of 2B answers that a collated one holds."""
    inputs = {name: part for name, part in tensors.items() if name not in (_RESPONSE, _MASK, REFERENCE)}
    return ScoringBatch(inputs, tensors[_RESPONSE], tensors[_MASK])


def answer_tokens(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens of the chosen and of the rejected answers of a collated batch, both (B,)."""
    chosen_B, rejected_B = tensors[_MASK].sum(dim=1).chunk(2)
    return chosen_B, rejected_B
