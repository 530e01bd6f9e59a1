"""Loading of what TRL 0.11's wrappers load: models, adapters, value heads, reward adapters."""

from __future__ import annotations

import json
import logging
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from yunque.errors import InputError

WEIGHTS = "model.safetensors"
_PICKLED = "pytorch_model.bin"
_HEAD = "v_head."
_KBIT_OPTIONS = ("use_gradient_checkpointing", "gradient_checkpointing_kwargs")

logger = logging.getLogger(__name__)


def load(
    auto: Any,
    name: str,
    model_args: tuple[Any, ...],
    options: dict[str, Any],
    is_trainable: bool,
    peft_config: PeftConfig | None,
) -> PreTrainedModel | PeftModel:
    """Load a model, or the base of an adapter folder with its adapter, or a model with a new adapter."""
    options = _today(options)
    kbit = {key: options.pop(key) for key in _KBIT_OPTIONS if key in options}
    token = options.get("token")
    if find(name, "adapter_config.json", token) is not None:
        if peft_config is not None:
            logger.warning("peft_config: ignored, %s holds an adapter already", name)
        base = PeftConfig.from_pretrained(name, token=token).base_model_name_or_path
        with _value_head_is_expected():
            model = auto.from_pretrained(base, *model_args, **options)
        return PeftModel.from_pretrained(model, name, is_trainable=is_trainable, token=token)
    with _value_head_is_expected():
        model = auto.from_pretrained(name, *model_args, **options)
    return model if peft_config is None else with_new_adapter(model, peft_config, kbit)


def with_new_adapter(model: PreTrainedModel, peft_config: PeftConfig, kbit: dict[str, Any]) -> PeftModel:
    """Add a fresh adapter; a quantized model is prepared for training first."""
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, **kbit)
    return get_peft_model(model, peft_config)


def find(name: str, filename: str, token: Any) -> str | None:
    """Path of a file in a local folder or on the hub (by the cache); None if there is no such file."""
    if Path(name).is_dir():
        path = Path(name) / filename
        return str(path) if path.is_file() else None
    try:
        return hf_hub_download(name, filename, token=token)
    except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError, OSError):
        return None


def read_value_head(name: str, token: Any = None) -> dict[str, Tensor]:
    """Tensors ``v_head.*`` of a folder or hub model; empty, with a warning, where it has none.

    Raises:
        InputError: a file that may hold the head cannot be read as tensors alone.
    """
    for whole in (WEIGHTS, _PICKLED):
        head: dict[str, Tensor] = {}
        files = _weight_files(name, whole, token)
        for path in files:
            head |= _head_of(path)
        if head:
            return head
        if files and not Path(name).is_dir():
            break  # a hub model's other format holds the same, and would be a second download
    logger.warning("%s has no value head: a new one is made (as it should be where PPO starts)", name)
    return {}


def load_reward_adapter(model: PeftModel, name: str, adapter_name: str) -> nn.Linear:
    """Load the adapter of a reward model into ``model``, not to be trained, and return its score head.

    Raises:
        InputError: the adapter has no safetensors, or no score head in them.
    """
    model.load_adapter(name, adapter_name, is_trainable=False)
    path = find(name, "adapter_model.safetensors", None)
    if path is None:
        raise InputError(f"reward_adapter: {name} has no adapter_model.safetensors")
    head = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (an opened safetensors file is no mapping)
            *_, module, weight = key.split(".")
            if module == "score":
                head[weight] = file.get_tensor(key)
    if "weight" not in head:
        raise InputError(f"reward_adapter: {name} has no score head; train it with task_type='SEQ_CLS'")
    labels, hidden = head["weight"].shape
    score = nn.Linear(hidden, labels, bias="bias" in head)
    score.load_state_dict(head)
    return score.to(model.device, dtype=model.dtype).requires_grad_(False)


def _today(options: dict[str, Any]) -> dict[str, Any]:
    """Options of transformers 4 under the names of transformers 5."""
    options = dict(options)
    if "torch_dtype" in options:
        options["dtype"] = options.pop("torch_dtype")
    bits = {key: True for key in ("load_in_8bit", "load_in_4bit") if options.pop(key, False)}
    if bits:
        options.setdefault("quantization_config", BitsAndBytesConfig(**bits))
        options.setdefault("device_map", {"": PartialState().device})
    return options


def _weight_files(name: str, whole: str, token: Any) -> list[str]:
    """Files that may hold the value head: ``whole``, or those of its shards whose index names the head."""
    path = find(name, whole, token)
    if path is not None:
        return [path]
    index = find(name, f"{whole}.index.json", token)
    if index is None:
        return []
    shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    wanted = sorted({shard for key, shard in shards.items() if key.startswith(_HEAD)})
    paths = {shard: find(name, shard, token) for shard in wanted}
    if missing := [shard for shard, path in paths.items() if path is None]:
        raise InputError(f"pretrained_model_name_or_path: {name} lacks {missing[0]}, which holds its value head")
    return [path for path in paths.values() if path is not None]


def _head_of(path: str) -> dict[str, Tensor]:
    """Tensors ``v_head.*`` of one file; a pickled one is read by torch's reader of tensors, which runs no code."""
    if path.endswith(".safetensors"):
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key.startswith(_HEAD)}  # noqa: SIM118
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return {key: tensor.clone() for key, tensor in tensors.items() if key.startswith(_HEAD)}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, TypeError) as error:
        raise InputError(
            f"pretrained_model_name_or_path: {path} is damaged or holds more than tensors, so its value head is not "
            f"read; save the head as {WEIGHTS} where you trust the file, or remove it to start with a new head"
        ) from error


@contextmanager
def _value_head_is_expected() -> Iterator[None]:
    """Keep the value head out of transformers' report of unexpected weights: it is read apart."""
    adjust = PreTrainedModel._adjust_missing_and_unexpected_keys

    def without_head(model: PreTrainedModel, info: Any) -> None:
        adjust(model, info)
        info.unexpected_keys = {key for key in info.unexpected_keys if not key.startswith(_HEAD)}

    with patch.object(PreTrainedModel, "_adjust_missing_and_unexpected_keys", without_head):
        yield
