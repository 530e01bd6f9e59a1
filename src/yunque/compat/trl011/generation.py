"""``generate`` of the trainer: the model's own, in eval mode, on padded batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from yunque.models.copying import eval_mode

LengthSampler = Callable[[], int]


def generate_one(model: Any, query: Tensor, options: dict[str, Any]) -> Tensor:
    """Generate after one query (Q,): (1, tokens), as the model returns it."""
    inputs = {"input_ids": query.unsqueeze(0), "attention_mask": torch.ones_like(query).unsqueeze(0)}
    with eval_mode(model), torch.no_grad():
        return model.generate(**(inputs | options))


def generate_batched(
    model: Any,
    tokenizer: Any,
    queries: Sequence[Tensor],
    options: dict[str, Any],
    *,
    is_encoder_decoder: bool,
    device: torch.device,
    length_sampler: LengthSampler | None,
    batch_size: int,
    return_prompt: bool,
    pad_to_multiple_of: int | None = None,
    remove_padding: bool = True,
) -> list[Tensor]:
    """Generate after many queries, each (Q,): each (tokens,), cut after the first end token that was generated.

    Decoder-only outputs begin with their query if ``return_prompt``; encoder-decoder ones with the start token.
    """
    outputs: list[Tensor] = []
    ends = _end_tokens(model, tokenizer, options)
    for start in range(0, len(queries), batch_size):
        rows = list(queries[start : start + batch_size])
        if length_sampler is not None:
            options = options | {"max_new_tokens": length_sampler()}
        inputs = tokenizer.pad(
            {"input_ids": rows, "attention_mask": [torch.ones_like(row) for row in rows]},
            padding=True,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side="right" if is_encoder_decoder else "left",
            return_tensors="pt",
        ).to(device)
        with eval_mode(model), torch.no_grad():
            generated = model.generate(**(dict(inputs) | options))
        width = inputs["input_ids"].shape[1]
        for query, row in zip(rows, generated, strict=True):
            prompt, answer = (row[:1], row[1:]) if is_encoder_decoder else (query.to(row), row[width:])
            if remove_padding:
                answer = _until_end(answer, ends)
            outputs.append(torch.cat([prompt, answer]) if is_encoder_decoder or return_prompt else answer)
    return outputs


def _until_end(answer: Tensor, ends: Tensor) -> Tensor:
    found = torch.isin(answer, ends.to(answer.device)).nonzero()
    return answer[: int(found[0]) + 1] if len(found) else answer


def _end_tokens(model: Any, tokenizer: Any, options: dict[str, Any]) -> Tensor:
    """Ids that end a generation: the tokenizer's, and those that ``generate`` stops at."""
    given = options.get("eos_token_id", model.pretrained_model.generation_config.eos_token_id)
    ids = given if isinstance(given, list) else [given]
    return torch.tensor(sorted({*ids, tokenizer.eos_token_id} - {None}))
