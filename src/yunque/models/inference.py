"""Load a model folder to use it as it is: full, adapter on its base, nf4 or int8 as bitsandbytes stored them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig

from yunque.errors import InputError
from yunque.models.adapter_folders import adapter_config, check_vocabulary, put_on
from yunque.models.arguments import ModelArguments
from yunque.models.loading import base_arguments, load_base_of, load_config, load_tokenizer
from yunque.models.quantized import is_quantized, keep_packing, without_float32_modules

FULL, ADAPTER, NF4, INT8 = "full", "adapter", "nf4", "int8"

_MODEL_FILES = {".bin", ".data", ".json", ".jinja", ".model", ".onnx", ".onnx_data", ".safetensors", ".txt"}
_OUR_FILES = {"yunque.json", "classification.json", "plan.json", "sensitivity.json"}  # which no engine loads
_STORED_SCALES = (".weight.absmax", ".SCB")  # of nf4 and of int8, beside the packed weight of their module


@dataclass(frozen=True)
class InferenceModel:
    """A language model in eval mode, its tokenizer, what kind of folder it came from and an adapter's base."""

    model: Any
    tokenizer: Any
    kind: str
    base: str | None

    @property
    def has_virtual_tokens(self) -> bool:
        """Whether prompt tuning's embeddings stand before every prompt."""
        return isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning


def load_for_inference(args: ModelArguments) -> InferenceModel:
    """Load ``args.model_name_or_path`` with nothing to train.

    Raises:
        InputError: no language model under that name, an adapter whose base is gone, a quantized folder asked for as
            nf4 once more, bitsandbytes missing.
    """
    name = str(args.model_name_or_path)
    tokenizer = load_tokenizer(args)
    adapter = adapter_config(name)
    base = adapter["base_model_name_or_path"] if adapter else name
    config = load_config(base, base_arguments(args, adapter))
    _refuse_classifier(base, config)
    kind = stored_kind(config)
    if kind != FULL and args.load_in_4bit:
        raise InputError(f"load_in_4bit: {base} is stored as {kind} already; leave load_in_4bit out")
    if kind != FULL:  # asked for another dtype, transformers gives it to the biases alone
        args = replace(args, dtype="auto")
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with without_float32_modules(_stores_float32_modules_packed(base, auto, config), auto, config):
            model: Any = load_base_of(name, adapter, args)
    except ImportError as error:
        raise InputError(f"model_name_or_path: {base} needs a package that is missing: {error}") from error
    if any(is_quantized(parameter) for parameter in model.parameters()):
        keep_packing(model)
        kind = NF4
    if adapter:
        model, kind = put_on(model, name, adapter), ADAPTER
    check_vocabulary(model, tokenizer, name)
    return InferenceModel(model.eval(), tokenizer, kind, base if adapter else None)


def stored_kind(config: PretrainedConfig) -> str:
    """How the weights of a folder with this configuration are stored."""
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return FULL
    options = stored if isinstance(stored, dict) else stored.to_dict()
    if options.get("load_in_4bit"):
        return NF4
    return INT8 if options.get("load_in_8bit") else str(options.get("quant_method"))


def model_bytes(folder: str) -> int | None:
    """Bytes of the files that a local model is loaded from, without logs, reports and checkpoints; None of a hub id."""
    path = Path(folder)
    if not path.is_dir():
        return None
    files = [*path.iterdir(), *(path / "onnx").glob("*")]
    return sum(file.stat().st_size for file in files if file.is_file() and _is_model_file(file))


def _is_model_file(path: Path) -> bool:
    is_ours = path.name in _OUR_FILES or path.suffix == ".jsonl"
    return path.suffix in _MODEL_FILES and not is_ours


def _refuse_classifier(name: str, config: PretrainedConfig) -> None:
    kinds = [kind for kind in config.architectures or [] if kind.endswith("ForSequenceClassification")]
    if kinds:
        raise InputError(f"model_name_or_path: {name} is a classifier ({kinds[0]}); give a language model")


def _stores_float32_modules_packed(name: str, auto: Any, config: PretrainedConfig) -> bool:
    """Whether modules that the architecture keeps in float32 (T5's ``wo``) lie quantized in the folder."""
    if stored_kind(config) not in (NF4, INT8) or not Path(name).is_dir():
        return False
    model_class = auto._model_mapping.get(type(config), None)
    kept = set(getattr(model_class, "_keep_in_fp32_modules", None) or ())
    return any(kept & set(module.split(".")) for module in _packed_modules(Path(name)))


def _packed_modules(folder: Path) -> Iterable[str]:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # no mapping
                for ending in _STORED_SCALES:
                    if key.endswith(ending):
                        yield key.removesuffix(ending)
