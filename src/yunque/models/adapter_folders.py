"""Adapter folders in PEFT's format: what their files say of base, tokenizer, vocabulary and labels; putting them on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, PeftType, PromptLearningConfig
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from yunque.errors import InputError

CONFIG = "adapter_config.json"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")
_TRAINED_ON = {PeftType.PROMPT_TUNING, PeftType.PREFIX_TUNING}  # of the others PEFT saves what came out of training
_HEADS = ("score", "classifier", "classification_head", "logits_proj", "sequence_summary")
_MISSING = "Found missing adapter keys"  # PEFT only warns


def adapter_config(name: str) -> dict[str, Any] | None:
    """Read the PEFT configuration of a local adapter folder, the path of its base resolved; None for anything else.

    Raises:
        InputError: the file is damaged, or names no kind of adapter or no base.
    """
    path = Path(name) / CONFIG
    if not path.is_file():
        return None
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        base, kind = config.get("base_model_name_or_path"), config["peft_type"]
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"model_name_or_path: {path} is damaged: {error!r}") from error
    if not base:
        raise InputError(f"model_name_or_path: {path} names no base; write its folder as base_model_name_or_path")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(f"model_name_or_path: {name} is an adapter of type {kind}, which this PEFT does not know")
    return config | {"base_model_name_or_path": _moved(base, Path(name))}


def _moved(base: str, folder: Path) -> str:
    """``base`` as it is, or, where it is a relative path that came along with the adapter, from a folder above it."""
    if Path(base).is_absolute() or Path(base).is_dir():
        return base
    places = (parent / base for parent in folder.resolve().parents)
    return next((str(place) for place in places if (place / "config.json").is_file()), base)


def has_virtual_tokens(adapter: Mapping[str, Any]) -> bool:
    """Whether an adapter is one of prompts (prompt tuning, p-tuning, prefix tuning), not of weights."""
    return issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[adapter["peft_type"]], PromptLearningConfig)


def tokenizer_source(name: str, adapter: Mapping[str, Any] | None) -> str:
    """Where the tokenizer of ``name`` is: in its folder; of an adapter without one, above it or in its base."""
    if adapter is None:
        return name
    places = [Path(name), Path(name).resolve().parent]
    held = (place for place in places if any((place / file).is_file() for file in _TOKENIZER_FILES))
    return str(next(held, adapter["base_model_name_or_path"]))


def adapters_inside(folder: Path) -> list[str]:
    """Folders of adapters in ``folder``, where PEFT puts all but the one named default."""
    return sorted(str(path.parent) for path in folder.glob(f"*/{CONFIG}"))


def check_vocabulary(model: Any, tokenizer: Any, name: str, option: str = "model_name_or_path") -> None:
    """Check that every token has an embedding.

    Raises:
        InputError: the tokenizer has more, of tokens that were added, or of another model.
    """
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if rows is not None and largest >= rows:
        raise InputError(
            f"{option}: the tokenizer of {name} has token ids up to {largest}, its model only {rows} embeddings; for "
            "added tokens resize the model (model.resize_token_embeddings(len(tokenizer))) and save both"
        )


def put_on(model: PreTrainedModel, name: str, adapter: Mapping[str, Any], *, trainable: bool = False) -> PeftModel:
    """Put the adapter of folder ``name`` on its base, whose embeddings grow first where the adapter's are larger.

    Raises:
        InputError: the files do not fit the base or lack a part, the adapter is of a kind that cannot be trained on.
    """
    shapes = tensor_shapes(name)
    _resize(model, shapes, name)
    is_prompt = has_virtual_tokens(adapter)
    kind = adapter["peft_type"]
    if trainable and is_prompt and (kind not in _TRAINED_ON or adapter.get("prefix_projection")):
        raise InputError(
            f"model_name_or_path: {name} ({kind.lower().replace('_', ' ')}) cannot be trained on: its files lack the "
            "network that made its virtual tokens; start from its base"
        )
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded: Any = PeftModel.from_pretrained(model, name, is_trainable=trainable and not is_prompt)
    except (RuntimeError, ValueError, KeyError, TypeError, NotImplementedError, OSError, AttributeError) as error:
        reason = shorten(str(error), 200, placeholder=" ...")
        raise InputError(f"model_name_or_path: the adapter {name} does not fit its base: {reason}") from error
    missing = [shorten(str(warning.message), 200) for warning in caught if _MISSING in str(warning.message)]
    if missing:
        raise InputError(f"model_name_or_path: the files of the adapter {name} are not complete: {missing[0]}")
    vars(loaded)["adapter_folder"] = name  # where embeddings that grew and do not train are read from once more
    config: Any = loaded.peft_config["default"]
    config.base_model_name_or_path = adapter["base_model_name_or_path"]
    if trainable and is_prompt:  # PEFT loads virtual tokens to be used only
        config.inference_mode = False
        loaded.prompt_encoder.requires_grad_(True)
    adapted: PeftModel = loaded
    return adapted


def tensor_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of an adapter folder.

    Raises:
        InputError: it has no readable weights.
    """
    folder = Path(name)
    try:
        if (folder / "adapter_model.safetensors").is_file():
            with safe_open(folder / "adapter_model.safetensors", "pt") as file:
                return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        tensors = torch.load(folder / "adapter_model.bin", map_location="meta", weights_only=True)
    except Exception as error:  # of safetensors, pickle, zip or the file system
        raise InputError(f"model_name_or_path: cannot read the weights of the adapter {name}: {error}") from error
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _resize(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Give the base as many embeddings as the adapter was trained with."""
    embeddings = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module]
    weights = {id(module.weight) for module in embeddings}
    names = [path for path, module in model.named_modules() if id(getattr(module, "weight", None)) in weights]
    whole, low_rank = set(), set()
    for key, shape in shapes.items():
        path = key.removeprefix("base_model.model.")
        part = next((path.removeprefix(f"{each}.") for each in names if path.startswith(f"{each}.")), "")
        if part.removeprefix("base_layer.").removeprefix("modules_to_save.").removeprefix("default.") == "weight":
            whole.add(shape[0])
        elif part.startswith("lora_embedding_A"):
            low_rank.add(shape[1])
        elif part.startswith("lora_B"):
            low_rank.add(shape[0])
    rows = model.get_input_embeddings().num_embeddings
    if whole - {rows}:
        model.resize_token_embeddings(max(whole), mean_resizing=False)
    elif low_rank - {rows}:
        raise InputError(
            f"model_name_or_path: the adapter {name} was trained with {max(low_rank)} embeddings, its base has {rows}, "
            "and the rows between are in neither; save the adapter with save_embedding_layers=True"
        )


def classifier_config(
    name: str, adapter: Mapping[str, Any], option: str, *, revision: str = "main", trust_remote_code: bool = False
) -> PretrainedConfig:
    """Configuration of a classifier that is an adapter: the base's, with the labels that the adapter's files hold.

    Their number is that of the rows of its head, their names are in the config.json beside it; the names of a base
    that is a classifier of as many labels do as well.

    Raises:
        InputError: the adapter has no head, or labels without names.
    """
    base = adapter["base_model_name_or_path"]
    config: Any = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust_remote_code)
    heads = [shape for key, shape in tensor_shapes(name).items() if _is_head(key)]
    if not heads:
        raise InputError(f"{option}: {name} has no trained classification head; give an adapter of a classifier")
    count = heads[-1][0]
    own: Any = None
    if (Path(name) / "config.json").is_file():
        own = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    is_classifier = any(kind.endswith("ForSequenceClassification") for kind in config.architectures or [])
    for source in (own, config if is_classifier else None):
        if source is not None and len(source.id2label) == count:
            config.id2label, config.label2id = source.id2label, source.label2id
            config.problem_type = source.problem_type
            if source.pad_token_id is not None:
                config.pad_token_id = source.pad_token_id
            return config
    if count > 1:
        raise InputError(
            f"{option}: the files of the adapter {name} do not name its {count} labels; put the config.json of the "
            "trained classifier, with its id2label, beside adapter_config.json"
        )
    config.num_labels = count
    return config


def _is_head(key: str) -> bool:
    parts: Sequence[str] = key.split(".")
    return parts[-1] == "weight" and any(part in _HEADS for part in parts)


def frozen_embeddings(model: nn.Module, folder: str) -> dict[str, torch.Tensor]:
    """The whole embeddings among the tensors of the adapter ``folder`` that ``model`` holds without training them."""
    frozen = {name for name, weight in model.named_parameters(remove_duplicate=False) if not weight.requires_grad}
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key in frozen}  # noqa: SIM118
