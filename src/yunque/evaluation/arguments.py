"""Arguments of ``yunque evaluate``; importable without torch, transformers or datasets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from yunque.data.arguments import TEXT_FIELD, DataArguments
from yunque.errors import InputError
from yunque.models.arguments import GenerationArguments, ModelArguments


@dataclass
class EvaluatedModelArguments:
    """The model folder and how to load it.

    Raises:
        InputError: no model.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The FOLDER: model, PEFT adapter, nf4, int8 or ONNX folder, hub id, or 'embedded'."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    pad_token: str | None = field(
        default=None, metadata={"help": "Token of the vocabulary to pad with, where the tokenizer names none."}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "Precision of the loaded weights; 'auto' keeps the checkpoint's."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel, for example sdpa or flash_attention_2."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes from the hub."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Load a full folder, or an adapter's base, as nf4: QLoRA as it was trained."}
    )

    def __post_init__(self) -> None:
        """Check that there is a model."""
        if not self.model_name_or_path:
            raise InputError("FOLDER: give the model folder (or hub id) to evaluate, first")

    def loading(self) -> ModelArguments:
        """The same as the recipes' argument group."""
        return ModelArguments(
            model_name_or_path=self.model_name_or_path,
            model_revision=self.model_revision,
            pad_token=self.pad_token,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            load_in_4bit=self.load_in_4bit,
        )


@dataclass
class HeldOutArguments:
    """Which rows are evaluated and how they become prompts.

    Raises:
        InputError: no data, a limit below 1, a template without ``{text}``.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, folder of splits, one .jsonl, .json, .csv file (or .gz), 'embedded'."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    test_split: str | None = field(
        default=None, metadata={"help": "Split; by default test, else validation, else the only one there is."}
    )
    max_test_samples: int | None = field(
        default=None, metadata={"help": "So many rows, drawn at random and the same for every run."}
    )
    id_column: str | None = field(
        default=None, metadata={"help": "Column that names a row; by default id or fname, else its position."}
    )
    text_column: str = field(default="dialogue", metadata={"help": "Column with the text that goes into the prompt."})
    target_column: str = field(
        default="summary",
        metadata={"help": "Column with the reference answer (numbered ones are all used); it may be missing."},
    )
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "The prompt, with {text} where the text goes; by default the manifest's, else the recipes'."},
    )
    chat_template: bool | None = field(
        default=None, metadata={"help": "Put it into the tokenizer's chat template; by default as the model's run did."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System turn before it, with chat_template."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Cut the text of a prompt with more tokens than this (default: the model's)."}
    )

    def __post_init__(self) -> None:
        """Check what can be checked without the data."""
        if not self.dataset_name:
            raise InputError("dataset_name: give a hub id, a folder, or a .jsonl, .json or .csv file")
        for name in ("max_test_samples", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: {value} is not a limit; give 1 or more, or leave it out")
        if self.prompt_template is not None and self.prompt_template.count(TEXT_FIELD) != 1:
            raise InputError(f"prompt_template: must hold {TEXT_FIELD} once, where the text goes")

    def data(self, prompt_template: str) -> DataArguments:
        """The same as the recipes' argument group, with the template that was decided on."""
        return DataArguments(
            dataset_name=self.dataset_name,
            dataset_config=self.dataset_config,
            text_column=self.text_column,
            target_column=self.target_column,
            prompt_template=prompt_template,
            max_prompt_length=self.max_prompt_length,
        )


@dataclass
class DecodingArguments:
    """How answers are decoded; several temperatures, top_p or top_k make one evaluation of each combination.

    Raises:
        InputError: a value out of range, the same value twice, votes among equal samples.
    """

    temperature: list[float] = field(
        default_factory=lambda: [0.0], metadata={"help": "Softmax temperatures; 0 is greedy decoding."}
    )
    top_p: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "Sample among the likeliest tokens of this total mass."}
    )
    top_k: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Sample among the k likeliest tokens; 0 keeps all."}
    )
    min_new_tokens: int = field(default=0, metadata={"help": "No end of sequence before this many tokens."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer, in tokens."})
    self_consistency: int = field(
        default=1, metadata={"help": "Samples per prompt; the answer that most of them agree on is scored."}
    )
    vote_pattern: str | None = field(
        default=None,
        metadata={"help": "Regular expression of the final answer (its group, if any) that samples vote by."},
    )
    dola_layers: str | None = field(
        default=None, metadata={"help": "DoLa: contrast with the `low` or the `high` half of the layers."}
    )

    def __post_init__(self) -> None:
        """Check every combination."""
        for name in ("temperature", "top_p", "top_k"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name}: {values}: give one value or several different ones")
            for value in values:
                GenerationArguments(
                    **{name: value}, min_new_tokens=self.min_new_tokens, max_new_tokens=self.max_new_tokens
                )
        if self.self_consistency < 1:
            raise InputError(f"self_consistency: {self.self_consistency} is no number of samples; give 2 or more")
        if self.self_consistency > 1 and 0 in self.temperature:
            raise InputError("self_consistency: samples at temperature 0 are all equal; give --temperature 0.7 or so")
        if self.vote_pattern is not None and self.self_consistency == 1:
            raise InputError("vote_pattern: is for self_consistency only; add it or leave vote_pattern out")
        if self.dola_layers not in (None, "low", "high"):
            raise InputError(f"dola_layers: '{self.dola_layers}' is unknown; give low or high")


@dataclass
class EvaluationArguments:
    """Where the evaluation goes, what is measured beside the references, and how much at once.

    Raises:
        InputError: a size below 1, a seed out of range.
    """

    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Folder for evaluation.json and answers."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a former evaluation there."})
    resume: bool = field(default=False, metadata={"help": "Go on where a stopped or killed run ended."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Prompts decoded together."})
    toxicity_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Classifier that judges the answers: folder, hub id, or 'embedded'."}
    )
    toxicity_label: str = field(default="hate", metadata={"help": "Its label whose probability is the toxicity."})
    format_schema: str | None = field(
        default=None, metadata={"help": "JSON schema file: the share of answers that are JSON valid under it."}
    )
    format_pattern: str | None = field(
        default=None, metadata={"help": "Regular expression that a whole answer should match."}
    )
    reference_loss: bool = field(
        default=True, metadata={"help": "Negative log-likelihood and perplexity of the references."}
    )
    latency_prompts: int = field(
        default=8, metadata={"help": "Prompts decoded one at a time, to time the first token; 0 measures none."}
    )
    kl_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Aligned model: measure the KL from it, per token of its own answers to the prompts."},
    )
    measure_speed: bool = field(
        default=False,
        metadata={"help": "Measure start, memory, first token and tokens/s in a fresh process of the model's own."},
    )
    speed_batch_sizes: list[int] = field(
        default_factory=lambda: [1, 8, 32], metadata={"help": "Batch sizes of measure_speed."}
    )
    speed_new_tokens: int = field(
        default=64, metadata={"help": "Tokens of every answer there (at most max_new_tokens)."}
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.per_device_eval_batch_size < 1:
            raise InputError(
                f"per_device_eval_batch_size: {self.per_device_eval_batch_size} is too small; give 1 or more"
            )
        if not self.speed_batch_sizes or min(*self.speed_batch_sizes, self.speed_new_tokens, 1) < 1:
            raise InputError("speed_batch_sizes, speed_new_tokens: give 1 or more")
        if self.latency_prompts < 0:
            raise InputError(f"latency_prompts: {self.latency_prompts} is negative; give 0 or more")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed: {self.seed} is not in [0, 2^32)")
