"""Arguments of constitutional data: who answers, who judges, by which constitution, on which prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from yunque.errors import InputError
from yunque.packaged import find_file

PARTS = ("revisions", "preferences")


@dataclass
class FeedbackArguments:
    """Constitution, prompts, what to make of them, and the output folder.

    Raises:
        InputError: an unknown part, a count below 1, a margin below 0.
    """

    constitution: str | None = field(default=None, metadata={"help": "YAML file with the principles."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Red-team prompts: .jsonl, .json or .csv (.gz may follow), a folder, a hub id."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    train_split: str = field(default="train", metadata={"help": "Split that holds the prompts."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column with the prompt; column `id` names it."})
    max_prompts: int | None = field(default=None, metadata={"help": "Use the first so many prompts."})
    parts: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={"help": "What to make: revisions (answers, critiques, revisions, sft.jsonl), preferences, or both."},
    )
    num_revisions: int = field(
        default=1, metadata={"help": "Rounds of critique and revision, each by the next principle in priority."}
    )
    min_judge_margin: float = field(
        default=0.1, metadata={"help": "Abstain where the judge's log-odds, averaged over both orders, are no larger."}
    )
    judge_max_new_tokens: int = field(
        default=8, metadata={"help": "Tokens an endpoint may use to say A or B; more for a model that thinks first."}
    )
    output_dir: str = field(default="outputs/constitutional", metadata={"help": "Folder for steps/ and the data."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a former run, its steps included."})
    resume: bool = field(
        default=False, metadata={"help": "Go on; of a finished run, redo only what follows from edited lines."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of sampling and of the order of equal principles."})

    def __post_init__(self) -> None:
        """Check what can be checked without files; those of ``recipes/`` are found from any folder."""
        for name in ("constitution", "dataset_name"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, str(find_file(path)))
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise InputError(f"parts: {' '.join(unknown) or 'none'}; give {' or '.join(PARTS)}, or both")
        for name in ("max_prompts", "num_revisions", "judge_max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: {value} is too small; give 1 or more")
        if not self.min_judge_margin >= 0:
            raise InputError(f"min_judge_margin: {self.min_judge_margin} is negative; give 0 or more")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed: {self.seed} is not in [0, 2^32)")


@dataclass
class WriterArguments:
    """The model that answers and the model that judges: local or from the hub, or behind an OpenAI-compatible URL.

    Raises:
        InputError: a URL that is none, an endpoint without a model name, a number out of range.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Generator: folder or hub id; with generator_url its name at the endpoint."}
    )
    generator_url: str | None = field(
        default=None, metadata={"help": "Base URL of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1."}
    )
    generator_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable with the generator's key, if it wants one."}
    )
    judge_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Judge: folder, hub id or name at judge_url; by default the generator."}
    )
    judge_url: str | None = field(default=None, metadata={"help": "Base URL of the judge's endpoint."})
    judge_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable with the judge's key, if it wants one."}
    )
    endpoint_style: Literal["chat", "completions"] = field(
        default="chat", metadata={"help": "Route of the endpoints: /chat/completions, or /completions for base models."}
    )
    request_timeout_s: float = field(default=60.0, metadata={"help": "Seconds an endpoint may take for an answer."})
    max_retries: int = field(
        default=4, metadata={"help": "Tries after the first that failed, each after a longer wait."}
    )
    retry_wait_s: float = field(default=1.0, metadata={"help": "Wait before the first retry; doubled for each more."})
    batch_size: int = field(default=16, metadata={"help": "Texts per batch of a local model; requests at once."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of hub models."})
    pad_token: str | None = field(
        default=None, metadata={"help": "Token of the vocabulary to pad with, where the tokenizer names none."}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "Precision of local weights; 'auto' keeps the checkpoint's."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes from the hub."})

    def __post_init__(self) -> None:
        """Check what can be checked without the models."""
        for name in ("generator_url", "judge_url"):
            _check_url(name, getattr(self, name))
        if not self.model_name_or_path:
            raise InputError("model_name_or_path: give a hub id or a folder, or the model's name at generator_url")
        if self.judge_url and not self.judge_model_name_or_path:
            raise InputError("judge_model_name_or_path: give the model's name at judge_url")
        for name, least in (("request_timeout_s", 0), ("retry_wait_s", 0), ("max_retries", -1), ("batch_size", 0)):
            if not getattr(self, name) > least:
                raise InputError(f"{name}: {getattr(self, name)} is too small")


def _check_url(option: str, url: str | None) -> None:
    if url is None:
        return
    try:
        parts = urlsplit(url)
        host, has_user = parts.hostname, parts.username is not None or parts.password is not None
        _ = parts.port
    except ValueError as error:
        raise InputError(f"{option}: {error}") from error
    if has_user:  # it would end up in the manifest
        raise InputError(f"{option}: leave user and password out of the URL; the key comes from the environment")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise InputError(f"{option}: {url!r} is not a base URL; give one such as http://127.0.0.1:8000/v1")
