"""nf4 weights under an adapter (QLoRA): how they are asked for, what may not be asked, what they weigh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from yunque.errors import InputError

_NOTHING = ["no module of this name"]  # to keep in full precision; an empty list would mean the default, the head

_KEPT = "_keep_in_fp32_modules"


def nf4_config(quantize_head: bool) -> BitsAndBytesConfig:
    """nf4 with double quantization and bfloat16 arithmetic, as QLoRA (Dettmers et al., 2023, arXiv:2305.14314)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        # Packed in this type, FSDP can flatten them beside the others, and T5 finds the type it computes in.
        bnb_4bit_quant_storage=torch.bfloat16,
        llm_int8_skip_modules=_NOTHING if quantize_head else None,
    )


def dtype_of_the_rest() -> torch.dtype:
    """Embeddings, norms and whatever else nf4 leaves alone."""
    return torch.bfloat16


@contextmanager
def without_float32_modules(active: bool, auto: Any, config: PretrainedConfig) -> Iterator[None]:
    """Let all linear layers be quantized: T5 keeps ``wo``, a quarter of it, in float32 against float16's overflow.

    bfloat16 has float32's range and nothing to keep.
    """
    model_class = auto._model_mapping.get(type(config), None) if active else None
    # The class that says so: every stack of the model is one of its kind and would say it again.
    owners = [kind for kind in getattr(model_class, "__mro__", ()) if vars(kind).get(_KEPT)]
    kept = [getattr(owner, _KEPT) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, _KEPT, None)
        yield
    finally:
        for owner, modules in zip(owners, kept, strict=True):
            setattr(owner, _KEPT, modules)


def is_quantized(parameter: Any) -> bool:
    """Whether ``parameter`` holds packed nf4 values."""
    return getattr(parameter, "quant_state", None) is not None


def keep_packing(model: PreTrainedModel) -> None:
    """Leave the packed weights as they are in eval mode too.

    On a CPU with AVX-512 BF16 bitsandbytes would repack them for its fast kernel at the first such forward pass: the
    scales lose digits, which changes the logits, and layers not of its sizes crash.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def refuse_if_nothing_is_quantized(model: PreTrainedModel, *, quantize_head: bool) -> None:
    """Check that nf4 was of use.

    Raises:
        InputError: the model has no linear layer, or its head is the embedding and cannot be packed.
    """
    if not any(is_quantized(parameter) for parameter in model.parameters()):
        raise InputError(
            f"load_in_4bit: {model.config.model_type} has no linear layers to quantize; leave load_in_4bit out"
        )
    if quantize_head and not is_quantized(model.get_output_embeddings().weight):
        raise InputError(
            f"quantize_head: the head of this {model.config.model_type} is its embedding; leave quantize_head out"
        )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(parameter_bytes(parameter) for parameter in model.parameters())


def parameter_bytes(parameter: Any) -> int:
    """Bytes of one parameter; of an nf4 one the packed values and both levels of its scales."""
    total: int = parameter.numel() * parameter.element_size()
    if is_quantized(parameter):
        total += sum(tensor.numel() * tensor.element_size() for tensor in _scales(parameter.quant_state))
    return total


def _scales(state: Any) -> list[torch.Tensor]:
    tensors = [state.absmax, state.code]
    if state.nested:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    return tensors
