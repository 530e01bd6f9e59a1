"""Sampling of responses that does not depend on how the batch is laid out over ranks and minibatches.

Each sample draws from its own random stream, keyed by seed and sample number. One rank and eight ranks, batches of 4
and of 64, a fresh run and a resumed one give a prompt the same response. Shapes: B sequences, T positions of the
longest response, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from yunque.errors import InputError
from yunque.models.adapter import ModelAdapter
from yunque.models.arguments import GenerationArguments
from yunque.models.copying import eval_mode, whole_partitions
from yunque.models.decoders import decoder_for
from yunque.models.merging import merged_adapters
from yunque.models.policy import ValueHead, score_tokens

_CHECK_EVERY_TOKENS = 8
"""Between two looks at which sequences have ended: each look waits for the device."""

_PROBE_TOKENS = 6
_LARGEST_ERROR_NATS = 0.02
_LARGEST_ERROR_NATS_HALF = 0.5  # the same sums in another order

_CDF_BLOCK = 128  # tokens whose float32 probabilities are summed before float64 takes over


@dataclass(frozen=True)
class Response:
    """Token ids of one response, the end token included where it was reached.

    logprobs and values: of each token under the policy that sampled it, and of the state before it; None where
    decoding computes them less exactly than a forward pass would (half precision), or has no value head.
    """

    tokens: list[int]
    finished: bool
    logprobs: list[float] | None = field(default=None, compare=False)
    values: list[float] | None = field(default=None, compare=False)


def sample_stream(seed: int, sample: int) -> np.random.Generator:
    """Random stream of one sample (Philox, Salmon et al. 2011: a counter-based generator keyed by both numbers)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, sample], dtype=np.uint64)))


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
    value_head: ValueHead | None = None,
) -> list[Response]:
    """Sample one response per query, as one padded batch.

    ``samples`` number the queries over the whole run: response and length limit of a query depend on (seed, sample)
    only. Limits are drawn uniformly from [shortest_limit, options.max_new_tokens]; all are the maximum without it.
    """
    if not queries:
        return []
    streams = [sample_stream(seed, sample) for sample in samples]
    low = options.max_new_tokens if shortest_limit is None else shortest_limit
    limits = [int(stream.integers(low, options.max_new_tokens + 1)) for stream in streams]
    uniforms = np.stack([stream.random(options.max_new_tokens) for stream in streams])
    sampler = _Sampler(options, adapter.eos_ids, torch.as_tensor(uniforms, device=device))
    with eval_mode(model), merged_adapters(model):
        records = _decode(model, adapter, queries, limits, sampler, value_head, device)
    exact = next(model.parameters()).dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    return [_cut(row, limit, adapter.eos_ids, exact) for row, limit in zip(records, limits, strict=True)]


@torch.no_grad()
def check_rollouts(model: nn.Module, adapter: ModelAdapter, device: torch.device) -> None:
    """Check on a fixed prompt that rollouts give tokens the log-probabilities of the model's own forward pass.

    Raises:
        InputError: they do not, so that training would learn from another model's answers.
    """
    query = [token for token in range(3, 3 + _PROBE_TOKENS) if token not in adapter.eos_ids]
    options = GenerationArguments(max_new_tokens=_PROBE_TOKENS)
    uniforms = torch.full((1, _PROBE_TOKENS), 0.5, dtype=torch.float64, device=device)
    with eval_mode(model), whole_partitions(model.parameters()):
        with merged_adapters(model):
            sampler = _Sampler(options, adapter.eos_ids, uniforms)
            ((tokens, ours, _),) = _decode(model, adapter, [query], [_PROBE_TOKENS], sampler, None, device)
        batch = adapter.scoring_batch([query], [tokens], device)
        theirs = score_tokens(model, adapter, batch, 1.0, lean=False)[0].logprobs_BR[0].tolist()
    exact = next(model.parameters()).dtype == torch.float32
    off = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    if off > (_LARGEST_ERROR_NATS if exact else _LARGEST_ERROR_NATS_HALF):  # NaN passes: FSDP2 reads on one rank
        raise InputError(
            f"model_name_or_path: answers are decoded with log-probabilities that are off by {off:.3f} nats from the "
            "model's own forward pass; this architecture or adapter cannot be rolled out"
        )


