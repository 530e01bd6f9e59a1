"""Sampling of responses that does not depend on how the batch is laid out over ranks and minibatches.

Each sample draws from its own random stream, keyed by seed and sample number. One rank and eight ranks, batches of 4
and of 64, a fresh run and a resumed one give a prompt the same response.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from yunque.models.adapter import ModelAdapter
from yunque.models.arguments import GenerationArguments


@dataclass(frozen=True)
class Response:
    """Token ids of one response, the end token included where it was reached."""

    tokens: list[int]
    finished: bool


def sample_stream(seed: int, sample: int) -> np.random.Generator:
    """Random stream of one sample (Philox, Salmon et al. 2011: a counter-based generator keyed by both numbers)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, sample], dtype=np.uint64)))


class _StreamSampler(LogitsProcessor):
    """Leaves the token that inverse-CDF sampling picks as the only possible one for the arg-max of ``generate``."""

    def __init__(self, options: GenerationArguments, start: int, eos_ids: list[int], uniforms_BT: Tensor) -> None:
        self.options, self.start, self.eos_ids, self.uniforms_BT = options, start, eos_ids, uniforms_BT
        self.filters: list[LogitsProcessor] = []
        if options.top_k:
            self.filters.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            self.filters.append(TopPLogitsWarper(options.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B, V) become 0 at the sampled token and -inf elsewhere."""
        step = input_ids.shape[1] - self.start
        logits = scores.float()
        if step < self.options.min_new_tokens:
            logits[:, self.eos_ids] = -torch.inf
        if self.options.temperature == 0:
            return logits
        logits = logits / self.options.temperature
        for keep in self.filters:
            logits = keep(input_ids, logits)
        # float64: the tail of a 32k vocabulary would drown in float32's rounding
        cdf_BV = logits.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
        threshold_B1 = self.uniforms_BT[:, step, None] * cdf_BV[:, -1:]
        token_B1 = torch.searchsorted(cdf_BV, threshold_B1, right=True).clamp(max=logits.shape[-1] - 1)
        return torch.full_like(logits, -torch.inf).scatter_(1, token_B1, 0.0)


class _LengthLimits(StoppingCriteria):
    """Ends each response at its own length limit."""

    def __init__(self, start: int, limits_B: Tensor) -> None:
        self.start, self.limits_B = start, limits_B

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Rows (B,) that have reached their limit."""
        return input_ids.shape[1] - self.start >= self.limits_B


@torch.no_grad()
def generate(
    model: nn.Module,
    adapter: ModelAdapter,
    queries: Sequence[Sequence[int]],
    options: GenerationArguments,
    *,
    seed: int,
    samples: Sequence[int],
    shortest_limit: int | None = None,
    device: torch.device,
) -> list[Response]:
    """Sample one response per query, as one padded batch.

    ``samples`` number the queries over the whole run: response and length limit of a query depend on (seed, sample)
    only. Limits are drawn uniformly from [shortest_limit, options.max_new_tokens]; all are the maximum without it.
    """
    streams = [sample_stream(seed, sample) for sample in samples]
    low = options.max_new_tokens if shortest_limit is None else shortest_limit
    limits = [int(stream.integers(low, options.max_new_tokens + 1)) for stream in streams]
    uniforms = np.stack([stream.random(options.max_new_tokens) for stream in streams])
    inputs = adapter.generation_inputs(queries, device)
    start = adapter.response_start(inputs)
    sampler = _StreamSampler(options, start, adapter.eos_ids, torch.as_tensor(uniforms, device=device))
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max(limits),
        pad_token_id=adapter.pad_id,
        eos_token_id=adapter.eos_ids,
        decoder_start_token_id=getattr(adapter.config, "decoder_start_token_id", None),
    )
    with _decoding_only_by(config, model):
        output = model.generate(  # type: ignore[operator]
            **inputs,
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([_LengthLimits(start, torch.as_tensor(limits, device=device))]),
        )
    return [_cut(row, limit, adapter.eos_ids) for row, limit in zip(output[:, start:].tolist(), limits, strict=True)]


@contextmanager
def _decoding_only_by(config: GenerationConfig, model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode and its own generation config aside.

    ``generate`` would fill in what ``config`` leaves open (BART: 4 beams, an end token forced at the limit).
    """
    holders: list[Any] = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    former = [holder.generation_config for holder in holders]
    was_training = model.training
    model.eval()
    for holder in holders:
        holder.generation_config = config
    try:
        yield
    finally:
        for holder, own in zip(holders, former, strict=True):
            holder.generation_config = own
        model.train(was_training)


def _cut(tokens: list[int], limit: int, eos_ids: list[int]) -> Response:
    """Keep a row up to its first end token or its limit; what follows is padding."""
    tokens = tokens[:limit]
    for index, token in enumerate(tokens):
        if token in eos_ids:
            return Response(tokens[: index + 1], finished=True)
    return Response(tokens, finished=False)
