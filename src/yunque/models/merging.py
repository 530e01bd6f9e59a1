"""Adapters in the weights: merged for good into a plain model, or folded for the time of a rollout."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from textwrap import shorten
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from yunque.errors import InputError
from yunque.models.quantized import is_quantized

_LARGEST_ERROR = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Of the merged model's logits, relative to their norm; half precision rounds every sum of weights."""
_HALF_PRECISION_ERROR = 0.2
_PROBE_TOKENS = 8


# --- for good ---------------------------------------------------------------------------------------------------------


def merged(model: PeftModel) -> PreTrainedModel:
    """Merge the trained adapter into a copy of the base, so that training could go on with ``model``.

    nf4 weights W become bfloat16 ones, dequantize(W) + (alpha / r) B A: packed again they would lose the update.
    A head and an embedding that share one matrix get one each where the adapter changes only one of them.

    Raises:
        InputError: an adapter that is no change of the base's weights, or whose merged model is not the same.
    """
    if model.active_peft_config.is_prompt_learning:
        raise InputError("merge_adapter: virtual tokens cannot be merged; leave merge_adapter out")
    # of adapters that it ties to each other PEFT keeps views, which deepcopy refuses
    ties = [getattr(layer, "kwargs", {}).get("tied_adapter") or {} for layer in model.modules()]
    views = {id(view): view.detach() for tie in ties for view in tie.values()}
    copy: Any = deepcopy(model, views).eval()
    for layer in copy.modules():
        vars(layer).pop("forward", None)  # what trainers put there (TRL's fused head) still computes with the original
    copy.set_adapter("default")
    expected = _probe_logits(copy)
    if any(is_quantized(parameter) for parameter in copy.parameters()):
        copy, dtypes = _on_plain_weights(copy)
    else:
        dtypes = {}
    _untie_adapted(copy)
    was_tied = getattr(copy.config, "tie_word_embeddings", False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied weights, which are untied
            plain: Any = copy.merge_and_unload(adapter_names=["default"])
    except (AttributeError, ValueError, RuntimeError, NotImplementedError, TypeError) as error:
        reason = shorten(str(error), 150, placeholder=" ...")
        raise InputError(f"merge_adapter: this adapter cannot be merged ({reason}); leave merge_adapter out") from error
    for name, weight in plain.named_parameters():
        weight.data = weight.data.to(dtypes.get(name, weight.dtype))
    plain.config.tie_word_embeddings = was_tied  # PEFT says that head and embedding parted, not what parted with them
    _settle_ties(plain)
    _check_same(expected, plain)
    return plain


def _on_plain_weights(model: Any) -> tuple[Any, dict[str, torch.dtype]]:
    """The adapter of ``model`` on its nf4 base in float32, and the types that the base's weights are to have."""
    transposed = [name for name, layer in model.get_base_model().named_modules() if _is_transposed(layer)]
    state, config = get_peft_model_state_dict(model, adapter_name="default"), deepcopy(model.peft_config["default"])
    base = model.unload().dequantize()
    for name in transposed:
        name = name.removesuffix(".base_layer")
        linear = base.get_submodule(name)
        layer = Conv1D(linear.out_features, linear.in_features)
        layer.weight, layer.bias = nn.Parameter(linear.weight.t().contiguous()), linear.bias
        base.set_submodule(name, layer)
    dtypes = {name: weight.dtype for name, weight in base.named_parameters()}
    if isinstance(getattr(config, "init_lora_weights", True), str):
        config.init_lora_weights = True  # others change the base, which they have done already
    config.inference_mode = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, which will be untied
        copy = get_peft_model(base.float(), config)
    set_peft_model_state_dict(copy, state)
    return copy.eval(), dtypes


def _is_transposed(layer: nn.Module) -> bool:
    """Whether nf4 took the place of GPT-2's Conv1D, a linear layer with its weight the other way round."""
    return getattr(layer, "source_cls", None) is Conv1D


def _untie_adapted(model: nn.Module) -> None:
    """Give every adapted layer whose weight other layers share a weight of its own, for what is merged into it."""
    shared = Counter(id(weight) for layer in model.modules() for weight in layer._parameters.values())
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            base: Any = layer.get_base_layer()
            for name, weight in list(base._parameters.items()):
                if weight is not None and shared[id(weight)] > 1:
                    setattr(base, name, nn.Parameter(weight.detach().clone(), weight.requires_grad))


def _settle_ties(model: Any) -> None:
    """Tie again what merging left equal, or let the configuration and every weight say that they are untied."""
    config = model.config
    pairs = [(model.get_parameter(one), model.get_parameter(other)) for one, other in _ties(model).items()]
    if all(one.shape == other.shape and torch.equal(one, other) for one, other in pairs):
        model.tie_weights()
        return
    head = model.get_output_embeddings()
    if getattr(config, "scale_decoder_outputs", False) and head is not None:  # T5's, which only a tied head has
        head.weight = nn.Parameter(head.weight.detach() * config.d_model**-0.5)
        config.scale_decoder_outputs = False
    seen: set[int] = set()
    for name in dict.fromkeys([*_ties(model).values(), *_ties(model)]):
        weight = model.get_parameter(name)
        if id(weight) in seen:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, nn.Parameter(weight.detach().clone()))
        seen.add(id(weight))
    config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _ties(model: Any) -> dict[str, str]:
    """Names of weights that the architecture ties, each with what it is tied to."""
    found: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    return found


