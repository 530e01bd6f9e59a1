"""Load and save tokenizers, language models, adapters and classifiers, by hub id or local folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from peft import (
    LoraConfig,
    PeftModel,
    PeftType,
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
from transformers.utils import logging

from yunque.errors import InputError
from yunque.models.adapter import record_end_tokens
from yunque.models.arguments import ModelArguments, PromptTuningArguments
from yunque.models.copying import read_whole, tied_by_whole_weights
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
    merged,
    nf4_config,
    refuse_if_nothing_is_quantized,
    without_float32_modules,
)
from yunque.models.start_check import read_checked

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
    if adapter and adapter["peft_type"] == PeftType.PROMPT_TUNING and prompt is None:
        raise InputError(f"model_name_or_path: {name} holds virtual tokens (prompt tuning); give a LoRA adapter")
    model = load_base(adapter["base_model_name_or_path"] if adapter else name, args)
    _check_vocabulary(model, tokenizer, name)
    if new_tokens:
        return _add_virtual_tokens(model, tokenizer, name, prompt)
    trained = _load_adapter(model, name, adapter) if adapter else add_lora(model, args) if args.use_peft else model
    check_adapter(trained)
    return trained


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
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        with _without_load_report(), read_whole():
            model, report = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True)
    except _MODEL_ERRORS as error:
        raise _unloadable(option, name, "classifier", error) from error
    if report["missing_keys"]:
        raise InputError(f"{option}: {name} has no trained classification head (missing {min(report['missing_keys'])})")
    if any(is_quantized(parameter) for parameter in model.parameters()):
        keep_packing(model)
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
            with _answering_for_virtual_tokens(model, weights):
                model.save_pretrained(str(folder), selected_adapters=["default"], state_dict=weights)
        else:
            merged(model if weights is None else _with_weights(model, weights)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def merge_loaded_adapter(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The plain model that base and adapter make, or the plain model itself."""
    if not isinstance(model, PeftModel):
        return model
    plain: Any = merged(model)
    keep_head_untied(plain)
    return plain


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
    again = type(base).from_pretrained(
        base.name_or_path, config=base.config, dtype=base.dtype, ignore_mismatched_sizes=True
    )
    keep_head_untied(again)
    copy = get_peft_model(again, model.peft_config["default"])
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


def _load_adapter(model: PreTrainedModel, name: str, adapter: dict[str, Any]) -> PeftModel:
    if adapter["peft_type"] != PeftType.PROMPT_TUNING:
        return PeftModel.from_pretrained(model, name, is_trainable=True)
    loaded = PeftModel.from_pretrained(model, name)  # PEFT loads virtual tokens to be used only
    loaded.active_peft_config.inference_mode = False
    loaded.prompt_encoder.requires_grad_(True)
    return loaded


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
