"""Pruning: whole units and layers out of a model, or single weights set to zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from yunque.compression.arguments import PruningArguments
from yunque.compression.importance import Batches, input_norms, layer_importance, unit_importance
from yunque.compression.students import keep_layers, stacks_of
from yunque.compression.units import keep_units, parts_of
from yunque.errors import InputError


@dataclass(frozen=True)
class Pruned:
    """The pruned model and what was done to it, for the manifest and the console."""

    model: Any
    report: dict[str, Any]

    def lines(self) -> list[str]:
        """The report for people."""
        report = self.report
        lines = [f"{path}: kept layers {', '.join(map(str, kept))}" for path, kept in report.get("layers", {}).items()]
        for kind, name in (("heads", "attention heads (key-value groups)"), ("ffn", "feed-forward neurons")):
            if kind in report:
                lines.append(f"{name} of a layer: {report[kind]['before']:,} -> {report[kind]['after']:,}")
        if "zero_weights" in report:
            lines.append(
                f"weights set to zero: {report['zero_weights']:,}; the model is neither smaller nor faster by it"
            )
        before, after = report["parameters_before"], report["parameters"]
        return [*lines, f"parameters: {before:,} -> {after:,} ({after / before:.0%})"]


def prune(model: Any, args: PruningArguments, batches: Batches) -> Pruned:
    """Drop layers, then heads, then FFN neurons, then mask weights, as far as ``args`` ask for each.

    Iterations spread heads and neurons over several rounds, whose importance is measured anew.

    Raises:
        InputError: an architecture that cannot be pruned so; nothing left, or nothing changed.
    """
    before = sum(weight.numel() for weight in model.parameters())
    report: dict[str, Any] = {"parameters_before": before}
    if args.drop_layers:
        model, kept = _drop_layers(model, args.drop_layers, batches)
        report["layers"] = kept
    for turn in range(args.prune_iterations):
        for kind, sparsity, multiple in (
            ("heads", args.head_sparsity, 1),
            ("ffn", args.ffn_sparsity, args.ffn_multiple_of),
        ):
            if sparsity:
                parts = parts_of(model, kind)
                first = report.setdefault(kind, {"before": parts[0].count})["before"]
                goal = first * (1 - sparsity * (turn + 1) / args.prune_iterations)
                report[kind]["after"] = _drop_units(
                    model, kind, max(1, round(goal / multiple) * multiple), args, batches
                )
    if args.weight_sparsity or args.semi_structured:
        report["zero_weights"] = _mask(model, args, batches)
    report["parameters"] = sum(weight.numel() for weight in model.parameters())
    if report["parameters"] == before and not report.get("zero_weights"):
        raise InputError("ffn_sparsity: nothing was pruned; raise a sparsity or lower ffn_multiple_of")
    return Pruned(model, report)


def _drop_layers(model: Any, count: int, batches: Batches) -> tuple[Any, dict[str, list[int]]]:
    stacks = {stack.path: model.get_submodule(stack.path) for stack in stacks_of(model)}
    importance = layer_importance(model, stacks, batches)
    kept = {}
    for path, scores in importance.items():
        if count >= len(scores):
            raise InputError(f"drop_layers: {path} has {len(scores)} layers; drop fewer")
        kept[path] = sorted(scores.argsort(descending=True)[: len(scores) - count].tolist())
    return keep_layers(model, kept), kept


def _drop_units(model: Any, kind: str, count: int, args: PruningArguments, batches: Batches) -> int:
    """Keep the ``count`` most important units of every sublayer of ``kind``; the config says so."""
    parts = parts_of(model, kind)
    count = min(count, parts[0].count)
    importance = unit_importance(model, parts, args.importance, batches)
    for part in parts:
        keep_units(part, importance[part.together].argsort(descending=True, stable=True)[:count].sort().values)
    _write_config(model, kind, count)
    return count


def _write_config(model: Any, kind: str, count: int) -> None:
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    for config in configs.values():
        family = config.model_type
        if kind == "ffn":
            names = {"t5": ["d_ff"], "gpt2": ["n_inner"], "bart": ["encoder_ffn_dim", "decoder_ffn_dim"]}
            for name in names.get(family, ["intermediate_size"]):
                setattr(config, name, count)
        elif family == "t5":
            config.num_heads = count
        else:
            config.head_dim = model.model.layers[0].self_attn.head_dim  # no longer the width by the heads
            config.num_attention_heads = count * config.num_attention_heads // config.num_key_value_heads
            config.num_key_value_heads = count
    for module in model.modules():
        if kind == "heads" and hasattr(module, "key_value_proj_dim"):  # T5's attention keeps its own count
            module.n_heads, module.inner_dim = count, count * module.key_value_proj_dim


@torch.no_grad()
def _mask(model: Any, args: PruningArguments, batches: Batches) -> int:
    """Set the least important weights of every linear layer but the head to zero, row by row; how many are zero.

    Scores are |w|, or with importance "activation" Wanda's |w| times the root mean square of its input.
    """
    layers = dict(_linear_layers(model))
    norms = input_norms(model, layers, batches) if args.importance == "activation" else {}
    zeros = 0
    for name, layer in layers.items():
        transposed = isinstance(layer, Conv1D)
        weight: Any = layer.weight
        rows = weight.T if transposed else weight  # (out, in)
        scores = rows.abs().float()
        if name in norms:
            scores = scores * norms[name].to(scores.device)
        mask = _two_of_four(scores, name) if args.semi_structured else _lowest(scores, args.weight_sparsity)
        rows.masked_fill_(mask, 0.0)
        zeros += int(mask.sum())
    return zeros


def _lowest(scores: Tensor, sparsity: float) -> Tensor:
    count = round(scores.shape[1] * sparsity)
    lowest = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)


def _two_of_four(scores: Tensor, name: str) -> Tensor:
    if scores.shape[1] % 4:
        raise InputError(
            f"semi_structured: {name} has {scores.shape[1]} inputs, no multiple of 4; give weight_sparsity"
        )
    return _lowest(scores.reshape(-1, 4), 0.5).reshape(scores.shape)


def _linear_layers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    head = model.get_output_embeddings()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | Conv1D) and layer is not head:
            yield name, layer