@torch.no_grad()
def _probe_logits(model: Any) -> Tensor:
    """Logits of a fixed prompt."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(3, 3 + _PROBE_TOKENS, device=model.device) % vocabulary)[None]
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder and model.can_generate() else {}
    logits: Tensor = model(input_ids=ids, **inputs).logits
    return logits.float().cpu()


def _check_same(expected: Tensor, model: Any) -> None:
    found = _probe_logits(model)
    error = ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()
    if not error <= _LARGEST_ERROR.get(model.dtype, _HALF_PRECISION_ERROR):
        raise InputError(
            f"merge_adapter: merged, the model's logits differ by {error:.1e} of their size from the adapter's; leave "
            "merge_adapter out"
        )


# --- for a rollout ----------------------------------------------------------------------------------------------------


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """While entered, W carries its active adapter's update W + (alpha / r) B A, and leaves exactly as it came.

    Saves the adapter's two products per layer and token. A weight that others share is another one for the time.
    Where folding would not be exact (half precision, quantised or sharded weights, DoRA, biases of its own, layers
    saved whole) the model stays as it is.
    """
    layers = _foldable_layers(model)
    if not layers:
        yield
        return
    originals = [layer.get_base_layer().weight for layer in layers]
    try:
        with torch.no_grad():
            for layer, original in zip(layers, originals, strict=True):
                update = sum(layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A)
                layer.get_base_layer().weight = nn.Parameter(original + update, requires_grad=False)
        with model.disable_adapter():  # type: ignore[operator]
            yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.get_base_layer().weight = original


def _foldable_layers(model: nn.Module) -> list[Any]:
    """The adapted layers, if every one of them can be folded; else none."""
    if not isinstance(model, PeftModel):
        return []
    if any(isinstance(module, ModulesToSaveWrapper) for module in model.modules()):
        return []
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return layers if all(_is_foldable(layer) for layer in layers) else []


def _is_foldable(layer: Any) -> bool:
    if type(layer) is not LoraLinear or layer.disable_adapters or layer.merged:
        return False
    weight = layer.get_base_layer().weight
    plain = type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.numel() > 0
    variants = (layer.use_dora, layer.lora_bias, layer.lora_variant)  # what is more than B A
    return plain and not any(part.get(name) for part in variants for name in layer.active_adapters)
