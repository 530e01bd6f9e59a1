"""TRL 0.11's trainers of rewards, instructions and preferences: its arguments and defaults over the installed TRL."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import trl
from peft import PeftModel

from yunque.errors import InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL keeps ORPO among what may change
    from trl.experimental import orpo

_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "use_liger": "use_liger_kernel",
    "warmup_ratio": "warmup_steps",  # below 1 it is a part of all steps
}
_WITHOUT_EFFECT = frozenset(
    [
        *("chars_per_token", "dataset_batch_size", "num_of_sequences"),  # of packing by characters
        *("generate_during_eval", "is_encoder_decoder", "label_pad_token_id", "padding_value", "ref_model_init_kwargs"),
        *("logging_dir", "overwrite_output_dir", "save_safetensors"),
    ]
)
_TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "logging_steps": 500,
    "gradient_checkpointing": False,
    "bf16": False,
    "report_to": "none",
}
_PROMPT_LENGTHS: dict[str, Any] = {"max_length": 512, "max_prompt_length": 128, "truncation_mode": "keep_end"}


def _today(config: type, options: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Options of TRL 0.11, completed by its defaults, under the names of ``config``.

    Raises:
        InputError: the installed TRL has no such option.
    """
    if not options.get("warmup_steps"):
        options.pop("warmup_steps", None)
    elif "warmup_ratio" in options:
        options.pop("warmup_ratio")  # steps came first
    options = {_RENAMED.get(name, name): value for name, value in options.items()}
    options = {**_TRAINING_DEFAULTS, "use_cpu": not torch.accelerator.is_available(), **defaults} | options
    if "dtype" not in (loading := dict(options.get("model_init_kwargs") or {})) and "torch_dtype" in loading:
        loading["dtype"] = loading.pop("torch_dtype")
        options["model_init_kwargs"] = loading
    known = inspect.signature(config).parameters
    unknown = {name: value for name, value in options.items() if name not in known}
    if refused := [name for name, value in unknown.items() if value and name not in _WITHOUT_EFFECT]:
        raise InputError(f"{refused[0]}: the installed TRL {trl.__version__} has no such option; leave it out")
    if idle := [name for name, value in unknown.items() if value]:
        warnings.warn(f"without effect: {', '.join(idle)}", UserWarning, stacklevel=3)
    return {name: value for name, value in options.items() if name in known}


class RewardConfig(trl.RewardConfig):
    """Options of ``RewardTrainer``."""

    def __init__(self, output_dir: str = "trainer_output", **options: Any) -> None:
        super().__init__(output_dir, **_today(trl.RewardConfig, options, {"disable_dropout": False}))


class SFTConfig(trl.SFTConfig):
    """Options of ``SFTTrainer``; ``dataset_text_field`` says that this column alone is trained on."""

    def __init__(self, output_dir: str = "trainer_output", **options: Any) -> None:
        super().__init__(output_dir, **_today(trl.SFTConfig, options, {"packing_strategy": "wrapped"}))
        self.text_column = options.get("dataset_text_field")
        self.max_seq_length = self.max_length


class DPOConfig(trl.DPOConfig):
    """Options of ``DPOTrainer``; prompts are cut to ``max_prompt_length`` where a pair exceeds ``max_length``."""

    def __init__(self, output_dir: str = "trainer_output", **options: Any) -> None:
        lengths = _lengths(options)
        super().__init__(output_dir, **_today(trl.DPOConfig, options, {"max_length": lengths["max_length"]}))
        self.max_prompt_length, self.prompt_truncation_mode = lengths["max_prompt_length"], lengths["truncation_mode"]


class ORPOConfig(orpo.ORPOConfig):
    """Options of ``ORPOTrainer``; prompts are cut to ``max_prompt_length`` where a pair exceeds ``max_length``."""

    def __init__(self, output_dir: str = "trainer_output", **options: Any) -> None:
        lengths = _lengths(options)
        super().__init__(output_dir, **_today(orpo.ORPOConfig, options, {"max_length": lengths["max_length"]}))
        self.max_prompt_length, self.prompt_truncation_mode = lengths["max_prompt_length"], lengths["truncation_mode"]


