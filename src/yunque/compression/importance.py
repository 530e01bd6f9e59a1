"""How much each unit matters: by its weights, by what it does on data, by what the loss loses without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from yunque.compression.units import Part, reader_norms, unit_slices

Batches = Callable[[], Iterable[Mapping[str, Tensor]]]
"""Calibration batches, afresh at each call: inputs and labels of the model."""


def unit_importance(model: Any, parts: Sequence[Part], method: str, batches: Batches) -> dict[str, Tensor]:
    """Importance (units,) by ``together`` name of the parts, summed over the parts that share it.

    "magnitude": the Euclidean norm of a unit's weights. "activation": the root mean square of what the reader gets from
    it times the norm of the reader's columns, Wanda's score for a structure (Sun et al. 2024, arXiv:2306.11695;
    An et al. 2024, arXiv:2312.11983). "taylor": |sum of weight times gradient| of the loss, its first-order change when
    the unit goes (Molchanov et al. 2019, arXiv:1906.10771), mean over batches.
    """
    scores = {"magnitude": _magnitude, "activation": _activation, "taylor": _taylor}[method](model, parts, batches)
    found: dict[str, Tensor] = {}
    for part, score in zip(parts, scores, strict=True):
        found[part.together] = found.get(part.together, torch.zeros_like(score)) + score
    return found


def layer_importance(model: Any, stacks: Mapping[str, nn.ModuleList], batches: Batches) -> dict[str, Tensor]:
    """How far each layer of a stack turns the states: 1 - mean cosine of input and output.

    Block influence of Men et al. 2024 (ShortGPT, arXiv:2403.03853, equation 1).
    """
    sums = {(path, number): [0.0, 0] for path, stack in stacks.items() for number in range(len(stack))}

    def watch(key: tuple[str, int]) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = (args[0] if args else kwargs["hidden_states"]).float()
            after = (output[0] if isinstance(output, tuple) else output).float()
            turned = 1 - torch.cosine_similarity(before, after, dim=-1)
            sums[key][0] += float(turned.sum())
            sums[key][1] += turned.numel()

        return hook

    handles = [
        layer.register_forward_hook(watch((path, number)), with_kwargs=True)
        for path, stack in stacks.items()
        for number, layer in enumerate(stack)
    ]
    try:
        _forward_all(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    return {
        path: torch.tensor([sums[path, number][0] / max(1, sums[path, number][1]) for number in range(len(stack))])
        for path, stack in stacks.items()
    }


def input_norms(model: Any, layers: Mapping[str, nn.Module], batches: Batches) -> dict[str, Tensor]:
    """Root mean square (inputs,) of every input of ``layers`` over the calibration tokens, padding included."""
    squares: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().float().flatten(0, -2)
            squares[name] = squares.get(name, torch.zeros(rows.shape[1])) + rows.square().sum(dim=0).cpu()
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        _forward_all(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (squares[name] / counts[name]).sqrt() for name in squares}


def _magnitude(model: Any, parts: Sequence[Part], batches: Batches) -> list[Tensor]:
    return [_by_unit(part, lambda weight: weight.detach().float().square()).sqrt() for part in parts]


def _activation(model: Any, parts: Sequence[Part], batches: Batches) -> list[Tensor]:
    norms = input_norms(model, {str(number): part.reader for number, part in enumerate(parts)}, batches)
    scores = []
    for number, part in enumerate(parts):
        inputs = (norms[str(number)] * reader_norms(part)).square()
        scores.append(inputs.reshape(part.count, -1).sum(dim=1).sqrt())
    return scores


def _taylor(model: Any, parts: Sequence[Part], batches: Batches) -> list[Tensor]:
    scores = [torch.zeros(part.count) for part in parts]
    model.eval()
    seen = 0
    for batch in batches():
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        for score, part in zip(scores, parts, strict=True):
            score += _by_unit(part, lambda weight: (weight * weight.grad).detach().float()).abs()
        seen += 1
    model.zero_grad(set_to_none=True)
    return [score / seen for score in scores]


def _by_unit(part: Part, value: Callable[[Any], Tensor]) -> Tensor:
    """Sum (units,) of ``value(parameter)`` over the entries of each unit."""
    total = torch.zeros(part.count)
    for weight, units in unit_slices(part):
        total.index_add_(0, units.flatten(), value(weight).flatten().cpu())
    return total


@torch.no_grad()
def _forward_all(model: Any, batches: Batches) -> None:
    model.eval()
    for batch in batches():
        model(**batch)
