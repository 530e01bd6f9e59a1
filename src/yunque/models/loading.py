"""Load and save tokenizers, language models, adapters and classifiers, by hub id or local folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from yunque.errors import InputError
from yunque.models.arguments import ModelArguments

REFERENCE_ADAPTER = "reference"
_MODEL_ERRORS = (OSError, ValueError, KeyError, SafetensorError)

if not are_progress_bars_disabled():
    logging.disable_progress_bar()  # of loading and saving weights, which takes seconds
    enable_progress_bars()  # of downloads, which take minutes


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer of ``args.model_name_or_path``, with a padding token.

    Raises:
        InputError: no such tokenizer, no padding token, or ``pad_token`` outside the vocabulary.
    """
    name = _required(args.model_name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=_revision(args, name), trust_remote_code=args.trust_remote_code
        )
    except _MODEL_ERRORS as error:
        raise _unloadable("model_name_or_path", name, "tokenizer", error) from error
    if args.pad_token is not None:
        if args.pad_token not in tokenizer.get_vocab():
            raise InputError(f"pad_token: {args.pad_token!r} is not in the vocabulary of {name}")
        tokenizer.pad_token = args.pad_token
    if tokenizer.pad_token_id is None:
        known = [token for token in (tokenizer.unk_token, tokenizer.eos_token) if token]
        hint = f", for example --pad_token '{known[0]}'" if known else ""
        raise InputError(f"model_name_or_path: the tokenizer of {name} has no pad token; name one{hint}")
    return tokenizer


def load_model(args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | PeftModel:
    """Load an encoder-decoder or decoder-only language model to train, adapters included.

    A folder that holds a PEFT adapter yields base plus trainable adapter; otherwise ``use_peft`` adds a new LoRA
    adapter and without it all weights train.

    Raises:
        InputError: no such model, an architecture without language head, or LoRA targets that match no layer.
    """
    name = _required(args.model_name_or_path)
    adapter = adapter_config(name)
    base_name = adapter["base_model_name_or_path"] if adapter else name
    model = load_base(base_name, args)
    _check_vocabulary(model, tokenizer, name)
    if adapter:
        return PeftModel.from_pretrained(model, name, is_trainable=True)
    return _add_lora(model, args) if args.use_peft else model


def load_base(name: str, args: ModelArguments) -> PreTrainedModel:
    """Load plain weights with the language head their configuration calls for.

    Raises:
        InputError: no such model or an architecture without language head.
    """
    config = load_config(name, args)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        model = auto.from_pretrained(
            name,
            revision=_revision(args, name),
            dtype=args.dtype,
            attn_implementation=args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
        )
    except _MODEL_ERRORS as error:
        raise _unloadable("model_name_or_path", name, "language model", error) from error
    keep_head_untied(model)
    return model


def load_config(name: str, args: ModelArguments) -> PretrainedConfig:
    """Load a model's configuration.

    Raises:
        InputError: no such model.
    """
    try:
        return AutoConfig.from_pretrained(
            name, revision=_revision(args, name), trust_remote_code=args.trust_remote_code
        )
    except _MODEL_ERRORS as error:
        raise _unloadable("model_name_or_path", name, "model", error) from error


def load_classifier(name: str, option: str = "reward_model_name_or_path") -> tuple[PreTrainedModel, Any]:
    """Load a sequence classifier in eval mode and its tokenizer; ``option`` is the argument to blame.

    Raises:
        InputError: no such model, or one without a trained classification head.
    """
    _check_path(name, option)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        with _without_load_report():
            model, report = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True)
    except _MODEL_ERRORS as error:
        raise _unloadable(option, name, "classifier", error) from error
    if report["missing_keys"]:
        raise InputError(f"{option}: {name} has no trained classification head (missing {min(report['missing_keys'])})")
    return model.eval(), tokenizer


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers from printing its table of missing weights, where the caller judges them itself."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def adapter_config(name: str) -> dict[str, Any] | None:
    """Read the PEFT configuration of a local adapter folder; None for anything else."""
    path = Path(name) / "adapter_config.json"
    return json.loads(path.read_text()) if path.is_file() else None


def keep_head_untied(model: PreTrainedModel) -> None:
    """Record that the output head is its own matrix, where it is.

    ``T5Config`` of transformers 5 always claims a tied head; an untied checkpoint (FLAN-T5) loads right, but the next
    ``tie_weights`` or FSDP wrap would overwrite its head with the embedding.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and embedding is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False


def save_model(model: PreTrainedModel | PeftModel, tokenizer: Any, folder: Path, *, merge: bool = False) -> None:
    """Write weights (an adapter in PEFT's format unless ``merge``), configuration and tokenizer into ``folder``."""
    if isinstance(model, PeftModel):
        if merge:
            _merged(model).save_pretrained(folder)
        else:
            model.save_pretrained(str(folder), selected_adapters=["default"])
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def trainable_parameters(model: nn.Module) -> str:
    """Say how many parameters train, as the notebooks print it."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"


def _merged(model: PeftModel) -> PreTrainedModel:
    """Merge the trained adapter into a copy of the base, so that training could go on with ``model``."""
    copy = deepcopy(model)
    copy.set_adapter("default")
    return copy.merge_and_unload(adapter_names=["default"])


def _add_lora(model: PreTrainedModel, args: ModelArguments) -> PeftModel:
    task = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    config = LoraConfig(
        task_type=task,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        names = {name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        raise InputError(
            f"lora_target_modules: {args.lora_target_modules or 'no default'} matches nothing in "
            f"{model.config.model_type}; it has {', '.join(sorted(names))}"
        ) from error


def _check_vocabulary(model: PreTrainedModel, tokenizer: Any, name: str) -> None:
    rows = model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise InputError(
            f"model_name_or_path: the tokenizer of {name} has token ids up to {largest}, its model only {rows} "
            "embeddings; they do not belong together"
        )


def _required(name: str | None) -> str:
    if not name:
        raise InputError("model_name_or_path: give a hub id or a local folder")
    _check_path(name, "model_name_or_path")
    return name


def _check_path(name: str, option: str) -> None:
    """Refuse what can only be a local path but is not a folder, before the hub is asked for it."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            raise InputError(f"{option}: {name} is a folder without config.json; give a Hugging Face model folder")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or path.is_file():
        raise InputError(f"{option}: no such model folder: {name}")


def _revision(args: ModelArguments, name: str) -> str:
    return "main" if Path(name).exists() else args.model_revision


def _unloadable(option: str, name: str, what: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    where = "" if Path(name).exists() else " (no such folder, and not to be had from the hub)"
    return InputError(f"{option}: cannot load a {what} from {name}{where}: {reason}")