def _lengths(options: dict[str, Any]) -> dict[str, Any]:
    """Take the lengths out of ``options``, with TRL 0.11's defaults.

    Raises:
        InputError: a pair has no room for an answer.
    """
    lengths: dict[str, Any] = {
        name: default if (value := options.pop(name, None)) is None else value
        for name, default in _PROMPT_LENGTHS.items()
    }
    if lengths["max_prompt_length"] >= lengths["max_length"]:
        raise InputError(
            f"max_prompt_length: {lengths['max_prompt_length']} leaves no token of max_length "
            f"({lengths['max_length']}) to the answer"
        )
    return lengths


class RewardTrainer(trl.RewardTrainer):
    """Reward model from pairs tokenized as ``input_ids_chosen``, ``input_ids_rejected`` and their masks."""

    def __init__(
        self, model: Any = None, args: Any = None, *, tokenizer: Any = None, max_length: int | None = None, **more: Any
    ) -> None:
        args = RewardConfig() if args is None else args
        if max_length is not None:
            args.max_length = max_length
        super().__init__(model, args, **_with_tokenizer(more, tokenizer))

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Take tokenized pairs whole, as TRL 0.11 did; texts are for the installed TRL."""
        columns = next(iter(dataset)).keys()
        if not {"input_ids_chosen", "input_ids_rejected"} <= columns:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        old = [name for name in columns if name.startswith(("input_ids_", "attention_mask_"))]
        return dataset.map(_unpadded_pair, remove_columns=old)


def _unpadded_pair(row: dict[str, Any]) -> dict[str, list[int]]:
    pair = {}
    for side in ("chosen", "rejected"):
        ids = row[f"input_ids_{side}"]
        mask = row.get(f"attention_mask_{side}") or [1] * len(ids)
        pair[f"{side}_ids"] = [token for token, real in zip(ids, mask, strict=True) if real]
    return pair


class SFTTrainer(trl.SFTTrainer):
    """Fine-tuning on texts; options of the data may stand here or in ``SFTConfig``, as in TRL 0.11."""

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        tokenizer: Any = None,
        formatting_func: Callable[[Any], Any] | None = None,
        **more: Any,
    ) -> None:
        own = {name: more.pop(name) for name in list(more) if name in _SFT_OPTIONS}
        if args is None:
            args = SFTConfig(**own)
        elif not isinstance(args, trl.SFTConfig):  # plain TrainingArguments
            known = inspect.signature(trl.SFTConfig).parameters
            values = {name: value for name, value in vars(args).items() if name in known}
            args = SFTConfig(**{**values, "hub_token": args.hub_token} | own)
        elif own:
            for name, value in _today(trl.SFTConfig, own, {}).items():
                if name in {_RENAMED.get(key, key) for key in own}:
                    setattr(args, name, value)
            if "dataset_text_field" in own:
                vars(args)["text_column"] = own["dataset_text_field"]
        self._text_of = formatting_func
        super().__init__(model, args, **_with_tokenizer(more, tokenizer))

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        columns = list(next(iter(dataset)))
        if "input_ids" not in columns:
            if self._text_of is not None:
                dataset = dataset.map(
                    _texts, batched=True, remove_columns=columns, fn_kwargs={"text_of": self._text_of, "rows": packing}
                )
                args = copy.copy(args)
                args.dataset_text_field = "text"
            elif getattr(args, "text_column", None) is not None:
                if args.text_column not in columns:
                    raise InputError(f"dataset_text_field: no column {args.text_column!r} among {', '.join(columns)}")
                dataset = dataset.select_columns([args.text_column])
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)


_SFT_OPTIONS = frozenset(
    [
        *("dataset_text_field", "packing", "eval_packing", "max_seq_length", "num_of_sequences", "chars_per_token"),
        *("dataset_num_proc", "dataset_batch_size", "dataset_kwargs", "neftune_noise_alpha", "model_init_kwargs"),
    ]
)


def _texts(batch: dict[str, list[Any]], text_of: Callable[[Any], Any], rows: bool) -> dict[str, list[str]]:
    """Texts of a batch; TRL 0.11 called the function with rows where it packed, with batches where it did not."""
    texts = None if rows else text_of(batch)
    if not isinstance(texts, list):
        texts = [text_of(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
    return {"text": texts}


class DPOTrainer(trl.DPOTrainer):
    """Direct preference optimisation; without ``ref_model`` the reference is the model as it is now."""

    def __init__(
        self, model: Any = None, ref_model: Any = None, args: Any = None, *, tokenizer: Any = None, **more: Any
    ) -> None:
        args = _with_options_of_the_trainer(DPOConfig, args, more)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise InputError("model: the installed TRL has no DPO of encoder-decoder models; use recipes/dpo.py")
        has_adapter = isinstance(model, PeftModel) or more.get("peft_config") is not None
        if ref_model is None and not has_adapter and not isinstance(model, str):
            ref_model = copy.deepcopy(model)  # TRL loads it by the model's name, which it need not have
        super().__init__(model, ref_model, args, **_with_tokenizer(more, tokenizer))

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if not isinstance(args, DPOConfig):
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        whole = copy.copy(args)
        whole.max_length = None  # no row is dropped for its prompt
        rows = super()._prepare_dataset(dataset, processing_class, whole, dataset_name)
        limits = (args.max_length, args.max_prompt_length, args.prompt_truncation_mode)
        return rows.map(_shortened, fn_kwargs={"limits": limits})


def _shortened(row: dict[str, Any], limits: tuple[int, int, str]) -> dict[str, list[int]]:
    """Cut the prompt of a pair that is too long, then its answers, as TRL 0.11 did."""
    max_length, max_prompt_length, mode = limits
    prompt, answers = row["prompt_ids"], {name: row[name] for name in ("chosen_ids", "rejected_ids")}
    longest = max(map(len, answers.values()))
    if len(prompt) + longest > max_length:
        prompt = prompt[:max_prompt_length] if mode == "keep_start" else prompt[-max_prompt_length:]
    if len(prompt) + longest > max_length:
        answers = {name: ids[: max_length - max_prompt_length] for name, ids in answers.items()}
    return {"prompt_ids": prompt, **answers}


class ORPOTrainer(orpo.ORPOTrainer):
    """Odds-ratio preference optimisation of decoder-only and encoder-decoder models."""

    def __init__(self, model: Any = None, args: Any = None, *, tokenizer: Any = None, **more: Any) -> None:
        args = _with_options_of_the_trainer(ORPOConfig, args, more)
        self._options = args  # before TRL's own, which come after the data
        super().__init__(model, args, **_with_tokenizer(more, tokenizer))

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """Cut the prompt's text where the pair is too long; the answers are TRL's to cut."""
        if isinstance(self._options, ORPOConfig) and not self.is_encoder_decoder:
            tokenizer: Any = self.processing_class
            prompt, chosen, rejected = (
                tokenizer(feature[name], add_special_tokens=False)["input_ids"]
                for name in ("prompt", "chosen", "rejected")
            )
            limit, max_length = self._options.max_prompt_length, self._options.max_length or 0
            if len(prompt) + max(len(chosen), len(rejected)) + 2 > max_length and len(prompt) > limit:
                kept = prompt[:limit] if self._options.prompt_truncation_mode == "keep_start" else prompt[-limit:]
                feature = feature | {"prompt": tokenizer.decode(kept)}
        tokens: dict[str, Any] = super().tokenize_row(feature, model)
        return tokens


def _with_options_of_the_trainer(config: Any, args: Any, more: dict[str, Any]) -> Any:
    """Take the options that TRL 0.11 let the trainer have, deprecated, over those of ``args``."""
    names = ("beta", "max_length", "max_prompt_length", "loss_type", "label_smoothing", "precompute_ref_log_probs")
    own = {name: more.pop(name) for name in names if more.get(name) is not None}
    if args is None:
        return config(**own)
    for name, value in own.items():
        setattr(args, name, [value] if name == "loss_type" and isinstance(value, str) else value)
    return args


def _with_tokenizer(more: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    return more if tokenizer is None else {**more, "processing_class": tokenizer}
