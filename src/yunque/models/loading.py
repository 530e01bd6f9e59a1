"""Load and save tokenizers, language models, adapters and classifiers, by hub id or local folder."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from torch import Tensor, nn
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
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from yunque.errors import InputError
from yunque.models.adapter import record_end_tokens
from yunque.models.adapter_folders import (
    CONFIG,
    adapter_config,
    adapters_inside,
    check_vocabulary,
    classifier_config,
    frozen_embeddings,
    has_virtual_tokens,
    put_on,
    tokenizer_source,
)
from yunque.models.arguments import ModelArguments, PromptTuningArguments
from yunque.models.copying import read_whole, tied_by_whole_weights
from yunque.models.merging import merged
from yunque.models.placement import (
    check_adapter,
    freeze_unused_embedding,
    loading_options,
    share_embedding,
    weights_left_whole,
)
from yunque.models.quantized import (
    dtype_of_the_rest,
    is_quantized,
    keep_packing,
    nf4_config,
    refuse_if_nothing_is_quantized,
    without_float32_modules,
)
from yunque.models.start_check import read_checked

REFERENCE_ADAPTER = "reference"
_ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the head
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
    adapter = adapter_config(name)
    name = tokenizer_source(name, adapter)
    args = base_arguments(args, adapter)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=_revision(args, name), trust_remote_code=args.trust_remote_code
        )
    except _MODEL_ERRORS as error:
        raise no_tokenizer(name, error) from error
    if args.pad_token is not None:
        if args.pad_token not in tokenizer.get_vocab():
            raise InputError(f"pad_token: {args.pad_token!r} is not in the vocabulary of {name}")
        tokenizer.pad_token = args.pad_token
    if tokenizer.pad_token_id is None:
        known = [token for token in (tokenizer.unk_token, tokenizer.eos_token) if token]
        hint = f", for example --pad_token '{known[0]}'" if known else ""
        raise InputError(f"model_name_or_path: the tokenizer of {name} has no pad token; name one{hint}")
    return tokenizer


def no_tokenizer(name: str, error: Exception) -> InputError:
    """Why ``name`` gave no tokenizer, where ``error`` of a folder with SentencePiece's file alone would not say it."""
    folder = Path(name)
    pieces = [path.name for path in folder.glob("*.model")] if folder.is_dir() else []
    if pieces and not (folder / "tokenizer.json").is_file() and importlib.util.find_spec("sentencepiece") is None:
        return InputError(
            f"model_name_or_path: {name} has {pieces[0]} but no tokenizer.json; pip install sentencepiece to read it"
        )
    return _unloadable("model_name_or_path", name, "tokenizer", error)


@read_checked
def load_model(
    args: ModelArguments, tokenizer: PreTrainedTokenizerBase, prompt: PromptTuningArguments | None = None
) -> PreTrainedModel | PeftModel:
    """Load an encoder-decoder or decoder-only language model to train, adapters included, as the launch profile wants.

    A folder that holds a PEFT adapter yields base plus trainable adapter; otherwise ``use_peft`` adds a new LoRA
    adapter, ``prompt`` virtual tokens, and without them all weights train. Callers that cannot put virtual tokens
    before their prompts give no ``prompt``.

    Raises:
        InputError: no such model, an architecture without language head, LoRA targets that match no layer, two methods
            at once, nf4 weights with no adapter to train, or an adapter of virtual tokens where ``prompt`` is None.
    """
    name = _required(args.model_name_or_path)
    adapter = adapter_config(name)
    new_tokens = prompt.prompt_tuning_tokens if prompt else None
    if new_tokens and (args.use_peft or adapter):
        other = "use_peft" if args.use_peft else f"{name}, an adapter"
        raise InputError(f"prompt_tuning_tokens: trains by itself, not beside {other}; leave one of them out")
    if args.load_in_4bit and not (args.use_peft or adapter or new_tokens):
        raise InputError("load_in_4bit: nf4 weights do not train; add use_peft, for a LoRA adapter on them")
    if adapter and has_virtual_tokens(adapter) and prompt is None:
        kind = adapter["peft_type"].lower().replace("_", " ")
        raise InputError(f"model_name_or_path: {name} holds virtual tokens ({kind}); give a LoRA adapter")
    model: Any = load_base_of(name, adapter, args)
    if adapter:
        model = put_on(model, name, adapter, trainable=True)
    check_vocabulary(model, tokenizer, name)
    if new_tokens:
        return _add_virtual_tokens(model, tokenizer, name, prompt)
    trained = add_lora(model, args) if args.use_peft and not adapter else model
    check_adapter(trained)
    return trained


