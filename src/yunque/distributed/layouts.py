"""Which launch profile a process runs under, and which methods it cannot carry, with the reason."""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

from yunque.errors import InputError
from yunque.models.arguments import ModelArguments, PromptTuningArguments
from yunque.models.placement import tensor_parallel

Task = Literal["finetune", "reward", "preferences", "rl", "distill", "data"]
Weights = Literal["full", "lora", "qlora", "prompt_tuning"]

PROFILES = ("cpu", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload", "tp", "fsdp2_tp")
_ZERO3 = ("zero3", "zero3_offload")
_TENSOR_PARALLEL = ("tp", "fsdp2_tp")


class Refusal(NamedTuple):
    """What does not go together: any of the profiles with any of the tasks on any of the weights."""

    profiles: tuple[str, ...]
    tasks: tuple[Task, ...]
    weights: tuple[Weights, ...]
    reason: str


_ALL_TASKS: tuple[Task, ...] = ("finetune", "reward", "preferences", "rl", "distill")
_ALL_WEIGHTS: tuple[Weights, ...] = ("full", "lora", "qlora", "prompt_tuning")

REFUSALS = (
    Refusal(_ZERO3, _ALL_TASKS, ("qlora",), "ZeRO-3 cannot split nf4 weights; take fsdp2"),
    Refusal(
        _ZERO3, ("reward",), ("lora",), "ZeRO-3 wants one type of all that trains, LoRA and head have two; take fsdp2"
    ),
    Refusal(_TENSOR_PARALLEL, _ALL_TASKS, ("qlora",), "nf4 layers have no tensor parallelism; take fsdp2"),
    Refusal(_TENSOR_PARALLEL, _ALL_TASKS, ("prompt_tuning",), "virtual tokens have no plan to split them; take fsdp2"),
    Refusal(_TENSOR_PARALLEL, ("reward",), _ALL_WEIGHTS, "classification heads have no plan to split them; take fsdp2"),
    Refusal(_TENSOR_PARALLEL, ("distill",), _ALL_WEIGHTS, "the teacher stands whole beside the student; take fsdp2"),
    Refusal(PROFILES[1:], ("data",), _ALL_WEIGHTS, "makes data in one process; start it with python"),
)
"""Beside these, tensor parallelism wants an architecture with a plan: T5 and GPT-2 have none (models.placement)."""


def refusal(profile: str, task: Task, weights: Weights) -> str | None:
    """Why ``task`` on ``weights`` does not run under ``profile``; None if it does."""
    for rule in REFUSALS:
        if profile in rule.profiles and task in rule.tasks and weights in rule.weights:
            return rule.reason
    return None


def current_profile() -> str:
    """Name of the profile in ``launch/`` whose engine ``accelerate launch`` has asked for."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none") != "none"
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}{'_offload' if offload else ''}"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "fsdp2"
    if layout := tensor_parallel():
        return "fsdp2_tp" if layout.groups > 1 else "tp"
    return "ddp" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "cpu"


def check_layout(task: Task, model: ModelArguments | None = None, prompt: PromptTuningArguments | None = None) -> None:
    """Check that the launch profile carries ``task`` on what the arguments train.

    Raises:
        InputError: it does not.
    """
    weights: Weights = "full"
    if prompt and prompt.prompt_tuning_tokens:
        weights = "prompt_tuning"
    elif model and (model.use_peft or model.load_in_4bit):
        weights = "qlora" if model.load_in_4bit else "lora"
    profile = current_profile()
    if reason := refusal(profile, task, weights):
        what = {"qlora": "load_in_4bit", "prompt_tuning": "prompt_tuning_tokens"}.get(weights, task)
        raise InputError(f"launch profile {profile}: {what}: {reason}")


def data_ranks(index: int, count: int) -> tuple[int, int]:
    """Which share of the rows rank ``index`` of ``count`` works on, of how many: tensor-parallel ranks share one."""
    layout = tensor_parallel()
    width = layout.ranks if layout else 1
    return index // width, count // width
