"""Loading of what TRL 0.11's wrappers load: models, adapters, value heads, reward adapters; safetensors only."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from yunque.errors import InputError

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = "pytorch_model.bin"
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
        model = auto.from_pretrained(base, *model_args, **options)
        return PeftModel.from_pretrained(model, name, is_trainable=is_trainable, token=token)
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
        InputError: an adapter folder keeps its value head in a pickled file.
    """
    head: dict[str, Tensor] = {}
    for path in _weight_files(name, token):
        with safe_open(path, "pt") as file:
            head |= {key: file.get_tensor(key) for key in file.keys() if key.startswith("v_head.")}  # noqa: SIM118
    if not head:
        if _holds_pickled_head(name):
            raise InputError(
                f"pretrained_model_name_or_path: {name} keeps its value head in {_PICKLED}, and pickled files are not "
                f"read; load and save it as {WEIGHTS} where you trust it, or remove it to start with a new value head"
            )
        logger.warning("%s has no value head: a new one is made (as it should be where PPO starts)", name)
    return head


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


def _weight_files(name: str, token: Any) -> list[str]:
    """Files that may hold the value head."""
    single = find(name, WEIGHTS, token)
    if single is not None:
        return [single]
    index = find(name, _INDEX, token)
    if index is None:
        return []
    shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    wanted = sorted({shard for key, shard in shards.items() if key.startswith("v_head.")})
    return [path for shard in wanted if (path := find(name, shard, token)) is not None]


def _holds_pickled_head(name: str) -> bool:
    """In an adapter folder, TRL 0.11's pytorch_model.bin can only be the value head."""
    return (Path(name) / _PICKLED).is_file() and (Path(name) / "adapter_config.json").is_file()