def load_base_of(name: str, adapter: Mapping[str, Any] | None, args: ModelArguments) -> PreTrainedModel:
    """Load the language model that ``name`` is, or that the adapter in it stands on.

    Raises:
        InputError: as ``load_base``; the adapter is a classifier's.
    """
    if adapter is None:
        return load_base(name, args)
    if adapter.get("task_type") == TaskType.SEQ_CLS:
        raise InputError(f"model_name_or_path: {name} is the adapter of a classifier; give a language model")
    try:
        return load_base(adapter["base_model_name_or_path"], base_arguments(args, adapter))
    except InputError as error:
        raise _without_base(error, name, "model_name_or_path") from error


def base_arguments(args: ModelArguments, adapter: Mapping[str, Any] | None) -> ModelArguments:
    """``args`` with the revision of its base that the adapter was trained on, unless the user asks for another."""
    pinned = adapter.get("revision") if adapter else None
    return replace(args, model_revision=pinned) if pinned and args.model_revision == "main" else args


def _without_base(error: InputError, name: str, option: str) -> InputError:
    """``error`` about the base of the adapter ``name``, saying so."""
    reason = str(error).removeprefix(f"{option}: ")
    return InputError(
        f"{option}: the adapter {name} stands on a base that cannot be loaded; where it lies elsewhere now, write its "
        f"folder as base_model_name_or_path into adapter_config.json: {reason}"
    )


def load_base(name: str, args: ModelArguments) -> PreTrainedModel:
    """Load weights with the language head their configuration calls for, as nf4 under ``load_in_4bit``.

    Raises:
        InputError: no such model, an architecture without language head, nothing in it to quantize, or no plan for the
            tensor parallelism of the launch profile.
    """
    config = load_config(name, args)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": args.dtype}
    if args.load_in_4bit:
        options = {"dtype": dtype_of_the_rest(), "quantization_config": nf4_config(args.quantize_head)}
    options |= loading_options(config)
    try:
        with without_float32_modules(args.load_in_4bit, auto, config), tied_by_whole_weights():
            model = auto.from_pretrained(
                name,
                revision=_revision(args, name),
                attn_implementation=args.attn_implementation,
                trust_remote_code=args.trust_remote_code,
                **options,
            )
    except _MODEL_ERRORS as error:
        raise _unloadable("model_name_or_path", name, "language model", error) from error
    keep_head_untied(model)
    share_embedding(model)
    freeze_unused_embedding(model)
    if args.load_in_4bit:
        keep_packing(model)
        refuse_if_nothing_is_quantized(model, quantize_head=args.quantize_head)
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
    if (adapter := adapter_config(name)) is not None:
        adapted, tokenizer = load_adapted_classifier(name, adapter, option)
        try:
            return merged(adapted).eval(), tokenizer
        except InputError as error:
            raise InputError(str(error).replace("merge_adapter", option, 1)) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        with _without_load_report(), read_whole():
            model, report = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True)
    except _MODEL_ERRORS as error:
        raise _unloadable(option, name, "classifier", error) from error
    check_vocabulary(model, tokenizer, name, option)
    if report["missing_keys"]:
        raise InputError(f"{option}: {name} has no trained classification head (missing {min(report['missing_keys'])})")
    if any(is_quantized(parameter) for parameter in model.parameters()):
        keep_packing(model)
    return model.eval(), tokenizer


