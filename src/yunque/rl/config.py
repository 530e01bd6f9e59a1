"""Configuration of the reinforcement-learning trainer and of its reward."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from yunque.errors import InputError


@dataclass
class PPOConfig:
    """Hyperparameters of PPO and its kin, named and defaulted as in TRL 0.11; batch sizes are totals over all ranks."""

    advantage_estimator: Literal["gae", "grpo", "rloo", "reinforce"] = field(
        default="gae",
        metadata={
            "help": "gae: PPO with a value head; grpo: reward normalised within its group; rloo: reward minus the mean "
            "of the group's others; reinforce: whitened reward to go."
        },
    )
    num_generations: int = field(default=1, metadata={"help": "Responses sampled per prompt."})
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
    whiten_rewards: bool = field(default=False, metadata={"help": "gae, reinforce: scale token rewards to variance 1."})
    scale_advantages: Literal["group", "batch", "none"] = field(
        default="group", metadata={"help": "grpo: divide by the group's standard deviation, the batch's, or by none."}
    )
    max_grad_norm: float | None = field(default=None, metadata={"help": "Clip of the gradient's norm, every step."})
    kl_estimator: Literal["k1", "k2", "k3", "abs", "full"] = field(
        default="k1", metadata={"help": "Per-token estimate of the KL divergence to the reference."}
    )
    kl_placement: Literal["reward", "loss"] = field(
        default="reward", metadata={"help": "Charge the KL to each token's reward (PPO) or add it to the loss (GRPO)."}
    )
    init_kl_coef: float = field(default=0.2, metadata={"help": "First coefficient of the KL penalty."})
    adap_kl_ctrl: bool = field(default=True, metadata={"help": "Adapt the coefficient to reach kl_target."})
    kl_target: float = field(default=6.0, metadata={"help": "KL per response, in nats, the controller aims at."})
    kl_horizon: float = field(default=10_000, metadata={"help": "Responses over which the controller adapts."})
    ratio_threshold: float = field(default=10.0, metadata={"help": "Skip an optimizer step above this mean ratio."})
    early_stop_kl: float | None = field(
        default=None, metadata={"help": "End a batch's epochs once the policy moved this far (approximate KL a token)."}
    )
    loss_normalization: Literal["tokens", "sequences", "groups", "minibatches"] = field(
        default="tokens",
        metadata={
            "help": "An optimizer step's loss is the mean over all its tokens, over its responses' means (GRPO), over "
            "its groups' means, or over its minibatches' means (TRL 0.11)."
        },
    )
    group_weights: list[str] | None = field(
        default=None, metadata={"help": "Weights of groups in the loss, as group=weight; 1 for those not named."}
    )
    group_by_length: bool = field(
        default=True, metadata={"help": "Form minibatches of rows of similar length: less padding."}
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
        self._check_batches()
        self._check_groups()
        for name in ("learning_rate", "kl_target", "kl_horizon", "ratio_threshold", "cliprange", "cliprange_value"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}: {getattr(self, name)} is not a positive number")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: {getattr(self, name)} is not in [0, 1]")
        for name in ("init_kl_coef", "vf_coef", "warmup_steps"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}: {getattr(self, name)} is not 0 or a positive number")
        if self.kl_placement == "loss" and self.kl_estimator in ("k1", "abs"):
            raise InputError(
                f"kl_estimator: the gradient of {self.kl_estimator} does not reduce the KL, as its mean is 0; "
                "with kl_placement loss choose k2, k3 or full"
            )
        if self.max_new_tokens_low is not None and self.max_new_tokens_low < 1:
            raise InputError(f"max_new_tokens_low: {self.max_new_tokens_low} is too small; give 1 or more")

    def check_lengths(self, max_new_tokens: int) -> None:
        """Check the length sampler's lower end against its upper end.

        Raises:
            InputError: ``max_new_tokens_low`` is above ``max_new_tokens``.
        """
        if self.max_new_tokens_low is not None and self.max_new_tokens_low > max_new_tokens:
            raise InputError(
                f"max_new_tokens_low: {self.max_new_tokens_low} is more than max_new_tokens ({max_new_tokens})"
            )

    def weight_of_group(self) -> dict[str, float]:
        """Read ``group_weights``.

        Raises:
            InputError: an entry is not group=weight with a weight above 0.
        """
        weights = {}
        for entry in self.group_weights or []:
            group, _, weight = entry.rpartition("=")
            try:
                weights[group] = float(weight)
            except ValueError:
                weights[group] = 0.0
            if not group or not 0 < weights[group] < float("inf"):
                raise InputError(f"group_weights: {entry!r} is not group=weight with a positive weight")
        return weights

    def _check_batches(self) -> None:
        for name in ("batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "num_generations"):
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
        if self.batch_size % self.num_generations:
            raise InputError(
                f"num_generations: {self.num_generations} does not divide batch_size ({self.batch_size}); "
                f"choose one of {', '.join(str(n) for n in _divisors(self.batch_size))}"
            )

    def _check_groups(self) -> None:
        if self.weight_of_group() and self.loss_normalization != "groups":
            raise InputError("group_weights: only the loss of loss_normalization groups tells groups apart; set that")
        if self.advantage_estimator in ("grpo", "rloo") and self.batch_size < 2:
            raise InputError(f"batch_size: {self.advantage_estimator} compares responses; give 2 or more")


@dataclass
class GRPOConfig(PPOConfig):
    """The same for estimators that compare responses with each other and need no value head."""

    advantage_estimator: Literal["grpo", "rloo", "reinforce"] = field(
        default="grpo",
        metadata={
            "help": "grpo: reward normalised within its group; rloo: reward minus the mean of the group's others; "
            "reinforce: whitened reward to go."
        },
    )
    num_generations: int = field(default=4, metadata={"help": "Responses sampled per prompt."})


@dataclass
class RewardArguments:
    """What the reward is made of: a classifier or reward model, further ones, Python functions, a charge on length."""

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Classifier or reward model: hub id, local folder, or 'embedded'."}
    )
    reward_label: str = field(
        default="nothate", metadata={"help": "Label whose score is the reward; models of one output need none."}
    )
    toxicity_label: str = field(default="hate", metadata={"help": "Label whose probability is the toxicity."})
    reward_output: Literal["logit", "probability"] = field(
        default="logit", metadata={"help": "Score of the label; models of one output always give their logit."}
    )
    reward_text: Literal["query_response", "response"] = field(
        default="query_response", metadata={"help": "What the models read."}
    )
    reward_batch_size: int = field(default=16, metadata={"help": "Texts per forward pass of a model."})
    reward_device: str | None = field(default=None, metadata={"help": "Device of the models; the policy's if unset."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Further rewards: Python functions `module:function` of queries, responses and "
            "columns of the data set, by name (TRL's prompts and completions too), and models, "
            "`folder_or_hub_id#label` where they are classifiers."
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights: the reward model's, then one per reward function; 1 each if unset."}
    )
    length_penalty: float = field(
        default=0.0, metadata={"help": "Subtracted from the score for each response token away from length_target."}
    )
    length_target: int = field(default=0, metadata={"help": "Response tokens that length_penalty leaves uncharged."})
    watch_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Second classifier or reward model, unseen by training: logged beside the reward."},
    )
    watch_label: str | None = field(default=None, metadata={"help": "Its label; reward_label if unset."})
    use_score_scaling: bool = field(
        default=False, metadata={"help": "Divide scores by the standard deviation of all scores seen so far."}
    )
    use_score_norm: bool = field(
        default=False, metadata={"help": "Subtract their mean first; only with use_score_scaling."}
    )
    score_clip: float | None = field(
        default=None, metadata={"help": "Clip scores to [-this, this], after the scaling."}
    )

    def __post_init__(self) -> None:
        """Check ranges, the number of weights, and that what only works with another option has it."""
        if self.reward_batch_size < 1:
            raise InputError(f"reward_batch_size: {self.reward_batch_size} is too small; give 1 or more")
        self._check_weights()
        if not 0 <= self.length_penalty < math.inf:
            raise InputError(f"length_penalty: {self.length_penalty} is not a number of 0 or more")
        if self.length_target < 0:
            raise InputError(f"length_target: {self.length_target} is negative; give a number of tokens")
        if self.length_target and not self.length_penalty:
            raise InputError("length_target: has no effect without length_penalty; give one")
        if self.watch_label is not None and self.watch_model_name_or_path is None:
            raise InputError("watch_label: has no effect without watch_model_name_or_path; give one")
        if self.use_score_norm and not self.use_score_scaling:
            raise InputError("use_score_norm: has no effect without use_score_scaling; turn that on too")
        if self.score_clip is not None and not 0 < self.score_clip < math.inf:
            raise InputError(f"score_clip: {self.score_clip} is not positive and finite")

    @property
    def weights(self) -> list[float]:
        """Weight of each reward: the reward model's if there is one, then one per reward function."""
        rewards = (self.reward_model_name_or_path is not None) + len(self.reward_funcs or [])
        return [1.0] * rewards if self.reward_weights is None else self.reward_weights

    def _check_weights(self) -> None:
        weights, functions = self.reward_weights, len(self.reward_funcs or [])
        if weights is None:
            return
        rewards = (self.reward_model_name_or_path is not None) + functions
        if len(weights) != rewards:
            raise InputError(
                f"reward_weights: {len(weights)} for {rewards} rewards; give the reward model's first if there is one, "
                f"then one for each of the {functions} reward_funcs"
            )
        if not all(math.isfinite(weight) for weight in weights) or not any(weights):
            raise InputError(f"reward_weights: {weights} are not finite numbers, or all are 0")


@dataclass
class GuardArguments:
    """When a step counts as gone wrong; a guard that is unset never fires."""

    guard_kl: float | None = field(
        default=100.0, metadata={"help": "KL blow-up: fires above this many nats per response."}
    )
    guard_reward_std: float | None = field(
        default=1e-6, metadata={"help": "Reward collapse: fires if a batch's scores differ less than this."}
    )
    guard_empty: float | None = field(
        default=0.5, metadata={"help": "Empty responses: fires from this share of responses without visible text."}
    )
    guard_endless: float | None = field(
        default=None, metadata={"help": "Endless responses: fires from this share cut off by the length limit."}
    )
    guard_patience: int = field(
        default=5, metadata={"help": "Steps in a row on which one guard fires before the run stops."}
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("guard_kl", "guard_reward_std"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name}: {value} is not positive")
        for name in ("guard_empty", "guard_endless"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise InputError(f"{name}: {value} is not a share in (0, 1]")
        if self.guard_patience < 1:
            raise InputError(f"guard_patience: {self.guard_patience} is too small; give 1 or more")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
