"""The start check: under a launch profile a model computes what one plain process computes with the same folder.

Reading in pieces, wrapping and sharding may change a model without a word: a head tied to the embedding, weights that
were drawn anew, a plan that splits a matrix the wrong way. So the main process computes logits of a fixed prompt before
any engine has the model, every rank computes them again when the engine has it, and a run whose logits differ stops.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor

from yunque.errors import CheckFailed
from yunque.models.copying import eval_mode, read_whole, whole_partitions
from yunque.models.placement import is_split_while_read

M = TypeVar("M")
P = ParamSpec("P")
Inputs = dict[str, Tensor]

TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}
"""Largest distance of logits, relative to their own size, that rounding explains, by the type that is computed in.

Measured on trained models of 4 to 6 layers: 1e-6 and 0.01; it grows with depth. Faults change logits by their own size.
"""

_ROWS, _TOKENS = 4, 8
_SAMPLED = 256
_SAME_WEIGHT = 2e-2  # distance, relative to its size, that rounding to bfloat16 or float16 leaves


@dataclass(frozen=True)
class PlainStart:
    """Logits of the fixed prompt and samples of each weight in one plain process; empty off the main process."""

    logits: Tensor | None = None
    samples: dict[str, Tensor] | None = None


def read_checked(load: Callable[P, M]) -> Callable[P, M]:
    """Let the models that ``load`` reads know what they compute where they are read whole, for ``plain_start``.

    Only a launch profile that splits weights as they are read makes this read twice, on the main process: under any
    other, the model is whole there until an engine takes it. Random numbers go on from where the plain reading leaves
    them, so that a value head made next is the same one too.
    """

    @wraps(load)
    def checked(*args: P.args, **options: P.kwargs) -> M:
        if not is_split_while_read():
            return load(*args, **options)
        random_state = torch.get_rng_state()
        model: Any = load(*args, **options)
        model.plain_start = PlainStart()
        if os.environ.get("RANK", "0") == "0":
            torch.set_rng_state(random_state)
            with read_whole():
                model.plain_start = _measured(load(*args, **options))
        torch.set_rng_state(broadcast_object_list([torch.get_rng_state()])[0])
        return model

    return checked


def plain_start(model: Any, accelerator: Accelerator) -> PlainStart | None:
    """What one plain process computes with ``model``, which no engine has taken yet; None in a plain process."""
    if accelerator.num_processes == 1 and not is_split_while_read():
        return None
    known: PlainStart | None = vars(model).pop("plain_start", None)
    return known or (_measured(model) if accelerator.is_main_process else PlainStart())


def check_start(
    start: PlainStart, model: Any, accelerator: Accelerator, forward: Callable[[Inputs], Tensor], what: str = "model"
) -> float:
    """Check that ``forward``, through the engine, computes the logits of ``start``; returns their relative distance.

    To be called on every rank. ``model`` is what holds the weights; ``what`` it is called in the message.

    Raises:
        CheckFailed: it computes others, on any rank.
    """
    (expected,) = broadcast_object_list([start.logits])
    with torch.no_grad(), accelerator.autocast(), _without_virtual_tokens(model):
        found = _whole(forward(_prompt(model, accelerator.device))).float().cpu()
    difference = max(gather_object([_distance(found, expected)]))
    tolerance = TOLERANCE.get(_compute_dtype(model, accelerator), TOLERANCE[torch.bfloat16])
    if not difference <= tolerance:  # nor NaN
        changed = _changed_weights(start, model, accelerator)
        cause = f"other weights are {', '.join(changed)}" if changed else "its weights are the same, their use is not"
        raise CheckFailed(
            f"launch profile: the {what} computes other logits than one plain process does (relative difference "
            f"{difference:.2g}, rounding explains {tolerance:g}); {cause}"
        )
    return difference


def _measured(model: Any) -> PlainStart:
    with torch.no_grad(), _without_virtual_tokens(model), eval_mode(model):
        logits = model(**_prompt(model, model.device)).logits.float().cpu()
    return PlainStart(logits, {name: _sample(weight) for name, weight in _weights(model)})


def _prompt(model: Any, device: torch.device) -> Inputs:
    """Rows of tokens without padding and ends; what classifies reads one end, which T5's and BART's forms want."""
    config = model.config.get_text_config(decoder=True)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    special = {config.pad_token_id, *ends}
    plain = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    tokens = plain[torch.arange(_ROWS * _TOKENS) * 7919 % len(plain)].reshape(_ROWS, _TOKENS).to(device)
    classifies = _base(model).get_output_embeddings() is None
    if classifies and ends[0] is not None:
        tokens[:, -1] = ends[0]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder and not classifies:
        start = torch.full_like(tokens[:, :1], model.config.decoder_start_token_id)
        inputs["decoder_input_ids"] = torch.cat([start, tokens[:, :-1]], dim=1)
    return inputs


def _distance(found: Tensor, expected: Tensor) -> float:
    """Length of the difference relative to that of the expected logits, without what all logits have in common."""
    if found.shape != expected.shape:
        return float("inf")
    common = expected.mean(dim=-1, keepdim=True) if expected.shape[-1] > 2 else 0.0
    return float((found - expected).norm() / (expected - common).norm().clamp(min=1e-6))


def _compute_dtype(model: Any, accelerator: Accelerator) -> torch.dtype:
    kept = {weight.dtype for weight in model.parameters()} & set(TOLERANCE)
    named = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    return max(kept | ({named} if named else set()), key=TOLERANCE.__getitem__)


def _changed_weights(start: PlainStart, model: Any, accelerator: Accelerator) -> list[str]:
    """Names of weights that are not those of the plain process, as the main process finds them; a few of them."""
    (samples,) = broadcast_object_list([start.samples])
    changed = []
    for name, weight in _weights(model):
        with whole_partitions([weight]):
            here = _sample(_whole(weight))
        known = samples.get(name)
        if known is None or not (here - known).norm() <= _SAME_WEIGHT * known.norm():
            changed.append(name)
    changed = max(gather_object([changed]), key=len)
    return [*changed[:3], *([f"{len(changed) - 3} more"] if len(changed) > 3 else [])]


def _weights(model: Any) -> Iterator[tuple[str, Any]]:
    """All floating-point weights by each of their names."""
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.is_floating_point():
            yield name, weight


def _sample(weight: Tensor) -> Tensor:
    """Values at positions that are spread over the weight: enough to tell one weight from another."""
    values = weight.detach().flatten()
    return values[torch.linspace(0, len(values) - 1, _SAMPLED, device=values.device).long()].float().cpu()


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def _without_virtual_tokens(model: Any) -> Iterator[None]:
    """While entered, no virtual tokens stand before the prompt: fresh ones are drawn."""
    virtual = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    with model.disable_adapter() if virtual else nullcontext():
        yield