def load_adapted_classifier(name: str, adapter: Mapping[str, Any], option: str) -> tuple[PeftModel, Any]:
    """Load the base of a classifier's adapter with a head of the adapter's size, the adapter on it, and its tokenizer.

    Raises:
        InputError: no such base, an adapter without head, labels without names.
    """
    base, revision = adapter["base_model_name_or_path"], adapter.get("revision") or "main"
    source = tokenizer_source(name, adapter)
    try:
        _check_path(base, option)
        config = classifier_config(name, adapter, option, revision="main" if Path(base).exists() else revision)
        tokenizer = AutoTokenizer.from_pretrained(source)
        if config.pad_token_id is None:  # decoder-only classifiers look for the last token before it
            config.pad_token_id = tokenizer.pad_token_id
        with _without_load_report(), read_whole():
            model = AutoModelForSequenceClassification.from_pretrained(
                base, config=config, revision=revision, ignore_mismatched_sizes=True
            )
    except InputError:
        raise
    except _MODEL_ERRORS as error:
        raise _without_base(_unloadable(option, base, "classifier", error), name, option) from error
    try:
        adapted = put_on(model, name, dict(adapter))
    except InputError as error:
        raise InputError(str(error).replace("model_name_or_path", option, 1)) from error
    check_vocabulary(adapted, tokenizer, name, option)
    return adapted.eval(), tokenizer


