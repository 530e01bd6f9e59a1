"""What a model will hold and save for its backward pass, read off its configuration: no weight is made or loaded.

The model stands on the meta device. Its parameters are counted there; its activations by running the real forward
pass, and the backward pass under checkpointing, on tensors that have a shape and a device but no memory.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.initialization import no_init_weights

from yunque.distributed.accounting import SavedActivations
from yunque.models.adapter import ScoringBatch, adapter_for
from yunque.models.arguments import ModelArguments
from yunque.models.fusing import fuse_layers
from yunque.models.head import HeadWeights, head_scores
from yunque.models.loading import add_lora, load_config
from yunque.models.policy import ValueHead, disable_dropout
from yunque.models.quantized import without_float32_modules


@dataclass(frozen=True)
class Weight:
    """One parameter: its name and shape, whether it trains, whether it is packed as nf4."""

    name: str
    shape: tuple[int, ...]
    trains: bool
    packed: bool = False

    @property
    def added(self) -> bool:
        """Whether it is an adapter's or the value head's: made by us, not read."""
        return "lora_" in self.name or self.name.startswith("v_head.")

    @property
    def count(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Batch:
    """Rows of a device's forward pass and their lengths in tokens; ``padded`` rows differ in length."""

    rows: int
    prompt_tokens: int
    answer_tokens: int
    padded: bool = True


def read_config(args: ModelArguments) -> PretrainedConfig:
    """The configuration of ``args.model_name_or_path``; an output head that the checkpoint unties stays untied.

    Raises:
        InputError: no such model.
    """
    name = args.model_name_or_path or ""
    config = load_config(name, args)
    raw, _ = PretrainedConfig.get_config_dict(name, revision=args.model_revision)
    if raw.get("tie_word_embeddings") is False:  # transformers 5 makes every T5 claim a tied head
        config.tie_word_embeddings = False
    return config


def build(config: PretrainedConfig, args: ModelArguments) -> Any:
    """The language model of ``config`` on the meta device, with the adapter that ``args`` ask for.

    Raises:
        InputError: an architecture without language head, LoRA targets that match no layer.
    """
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    untied = config.is_encoder_decoder and not config.tie_word_embeddings
    whole = deepcopy(config)
    whole.tie_word_embeddings = untied or config.tie_word_embeddings  # such models tie encoder and decoder by it too
    with torch.device("meta"), no_init_weights(), without_float32_modules(args.load_in_4bit, auto, config):
        model = auto.from_config(whole, dtype=torch.float32)
    model.tie_weights()
    if untied:
        model.get_output_embeddings().weight = nn.Parameter(torch.empty_like(model.get_input_embeddings().weight))
        model.config.tie_word_embeddings = False
    return add_lora(model, args) if args.use_peft else model


