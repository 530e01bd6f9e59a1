"""Students: layers of the teacher, or its configuration made smaller."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from yunque.compression.arguments import StudentArguments
from yunque.errors import InputError
from yunque.models.arguments import ModelArguments
from yunque.models.loading import keep_head_untied, load_base, load_tokenizer
from yunque.models.scratch import parse_overrides


@dataclass(frozen=True)
class Stack:
    """A run of equal layers: where it lies in the model, the option that names its layers, the config's count."""

    path: str
    option: str
    count: str


@dataclass(frozen=True)
class Student:
    """The model, and for each of its stacks the teacher's layer that each of its layers was (None: none)."""

    model: PreTrainedModel
    origins: dict[str, list[int]] | None
    parent: str | None = None


_STACKS = {
    "t5": (
        Stack("encoder.block", "student_layers", "num_layers"),
        Stack("decoder.block", "student_decoder_layers", "num_decoder_layers"),
    ),
    "bart": (
        Stack("model.encoder.layers", "student_layers", "encoder_layers"),
        Stack("model.decoder.layers", "student_decoder_layers", "decoder_layers"),
    ),
    "gpt2": (Stack("transformer.h", "student_layers", "n_layer"),),
}
_LLAMA_KIN = (Stack("model.layers", "student_layers", "num_hidden_layers"),)


def stacks_of(model: PreTrainedModel) -> Sequence[Stack]:
    """The stacks of layers of ``model``.

    Raises:
        InputError: an architecture whose layers this project does not know.
    """
    kind = model.config.model_type
    stacks = _STACKS.get(kind, _LLAMA_KIN)
    try:
        known = all(isinstance(model.get_submodule(stack.path), nn.ModuleList) for stack in stacks)
    except AttributeError:
        known = False
    if not known:
        raise InputError(
            f"teacher_name_or_path: the layers of {kind} are not known here; known are "
            f"{', '.join(_STACKS)}, llama and its kin; give student_name_or_path"
        )
    return stacks


def make_student(args: StudentArguments, teacher: PreTrainedModel, tokenizer: Any, *, seed: int) -> Student:
    """Build or load what ``args`` say; without any of them, half of the teacher's layers.

    Raises:
        InputError: layers the teacher has not, a configuration that is impossible, a student of another vocabulary.
    """
    if args.student_name_or_path is not None:
        return Student(_given(args.student_name_or_path, teacher, tokenizer), None, args.student_name_or_path)
    if args.student_config_overrides is not None:
        return Student(_configured(args.student_config_overrides, teacher, seed), None)
    origins = {}
    for stack in stacks_of(teacher):
        layers = len(_layers(teacher, stack))
        given = getattr(args, stack.option)
        if given is None and (args.student_layers or args.student_decoder_layers):
            given = list(range(layers))  # the other stack stays whole
        count = args.student_num_layers or (layers + 1) // 2
        if given is None and count > layers:
            raise InputError(f"student_num_layers: {count} is more than the {layers} of the teacher's {stack.path}")
        kept = spread(layers, count) if given is None else sorted(given)
        if kept[0] < 0 or kept[-1] >= layers:
            raise InputError(f"{stack.option}: the teacher's {stack.path} has layers 0 to {layers - 1} only")
        origins[stack.path] = kept
    if args.student_decoder_layers and len(origins) == 1:
        raise InputError(f"student_decoder_layers: {teacher.config.model_type} has one stack; give student_layers")
    return Student(keep_layers(teacher, origins), origins)


def spread(layers: int, count: int) -> list[int]:
    """``count`` of the numbers below ``layers``, evenly spread, first and last among them (one alone is the first)."""
    return [round(index * (layers - 1) / max(1, count - 1)) for index in range(count)]