def load_labels(name: str, option: str) -> PretrainedConfig:
    """Configuration of a classifier, which names its labels; of an adapter as its own files have them.

    Raises:
        InputError: no such model, an adapter without head or labels without names.
    """
    adapter = adapter_config(name)
    if adapter is not None:
        return classifier_config(name, adapter, option)
    try:
        return load_config(name, ModelArguments(model_name_or_path=name))
    except InputError as error:
        raise InputError(str(error).replace("model_name_or_path", option, 1)) from error


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers from printing its table of missing weights, where the caller judges them itself."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def keep_head_untied(model: PreTrainedModel) -> None:
    """Record that the output head is its own matrix, where it is.

    ``T5Config`` of transformers 5 always claims a tied head; an untied checkpoint (FLAN-T5) loads right, but the next
    ``tie_weights`` or FSDP wrap would overwrite its head with the embedding.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and embedding is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: Any,
    folder: Path,
    *,
    merge: bool = False,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write weights (an adapter in PEFT's format unless ``merge``), configuration and tokenizer into ``folder``.

    ``weights`` are the gathered ones of a model that is split over ranks.
    """
    if model.can_generate():
        record_end_tokens(model, tokenizer)
    with weights_left_whole(model):
        if not isinstance(model, PeftModel):
            model.save_pretrained(folder, state_dict=weights)
        elif not merge:
            if weights is not None and (origin := getattr(model, "adapter_folder", None)):
                weights = frozen_embeddings(model, origin) | weights
            with _answering_for_virtual_tokens(model, weights):
                model.save_pretrained(str(folder), selected_adapters=["default"], state_dict=weights)
        else:
            merged(model if weights is None else _with_weights(model, weights)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def merge_loaded_adapter(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The plain model that base and adapter make, or the plain model itself."""
    if not isinstance(model, PeftModel):
        return model
    return merged(model)


@contextmanager
def _answering_for_virtual_tokens(model: PeftModel, weights: dict[str, Tensor] | None) -> Iterator[None]:
    """While entered, virtual tokens are the gathered ones: PEFT would ask their module, which is in pieces."""
    if weights is None or not model.active_peft_config.is_prompt_learning:
        yield
        return
    (tokens,) = weights.values()
    model.get_prompt_embedding_to_save = lambda adapter_name: tokens  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.get_prompt_embedding_to_save


def _with_weights(model: PeftModel, weights: dict[str, Tensor]) -> PeftModel:
    """A model on the CPU with the base of ``model``, read once more, under its adapter's ``weights``."""
    base: Any = model.get_base_model()
    config = deepcopy(base.config)
    config.vocab_size = AutoConfig.from_pretrained(base.name_or_path).vocab_size
    again = type(base).from_pretrained(base.name_or_path, config=config, dtype=base.dtype, ignore_mismatched_sizes=True)
    keep_head_untied(again)
    if (rows := base.config.vocab_size) != config.vocab_size:
        again.resize_token_embeddings(rows, mean_resizing=False)
    copy = get_peft_model(again, model.peft_config["default"])
    if (folder := getattr(model, "adapter_folder", None)) is not None:
        copy.load_state_dict(frozen_embeddings(model, folder), strict=False)
    set_peft_model_state_dict(copy, get_peft_model_state_dict(model, weights, adapter_name="default"))
    return copy


def trainable_parameters(model: nn.Module) -> str:
    """Say how many parameters train, as the notebooks print it; an nf4 weight counts all its elements."""
    trainable = total = 0
    parameters: Iterator[Any] = model.parameters()
    for parameter in parameters:
        whole = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty one
        count = parameter.quant_state.shape.numel() if is_quantized(parameter) else whole
        total += count
        trainable += count if parameter.requires_grad else 0
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"


def add_lora(model: PreTrainedModel, args: ModelArguments, task: TaskType | None = None) -> PeftModel:
    """Put a new LoRA adapter on ``model``; with ``task`` SEQ_CLS its head trains and is saved whole.

    Raises:
        InputError: targets that match no layer.
    """
    language = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    config = LoraConfig(
        task_type=task or language,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=_ALL_LINEAR if args.lora_target_modules == [_ALL_LINEAR] else args.lora_target_modules,
    )
    paths = [f".{path}" for path, _ in model.named_modules()]
    named = [] if config.target_modules == _ALL_LINEAR else args.lora_target_modules or []
    unknown = [name for name in named if not any(path.endswith(f".{name}") for path in paths)]
    try:
        if unknown:
            raise ValueError(f"{', '.join(unknown)} matches nothing")
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # of a tied head, which merging unties
            adapted = get_peft_model(model, config, revision=args.model_revision)
    except ValueError as error:
        kinds = (nn.Linear, Conv1D)
        names = {name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if isinstance(layer, kinds)}
        kind = model.config.model_type
        reason = f"{error} in {kind}" if unknown else f"{named} cannot be adapted in {kind}"
        if not args.lora_target_modules:
            reason = f"PEFT has no default for {kind}"
        raise InputError(
            f"lora_target_modules: {reason}; give some of {', '.join(sorted(names))}, or {_ALL_LINEAR}"
        ) from error
    _draw_by_name(adapted)
    return adapted


def _draw_by_name(model: PeftModel) -> None:
    """Draw LoRA's matrices A again, each from a stream of its own, so that every layout starts from the same ones.

    Under tensor parallelism PEFT builds the matrices B in parts, and draws other A after them.
    """
    for name, parameter in model.named_parameters():
        if ".lora_A." in name and not parameter.is_meta:
            digest = hashlib.sha256(f"{torch.initial_seed()} {name}".encode()).digest()
            stream = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
            drawn = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=math.sqrt(5), generator=stream)
            parameter.data.copy_(drawn)


def _add_virtual_tokens(model: PreTrainedModel, tokenizer: Any, name: str, args: Any) -> PeftModel:
    is_encoder_decoder = model.config.is_encoder_decoder
    text = args.prompt_tuning_init_text
    config = PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if is_encoder_decoder else TaskType.CAUSAL_LM,
        num_virtual_tokens=args.prompt_tuning_tokens,
        num_transformer_submodules=1,  # PEFT's default for encoder-decoder models prompts the decoder too
        prompt_tuning_init=PromptTuningInit.TEXT if text else PromptTuningInit.SAMPLE_VOCAB,
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=name if text else None,
    )
    return get_peft_model(model, config)


def _required(name: str | None) -> str:
    if not name:
        raise InputError("model_name_or_path: give a hub id or a local folder")
    _check_path(name, "model_name_or_path")
    return name


def _check_path(name: str, option: str) -> None:
    """Refuse what can only be a local path but is not a folder, before the hub is asked for it."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / CONFIG).is_file():
            inside = adapters_inside(path)
            what = f"one of the adapters in it ({', '.join(inside)})" if inside else "a Hugging Face model folder"
            raise InputError(f"{option}: {name} is a folder without config.json; give {what}")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or path.is_file():
        raise InputError(f"{option}: no such model folder: {name}")


def _revision(args: ModelArguments, name: str) -> str:
    return "main" if Path(name).exists() else args.model_revision


def _unloadable(option: str, name: str, what: str, error: Exception) -> InputError:
    reason = shorten(str(error), 300, placeholder=" ...") or type(error).__name__
    where = "" if Path(name).exists() else " (no such folder, and not to be had from the hub)"
    return InputError(f"{option}: cannot load a {what} from {name}{where}: {reason}")