def part_of(config: PretrainedConfig, layers: int, ranks: int) -> PretrainedConfig:
    """``config`` with so many layers, of which it holds what one of ``ranks`` tensor-parallel devices computes."""
    part = deepcopy(config)
    for name in ("num_hidden_layers", "num_decoder_layers"):
        if getattr(part, name, None):
            setattr(part, name, layers)
    if getattr(part, "layer_types", None):
        part.layer_types = part.layer_types[:layers]
    if ranks > 1:
        part.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            if getattr(config, name, None):
                setattr(part, name, max(1, getattr(config, name) // ranks))
    return part


def weights_of(model: Any, args: ModelArguments, *, value_head: bool) -> list[Weight]:
    """Every parameter once; under ``load_in_4bit`` the linear layers' are packed, the head's only if asked for."""
    base = _base(model)
    head = base.get_output_embeddings()
    packed = set()
    for layer in model.modules() if args.load_in_4bit else ():
        if (
            isinstance(layer, nn.Linear)
            and not layer.weight.requires_grad
            and (args.quantize_head or layer is not head)
        ):
            packed.add(id(layer.weight))
    weights = [
        Weight(name, tuple(weight.shape), weight.requires_grad, id(weight) in packed)
        for name, weight in model.named_parameters()
    ]
    if value_head:
        hidden_size = base.config.get_text_config(decoder=True).hidden_size
        weights += [Weight("v_head.weight", (1, hidden_size), True), Weight("v_head.bias", (1,), True)]
    return weights


@dataclass(frozen=True)
class Engine:
    """How a profile computes: in float32, on bf16 copies of float32 weights (autocast), or on bf16 weights.

    ZeRO-3 has linear layers of its own, which keep their input whether or not their weight trains, and leaves adapters
    and value head, which are made after it has taken the model over, in float32.
    """

    precision: Literal["float32", "autocast", "bfloat16"]
    zero3: bool = False


def saved_bytes(original: Any, task: str, batch: Batch, engine: Engine, *, checkpointing: bool) -> int:
    """Most bytes a training step of ``task`` keeps for its backward pass.

    ``task`` is finetune, preferences (each row a pair) or rl, with our trainers' loss.
    """
    model: Any = deepcopy(original)
    if task != "finetune":
        fuse_layers(model)
        disable_dropout(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    head = ValueHead(model.config.get_text_config(decoder=True).hidden_size).to("meta") if task == "rl" else None
    for part in (model, head):
        if part is not None:
            for name, weight in part.named_parameters() if engine.precision == "bfloat16" else ():
                if not (engine.zero3 and (part is head or "lora_" in name)):
                    weight.data = weight.data.to(torch.bfloat16)
            _make_fake(part, mode)
    if engine.zero3:
        _save_every_input(model)
    model.train()
    if checkpointing:
        options = {"use_reentrant": False, "preserve_rng_state": False}  # there is no generator to preserve
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the method's name, which changes in transformers 6
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    with ExitStack() as stack:
        stack.enter_context(mode)
        saved = stack.enter_context(SavedActivations())
        with torch.autocast("cpu", torch.bfloat16, enabled=engine.precision == "autocast"):
            loss = _supervised(model, batch) if task == "finetune" else _scored(model, head, task, batch)
        if checkpointing:
            loss.backward()
        return saved.peak_bytes


def _save_every_input(model: nn.Module) -> None:
    """Let linear layers keep their input although their weight is frozen, as DeepSpeed's do."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
            layer.forward = partial(_linear, layer)  # type: ignore[method-assign]


def _linear(layer: nn.Linear, states: Tensor) -> Tensor:
    return _InputSaved.apply(states, layer.weight, layer.bias)


class _InputSaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states, weight)
        return nn.functional.linear(states, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _, weight = ctx.saved_tensors
        return gradients[0] @ weight, None, None


def _supervised(model: Any, batch: Batch) -> Tensor:
    """The loss of recipes/finetune.py, as its Trainers take it."""
    inputs, labels_BR = _inputs(model, batch)
    if model.config.is_encoder_decoder:
        logits = model(**inputs).logits.flatten(0, -2).float()
        return cross_entropy(logits, labels_BR.flatten(), reduction="sum")
    base = _base(model)
    hidden_BTD = base.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    return _FusedHead.apply(hidden_ND, base.get_output_embeddings().weight, inputs["input_ids"][:, 1:].flatten())


class _FusedHead(torch.autograd.Function):
    """Saves what TRL's fused head saves: its input, targets and normalizers, and no logits."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32))
        return hidden_ND.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, *_ = ctx.saved_tensors
        needed = zip(ctx.needs_input_grad, (hidden_ND, weight_VD, None), strict=True)
        return tuple(torch.zeros_like(tensor) if needs else None for needs, tensor in needed)


def _scored(model: Any, value_head: Any, task: str, batch: Batch) -> Tensor:
    """Log-probabilities of all answers, and values, as models.policy computes them: no logits of a whole batch."""
    rows = 2 * batch.rows if task == "preferences" else batch.rows
    batch = Batch(rows, batch.prompt_tokens, batch.answer_tokens, batch.padded)
    inputs, response_BR = _inputs(model, batch)
    base = _base(model)
    head = base.get_output_embeddings()
    found: list[Tensor] = []

    def instead(states_BRD: Tensor) -> Tensor:
        states_ND = states_BRD.reshape(-1, states_BRD.shape[-1])
        # A copy, as choosing the unpadded positions makes one.
        found.append(head_scores(states_ND.clone(), HeadWeights(head.weight, head.bias), response_BR.flatten(), 1.0)[0])
        return states_BRD[..., :1]

    head.forward = instead
    names = SimpleNamespace(pad_token_id=0, eos_token_id=1, model_max_length=2**30)
    _, hidden_BRD = adapter_for(model, names).score(model, ScoringBatch(inputs, response_BR, response_BR))
    loss = (found[0].exp() * found[0]).sum()
    return loss if value_head is None else loss + value_head(hidden_BRD).square().sum()


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _inputs(model: Any, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of one forward pass, and answers (B, R); without padding no mask is kept, as on rows of one length."""
    encoder_decoder = model.config.is_encoder_decoder
    answers = torch.zeros(batch.rows, batch.answer_tokens, dtype=torch.long)
    length = batch.prompt_tokens if encoder_decoder else batch.prompt_tokens + batch.answer_tokens
    inputs = {"input_ids": torch.zeros(batch.rows, length, dtype=torch.long)}
    if encoder_decoder:
        inputs["decoder_input_ids"] = answers
    if batch.padded:
        inputs["attention_mask"] = torch.ones(batch.rows, length, dtype=torch.long)
    return inputs, answers


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace parameters and buffers on the meta device by ones that claim to be on the CPU."""
    twins: dict[int, Any] = {}

    def twin(tensor: Tensor) -> Any:
        if id(tensor) not in twins:
            meta = tensor.detach().to("meta")
            twins[id(tensor)] = mode.fake_tensor_converter.from_meta_and_device(mode, meta, torch.device("cpu"))
        return twins[id(tensor)]

    for layer in model.modules():
        for name, weight in layer.named_parameters(recurse=False, remove_duplicate=False):
            key = id(weight)
            if not isinstance(twins.get(key), nn.Parameter):
                twins[key] = nn.Parameter(twin(weight), requires_grad=weight.requires_grad)
            layer._parameters[name] = twins[key]
        for name, buffer in layer.named_buffers(recurse=False, remove_duplicate=False):
            layer._buffers[name] = twin(buffer)