def keep_layers(teacher: PreTrainedModel, origins: dict[str, list[int]]) -> PreTrainedModel:
    """A copy of ``teacher`` that has only the layers of ``origins``: numbers by stack path.

    Raises:
        InputError: a T5 with more decoder than encoder layers, whose cache transformers sizes by the encoder.
    """
    student = deepcopy(teacher)
    student.requires_grad_(True)
    for stack in stacks_of(student):
        parent, _, name = stack.path.rpartition(".")
        old = _layers(student, stack)
        layers: Any = nn.ModuleList(old[number] for number in origins[stack.path])
        _hand_on_position_bias(old[0], layers[0])
        for number, layer in enumerate(layers):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = number  # its place in the cache
        setattr(student.get_submodule(parent), name, layers)
        _count_layers(student.config, stack, origins[stack.path])
        owner: Any = student.get_submodule(parent)
        if getattr(owner, "config", student.config) is not student.config:  # T5's stacks have one each
            _count_layers(owner.config, stack, origins[stack.path])
            if student.config.model_type == "t5":
                owner.config.num_layers = len(layers)
    if student.config.model_type == "t5" and student.config.num_decoder_layers > student.config.num_layers:
        raise InputError(
            f"student_decoder_layers: {student.config.num_decoder_layers} are more than the encoder's "
            f"{student.config.num_layers}, and transformers' T5 cannot generate so; keep more of the encoder"
        )
    return student


def _layers(model: PreTrainedModel, stack: Stack) -> Any:
    return model.get_submodule(stack.path)


def _count_layers(config: Any, stack: Stack, kept: Sequence[int]) -> None:
    setattr(config, stack.count, len(kept))
    types = getattr(config, "layer_types", None)  # Qwen's kin say of each layer which attention it has
    if types is not None:
        config.layer_types = [types[number] for number in kept]


def _hand_on_position_bias(old_first: Any, new_first: Any) -> None:
    """T5 keeps the relative positions of a whole stack in its first layer."""
    if old_first is new_first or not hasattr(old_first, "layer"):
        return
    source, target = old_first.layer[0].SelfAttention, new_first.layer[0].SelfAttention
    target.has_relative_attention_bias = True
    target.relative_attention_bias = source.relative_attention_bias


def _configured(overrides: str, teacher: PreTrainedModel, seed: int) -> PreTrainedModel:
    config = deepcopy(teacher.config)
    kind = type(config)
    names = {option.name for option in dataclasses.fields(kind)}
    known = {name: value for name, value in config.to_dict().items() if name in names}
    fixed = [name for name in ("vocab_size", "pad_token_id", "eos_token_id", "bos_token_id") if name in known]
    try:
        values = parse_overrides(overrides, known, fixed)
    except InputError as error:
        raise InputError(f"student_{error}") from error
    for name, value in values.items():
        unset = known[name] is None and value.isdecimal()  # such as GPT-2's n_inner
        setattr(config, name, int(value) if unset else value)
    if config.model_type == "t5" and config.num_decoder_layers > config.num_layers:
        raise InputError("student_config_overrides: num_decoder_layers is more than num_layers; raise num_layers")
    tied = teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight
    try:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            config.tie_word_embeddings = True if config.model_type == "t5" else tied
            model: Any = type(teacher)(config)
            if config.model_type == "t5" and not tied:  # built tied: see models.scratch.new_model
                head = torch.empty_like(model.lm_head.weight).normal_(std=config.d_model**-0.5)
                model.lm_head.weight = nn.Parameter(head)
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise InputError(f"student_config_overrides: {error}") from error
    keep_head_untied(model)
    model.generation_config = deepcopy(teacher.generation_config)
    return model


def _given(name: str, teacher: PreTrainedModel, tokenizer: Any) -> PreTrainedModel:
    args = ModelArguments(model_name_or_path=name, pad_token=tokenizer.pad_token)
    own = load_tokenizer(args)
    if own.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"student_name_or_path: the vocabulary of {name} is not the teacher's; soft targets need one")
    model = load_base(name, args)
    rows = [each.get_output_embeddings().weight.shape[0] for each in (model, teacher)]
    if rows[0] != rows[1]:
        raise InputError(
            f"student_name_or_path: {name} has {rows[0]} logits, the teacher {rows[1]}; resize one of them"
        )
    if model.config.is_encoder_decoder != teacher.config.is_encoder_decoder:
        raise InputError(f"student_name_or_path: {name} and the teacher are not both encoder-decoder models")
    return model