def _decode(
    model: nn.Module,
    adapter: ModelAdapter,
    queries: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampler: _Sampler,
    value_head: ValueHead | None,
    device: torch.device,
) -> list[tuple[list[int], list[float], list[float] | None]]:
    """Tokens, log-probabilities and values of each row, padded with what comes after its end; ended rows drop out."""
    longest = max(limits)
    decoder = decoder_for(model, adapter, queries, longest, device)
    limits_B, eos = torch.tensor(limits, device=device), torch.tensor(adapter.eos_ids, device=device)
    rows_B = torch.arange(len(queries), device=device)
    tokens_BT = torch.full((len(queries), longest), adapter.pad_id, device=device)
    logprobs_BT, values_BT = torch.zeros((2, len(queries), longest), device=device)
    ended_B = torch.zeros_like(rows_B, dtype=torch.bool)
    logits, hidden = decoder.first()
    for step in range(longest):
        tokens_B, logprobs_B = sampler.draw(logits, rows_B, step)
        tokens_BT[rows_B, step], logprobs_BT[rows_B, step] = tokens_B, logprobs_B
        if value_head is not None:
            values_BT[rows_B, step] = value_head(hidden).float()
        ended_B = ended_B | torch.isin(tokens_B, eos) | (limits_B <= step + 1)
        if step + 1 == longest:
            break
        if (step + 1) % _CHECK_EVERY_TOKENS == 0 and bool(ended_B.any()):
            going = (~ended_B).nonzero().squeeze(1)
            if not len(going):
                break
            decoder.keep(going)
            rows_B, limits_B, ended_B, tokens_B = rows_B[going], limits_B[going], ended_B[going], tokens_B[going]
        logits, hidden = decoder.step(tokens_B)
    values = [None] * len(queries) if value_head is None else values_BT.tolist()
    return list(zip(tokens_BT.tolist(), logprobs_BT.tolist(), values, strict=True))


class _Sampler:
    """Inverse-CDF sampling: a token is the point of the cumulated distribution that a uniform number falls on."""

    def __init__(self, options: GenerationArguments, eos_ids: list[int], uniforms_BT: Tensor) -> None:
        self.options, self.eos_ids, self.uniforms_BT = options, eos_ids, uniforms_BT
        self.filters = LogitsProcessorList()
        if options.top_k:
            self.filters.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            self.filters.append(TopPLogitsWarper(options.top_p))

    def draw(self, logits_BV: Tensor, rows_B: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Tokens (B,), and their log-probabilities (B,) under softmax(logits / temperature) before any filter."""
        logits = logits_BV.float()
        if self.options.temperature not in (0.0, 1.0):
            logits = logits / self.options.temperature
        logits = logits - logits.amax(dim=1, keepdim=True)
        weights = logits.exp()
        normalizer_B = weights.sum(dim=1).log()
        if step < self.options.min_new_tokens:
            others = logits.clone()
            others[:, self.eos_ids] = -torch.inf
            weights = (others - others.amax(dim=1, keepdim=True)).exp()
        if self.options.temperature == 0:
            tokens_B = weights.argmax(dim=1)
        else:
            if self.filters:
                weights = self.filters(torch.LongTensor(), weights.log()).exp()
            tokens_B = _inverse_cdf(weights, self.uniforms_BT[rows_B, step])
        return tokens_B, logits.gather(1, tokens_B.unsqueeze(1)).squeeze(1) - normalizer_B


def _inverse_cdf(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Index of the first token whose cumulated weight exceeds uniform * total, by blocks and then inside one.

    Sums over blocks are float64: in float32 the tail of a large vocabulary would drown in rounding.
    """
    size = weights_BV.shape[1]
    padded = nn.functional.pad(weights_BV, (0, -size % _CDF_BLOCK)) if size % _CDF_BLOCK else weights_BV
    blocks = padded.unflatten(1, (-1, _CDF_BLOCK))
    cdf = blocks.sum(dim=2).cumsum(dim=1, dtype=torch.float64)
    threshold_B1 = uniforms_B.unsqueeze(1) * cdf[:, -1:]
    block_B1 = _first_above(cdf, threshold_B1)
    rest_B1 = threshold_B1 - nn.functional.pad(cdf, (1, 0)).gather(1, block_B1)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block_B1.squeeze(1)]
    token_B1 = _first_above(inside.cumsum(dim=1, dtype=torch.float64), rest_B1)
    return (block_B1 * _CDF_BLOCK + token_B1).squeeze(1)


def _first_above(cdf: Tensor, threshold_B1: Tensor) -> Tensor:
    """Index of the first entry above the threshold; where rounding leaves none, of the last entry with weight."""
    last_B1 = torch.searchsorted(cdf, cdf[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cdf, threshold_B1, right=True), last_B1)


def _cut(
    record: tuple[list[int], list[float], list[float] | None], limit: int, eos_ids: list[int], exact: bool
) -> Response:
    """Keep a row up to its first end token or its limit."""
    tokens, logprobs, values = record
    ends = [index for index, token in enumerate(tokens[:limit]) if token in eos_ids]
    length = ends[0] + 1 if ends else limit
    return Response(
        tokens[:length],
        finished=bool(ends),
        logprobs=logprobs[:length] if exact else None,
        values=values[:length] if exact and values is not None else None,
    )
