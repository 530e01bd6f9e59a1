"""What can be cut out of a layer as a whole: FFN neurons, attention heads (or groups that share keys and values).

A unit is a slice of rows in the matrices that make it and of columns in the one that reads it, so that the pruned model
is the same architecture with smaller sizes. Shapes follow nn.Linear, (out, in); GPT-2's Conv1D is the transpose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from yunque.errors import InputError


@dataclass(frozen=True)
class Part:
    """Units of one sublayer: ``makers`` hold ``sizes`` rows of each unit, ``reader`` reads the last maker's rows.

    Parts of one ``together`` name lose the same units: T5's heads share their stack's position biases, whose
    ``biases`` have a column for each head.
    """

    makers: tuple[nn.Module, ...]
    sizes: tuple[int, ...]
    reader: nn.Module
    count: int
    together: str
    read_size: int
    biases: nn.Embedding | None = None


def parts_of(model: Any, kind: str) -> list[Part]:
    """All sublayers of ``kind``, "ffn" or "heads".

    Raises:
        InputError: an architecture that this project cannot prune, or whose head size follows from the width.
    """
    family = model.config.model_type
    known = {
        "t5": _t5,
        "llama": _llama,
        "mistral": _llama,
        "qwen2": _llama,
        "qwen3": _llama,
        "gpt2": _gpt2,
        "bart": _bart,
    }
    if family not in known:
        raise InputError(f"model_name_or_path: {family} cannot be pruned here; known are {', '.join(sorted(known))}")
    if kind == "heads" and family in ("gpt2", "bart"):
        raise InputError(
            f"head_sparsity: transformers takes the head size of {family} from its width, which fewer heads would"
            " change; give ffn_sparsity or drop_layers"
        )
    return list(known[family](model, kind))


def keep_units(part: Part, kept: Tensor) -> None:
    """Leave only the units of the numbers ``kept`` (K,) in the matrices of ``part``."""
    for maker, size in zip(part.makers, part.sizes, strict=True):
        _select(maker, _rows(kept, size), out=True)
    _select(part.reader, _rows(kept, part.read_size), out=False)
    if part.biases is not None:
        part.biases.weight = nn.Parameter(part.biases.weight.detach()[:, kept].clone())
        part.biases.embedding_dim = len(kept)


def unit_slices(part: Part) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter of ``part`` and, of the same shape, the number of the unit that each entry belongs to."""
    numbers = torch.arange(part.count)
    for maker, size in zip(part.makers, part.sizes, strict=True):
        weight: Any = maker.weight
        rows = numbers.repeat_interleave(size)
        yield weight, (rows[None] if isinstance(maker, Conv1D) else rows[:, None]).expand(weight.shape)
        if getattr(maker, "bias", None) is not None:
            bias: Any = maker.bias
            yield bias, rows
    weight = part.reader.weight
    columns = numbers.repeat_interleave(part.read_size)
    yield weight, (columns[:, None] if isinstance(part.reader, Conv1D) else columns[None]).expand(weight.shape)


def reader_norms(part: Part) -> Tensor:
    """Norm (inputs,) of what the reader makes of each of its inputs."""
    weight: Any = part.reader.weight
    return weight.detach().float().norm(dim=1 if isinstance(part.reader, Conv1D) else 0)


def _rows(kept: Tensor, size: int) -> Tensor:
    return (kept[:, None] * size + torch.arange(size)).flatten()


def _select(layer: Any, index: Tensor, *, out: bool) -> None:
    transposed = isinstance(layer, Conv1D)
    dim = (1 if transposed else 0) if out else (0 if transposed else 1)
    layer.weight = nn.Parameter(layer.weight.detach().index_select(dim, index).clone())
    if out and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[index].clone())
    if transposed:
        layer.nf, layer.nx = layer.weight.shape[1], layer.weight.shape[0]
    elif out:
        layer.out_features = len(index)
    else:
        layer.in_features = len(index)


def _t5(model: Any, kind: str) -> Iterator[Part]:
    for stack_name, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        for number, block in enumerate(stack.block):
            if kind == "ffn":
                ffn = block.layer[-1].DenseReluDense
                gated = [ffn.wi_0, ffn.wi_1] if hasattr(ffn, "wi_0") else [ffn.wi]
                yield _neurons(gated, ffn.wo, f"{stack_name}.{number}.ffn")
                continue
            attentions = [("self", block.layer[0].SelfAttention)]
            attentions += [("cross", block.layer[1].EncDecAttention)] if stack_name == "decoder" else []
            for which, attention in attentions:
                size = attention.key_value_proj_dim
                shared = f"{stack_name}.self" if which == "self" else f"{stack_name}.{number}.cross"
                biases = getattr(attention, "relative_attention_bias", None)
                makers = (attention.q, attention.k, attention.v)
                yield Part(makers, (size,) * 3, attention.o, attention.n_heads, shared, size, biases)


def _llama(model: Any, kind: str) -> Iterator[Part]:
    for number, layer in enumerate(model.model.layers):
        if kind == "ffn":
            yield _neurons((layer.mlp.gate_proj, layer.mlp.up_proj), layer.mlp.down_proj, f"{number}.ffn")
            continue
        attention, size = layer.self_attn, layer.self_attn.head_dim
        groups = model.config.num_key_value_heads
        queries = size * model.config.num_attention_heads // groups
        makers = (attention.q_proj, attention.k_proj, attention.v_proj)
        yield Part(makers, (queries, size, size), attention.o_proj, groups, f"{number}.heads", queries)


def _gpt2(model: Any, kind: str) -> Iterator[Part]:
    for number, block in enumerate(model.transformer.h):
        yield _neurons((block.mlp.c_fc,), block.mlp.c_proj, f"{number}.ffn")


def _bart(model: Any, kind: str) -> Iterator[Part]:
    for stack_name, stack in (("encoder", model.model.encoder), ("decoder", model.model.decoder)):
        for number, layer in enumerate(stack.layers):
            yield _neurons((layer.fc1,), layer.fc2, f"{stack_name}.{number}.ffn")


def _neurons(makers: Sequence[Any], reader: nn.Module, together: str) -> Part:
    weight = makers[0].weight
    count = weight.shape[1] if isinstance(makers[0], Conv1D) else weight.shape[0]
    return Part(tuple(makers), (1,) * len(makers), reader, count, together, 1)
