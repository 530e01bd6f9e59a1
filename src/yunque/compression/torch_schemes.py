"""nf4 and int8 torch folders: bitsandbytes' layers in place of linear ones, as transformers saves and loads them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)
from transformers.pytorch_utils import Conv1D

from yunque.models.quantized import (
    dtype_of_the_rest,
    is_quantized,
    keep_packing,
    nf4_config,
    parameter_bytes,
    without_float32_modules,
)

_AUTO = {
    "seq2seq": AutoModelForSeq2SeqLM,
    "causal": AutoModelForCausalLM,
    "classifier": AutoModelForSequenceClassification,
}
_CLASSIFIER_HEADS = r"(^|\.)(classifier|score|out_proj)$"


def linear_modules(model: nn.Module) -> dict[str, Any]:
    """Linear layers by name, quantized ones among them."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    kinds = (nn.Linear, Conv1D, Linear4bit, Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def kept_modules(model: Any, kind: str, skip_layers: str | None) -> dict[str, str]:
    """Linear layers that stay as they are, and why: the head, whose damage is direct, and those the user names."""
    kept = {}
    for name, module in linear_modules(model).items():
        if kind == "classifier":
            is_head = re.search(_CLASSIFIER_HEADS, name) and not name.startswith(model.base_model_prefix + ".")
        else:
            is_head = module is model.get_output_embeddings()
        if is_head:
            kept[name] = "the head, which bitsandbytes leaves out"
        elif skip_layers and re.search(skip_layers, name):
            kept[name] = "skip_layers names it"
    return kept


def load_quantized(name: str, revision: str, trust_remote_code: bool, kind: str, scheme: str, kept: list[str]) -> Any:
    """The model ``name`` with all linear layers but ``kept`` as "bnb_nf4" or "bnb_int8" and the rest in bfloat16."""
    config: Any = BitsAndBytesConfig(load_in_8bit=True) if scheme == "bnb_int8" else nf4_config(quantize_head=False)
    config.llm_int8_skip_modules = kept or ["no module of this name"]  # an empty list would mean the default
    auto: Any = _AUTO[kind]
    from transformers import AutoConfig

    model_config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    with without_float32_modules(True, auto, model_config):
        model = auto.from_pretrained(
            name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            quantization_config=config,
            dtype=dtype_of_the_rest(),
        )
    if scheme == "bnb_nf4":
        keep_packing(model)
    return model.eval()


def quantized_modules(model: nn.Module) -> Iterator[str]:
    """Names of the layers that are nf4 or int8."""
    for name, module in linear_modules(model).items():
        if is_quantized(module.weight) or module.weight.dtype == torch.int8:
            yield name


def module_bytes(module: Any) -> int:
    """Bytes of a linear layer's weight, scales included."""
    scales = getattr(module.weight, "SCB", None)
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    return parameter_bytes(module.weight) + (scales.numel() * scales.element_size() if scales is not None else 0)


@torch.inference_mode()
def output_error(quantized: nn.Module, module: Any, rows: torch.Tensor) -> float:
    """Size of the error of a layer's outputs on ``rows`` [rows, in], by that of the right ones."""
    wanted = module(rows)
    found = quantized(rows.to(dtype_of_the_rest())).float()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


def inputs_of(module: Any) -> int:
    """Inputs of a linear layer."""
    return int(module.weight.shape[0] if isinstance(module, Conv1D) else module.weight.shape[1])
