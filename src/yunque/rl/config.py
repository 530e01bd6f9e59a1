"""Configuration of the reinforcement-learning trainer and of its reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from yunque.errors import InputError


@dataclass
class PPOConfig:
    """Hyperparameters of PPO, named and defaulted as in TRL 0.11; batch sizes are totals over all ranks."""

    learning_rate: float = field(default=1.41e-5, metadata={"help": "Adam's learning rate."})
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Adam's learning rate for the value head, which starts from nothing."}
    )
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule over the optimizer steps."})
    warmup_steps: int = field(default=0, metadata={"help": "PPO steps of linear warm-up."})
    batch_size: int = field(default=16, metadata={"help": "Responses per PPO step, over all ranks."})
    mini_batch_size: int = field(default=4, metadata={"help": "Responses per forward pass, over all ranks."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Minibatches per optimizer step."})
    ppo_epochs: int = field(default=1, metadata={"help": "Passes over each batch of responses."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of future rewards."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip of the probability ratio."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip of the value's movement."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale token rewards to unit variance."})
    max_grad_norm: float | None = field(default=None, metadata={"help": "Clip of the gradient's norm, every step."})
    kl_estimator: Literal["k1", "k2", "k3", "abs", "full"] = field(
        default="k1", metadata={"help": "Per-token estimate of the KL divergence that the reward is charged with."}
    )
    init_kl_coef: float = field(default=0.2, metadata={"help": "First coefficient of the KL penalty."})
    adap_kl_ctrl: bool = field(default=True, metadata={"help": "Adapt the coefficient to reach kl_target."})
    kl_target: float = field(default=6.0, metadata={"help": "KL per response, in nats, the controller aims at."})
    kl_horizon: float = field(default=10_000, metadata={"help": "Responses over which the controller adapts."})
    ratio_threshold: float = field(default=10.0, metadata={"help": "Skip an optimizer step above this mean ratio."})
    early_stop_kl: float | None = field(
        default=None, metadata={"help": "End a batch's epochs once the policy moved this far (approximate KL a token)."}
    )
    loss_normalization: Literal["tokens", "minibatches"] = field(
        default="tokens",
        metadata={
            "help": "Average over all tokens of an optimizer step (independent of ranks and accumulation) or over "
            "minibatch means (TRL 0.11)."
        },
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a response cut off by its length limit."}
    )
    max_new_tokens_low: int | None = field(
        default=None, metadata={"help": "Draw each response's limit from [this, max_new_tokens] (a length sampler)."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Update without dropout, so that ratios compare one network with itself."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations to save memory."})

    def __post_init__(self) -> None:
        """Check every value against its range and the batch sizes against each other."""
        for name in ("batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is too small; give 1 or more")
        if self.batch_size % self.mini_batch_size:
            raise InputError(
                f"mini_batch_size: {self.mini_batch_size} does not divide batch_size ({self.batch_size}); "
                f"choose one of {', '.join(str(n) for n in _divisors(self.batch_size))}"
            )
        per_update = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % per_update:
            raise InputError(
                f"gradient_accumulation_steps: {self.gradient_accumulation_steps} minibatches of "
                f"{self.mini_batch_size} do not divide batch_size ({self.batch_size})"
            )
        for name in ("learning_rate", "kl_target", "kl_horizon", "ratio_threshold", "cliprange", "cliprange_value"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}: {getattr(self, name)} is not positive")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: {getattr(self, name)} is not in [0, 1]")
        if self.init_kl_coef < 0:
            raise InputError(f"init_kl_coef: {self.init_kl_coef} is negative")
        if self.max_new_tokens_low is not None and self.max_new_tokens_low < 1:
            raise InputError(f"max_new_tokens_low: {self.max_new_tokens_low} is too small; give 1 or more")


@dataclass
class RewardArguments:
    """The classifier whose opinion is the reward."""

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Classifier: hub id, local folder, or 'embedded'."}
    )
    reward_label: str = field(default="nothate", metadata={"help": "Label whose score is the reward."})
    toxicity_label: str = field(default="hate", metadata={"help": "Label whose probability is the toxicity."})
    reward_output: Literal["logit", "probability"] = field(default="logit", metadata={"help": "Score of the label."})
    reward_text: Literal["query_response", "response"] = field(
        default="query_response", metadata={"help": "What the classifier reads."}
    )
    reward_batch_size: int = field(default=16, metadata={"help": "Texts per forward pass of the classifier."})
    reward_device: str | None = field(
        default=None, metadata={"help": "Device of the classifier; the policy's if unset."}
    )

    def __post_init__(self) -> None:
        """Check the batch size."""
        if self.reward_batch_size < 1:
            raise InputError(f"reward_batch_size: {self.reward_batch_size} is too small; give 1 or more")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
