"""Arguments about models and generation, shared by every recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from yunque.errors import InputError


@dataclass
class ModelArguments:
    """Which model to load, in what precision, and whether to train it through a LoRA adapter (on nf4: QLoRA)."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id, local folder (model or PEFT adapter), or 'embedded'."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    pad_token: str | None = field(
        default=None, metadata={"help": "Token of the vocabulary to pad with, where the tokenizer names none."}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Precision of the loaded weights; 'auto' keeps the checkpoint's."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel, for example sdpa or flash_attention_2."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes from the hub."})
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Freeze linear layers as nf4, double quantized, all else as bfloat16; an adapter trains."},
    )
    quantize_head: bool = field(
        default=False, metadata={"help": "With load_in_4bit, the output head too, where it is not the embedding."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=32, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale: the update is alpha / r * B A x."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers to adapt, or all-linear; PEFT's choice for the model if unset."},
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "Save base and adapter merged into one plain model folder."}
    )

    def __post_init__(self) -> None:
        """Check values that no model could make valid."""
        if self.lora_r < 1:
            raise InputError(f"lora_r: {self.lora_r} is not a rank; give 1 or more")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout: {self.lora_dropout} is not a probability in [0, 1)")
        if self.quantize_head and not self.load_in_4bit:
            raise InputError("quantize_head: is for load_in_4bit only; add it or leave quantize_head out")


@dataclass
class PromptTuningArguments:
    """Virtual tokens before every prompt, whose embeddings are all that trains.

    Raises:
        InputError: fewer than 1 virtual token, a text without them.
    """

    prompt_tuning_tokens: int | None = field(
        default=None, metadata={"help": "Train so many virtual tokens and nothing else; 20 to 100 are usual."}
    )
    prompt_tuning_init_text: str | None = field(
        default=None, metadata={"help": "Begin from the embeddings of this text, instead of random tokens'."}
    )

    def __post_init__(self) -> None:
        """Check the number of tokens."""
        if self.prompt_tuning_tokens is not None and self.prompt_tuning_tokens < 1:
            raise InputError(f"prompt_tuning_tokens: {self.prompt_tuning_tokens} train nothing; give 20 to 100")
        if self.prompt_tuning_init_text is not None and self.prompt_tuning_tokens is None:
            raise InputError("prompt_tuning_init_text: is for prompt tuning; add prompt_tuning_tokens or leave it out")


@dataclass
class GenerationArguments:
    """How responses are decoded."""

    temperature: float = field(default=1.0, metadata={"help": "Softmax temperature; 0 is greedy decoding."})
    top_k: int = field(default=0, metadata={"help": "Sample among the k likeliest tokens; 0 keeps all."})
    top_p: float = field(default=1.0, metadata={"help": "Sample among the likeliest tokens of this total mass."})
    min_new_tokens: int = field(default=0, metadata={"help": "No end of sequence before this many tokens."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest response, in tokens."})

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.temperature < 0:
            raise InputError(f"temperature: {self.temperature} is negative; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p} is not in (0, 1]")
        if self.top_k < 0:
            raise InputError(f"top_k: {self.top_k} is negative; give 0 (off) or more")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise InputError(
                f"min_new_tokens: {self.min_new_tokens} is not between 0 and max_new_tokens ({self.max_new_tokens})"
            )
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {self.max_new_tokens} leaves no response; give 1 or more")
