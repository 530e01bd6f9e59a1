"""``PPOConfig`` of TRL 0.11, and the switch that asks for TRL's arithmetic where it is wrong."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from yunque.compat.trl011.core import flatten_dict
from yunque.errors import InputError
from yunque.rl.config import PPOConfig as EngineConfig

STRICT_VARIABLE = "YUNQUE_TRL011_STRICT"
"""Environment variable that sets ``strict`` where a script does not: 1 or 0."""

KL_ESTIMATORS = {"kl": "k1", "abs": "abs", "mse": "k2", "full": "full"}
"""TRL's name of each KL penalty, and the engine's."""

_TRACKER_PROJECT = "trl"


def strict_by_environment() -> bool:
    """Read ``YUNQUE_TRL011_STRICT``; unset means no.

    Raises:
        InputError: it is neither 0 nor 1.
    """
    value = os.environ.get(STRICT_VARIABLE, "").strip().lower()
    if value not in ("", "0", "false", "1", "true"):
        raise InputError(f"{STRICT_VARIABLE}: {value!r} is neither 0 nor 1")
    return value in ("1", "true")


@dataclass
class PPOConfig:
    """TRL 0.11's options of PPO; batch sizes are those of one process, as they were there.

    ``strict`` is new: it brings back what TRL 0.11 got wrong (``docs/from_trl.md`` lists what).
    """

    exp_name: str = field(default_factory=lambda: os.path.basename(sys.argv[0]).removesuffix(".py"))
    seed: int = 0
    log_with: str | None = None
    task_name: str | None = None
    model_name: str = "gpt2"
    query_dataset: str = "stanfordnlp/imdb"
    reward_model: str = "sentiment-analysis:lvwerra/distilbert-imdb"
    remove_unused_columns: bool = True
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    accelerator_kwargs: dict[str, Any] = field(default_factory=dict)
    project_kwargs: dict[str, Any] = field(default_factory=dict)
    tracker_project_name: str = _TRACKER_PROJECT
    push_to_hub_if_best_kwargs: dict[str, Any] = field(default_factory=dict)
    steps: int = 20000
    learning_rate: float = 1.41e-5
    adap_kl_ctrl: bool = True
    init_kl_coef: float = 0.2
    kl_penalty: Literal["kl", "abs", "mse", "full"] = "kl"
    target: float = 6.0
    horizon: float = 10000.0
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    batch_size: int = 128
    forward_batch_size: int | None = None
    mini_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    world_size: int | None = None
    ppo_epochs: int = 4
    max_grad_norm: float | None = None
    optimize_cuda_cache: bool | None = None
    optimize_device_cache: bool = False
    early_stopping: bool = False
    target_kl: float = 1.0
    compare_steps: int = 1
    ratio_threshold: float = 10.0
    use_score_scaling: bool = False
    use_score_norm: bool = False
    score_clip: float | None = None
    whiten_rewards: bool = False
    gradient_checkpointing: bool = False
    is_encoder_decoder: bool | None = None
    is_peft_model: bool | None = None
    backward_batch_size: int | None = None
    global_backward_batch_size: int | None = None
    global_batch_size: int | None = None
    dataset_num_proc: int | None = None
    strict: bool = field(default_factory=strict_by_environment)

    def __post_init__(self) -> None:
        """Resolve old names, check the values, and say which of them have no effect."""
        if self.forward_batch_size is not None:
            self.mini_batch_size = self.forward_batch_size
        if self.optimize_cuda_cache is not None:
            self.optimize_device_cache = self.optimize_cuda_cache
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps
        if self.kl_penalty not in KL_ESTIMATORS:
            raise InputError(f"kl_penalty: {self.kl_penalty!r} is not one of {', '.join(KL_ESTIMATORS)}")
        if self.push_to_hub_if_best_kwargs and "repo_id" not in self.push_to_hub_if_best_kwargs:
            raise InputError("push_to_hub_if_best_kwargs: name the repository, as repo_id")
        if self.log_with == "wandb" and importlib.util.find_spec("wandb") is None:
            raise ImportError("log_with: wandb is not installed; pip install wandb")
        self.engine_config(1)  # checks the numbers
        self.total_ppo_epochs = math.ceil(self.steps / self.batch_size)
        self._warn_of_options_without_effect()

    def engine_config(self, ranks: int) -> EngineConfig:
        """The engine's configuration on ``ranks`` processes: its batch sizes are totals over all of them.

        Raises:
            InputError: a value is out of range, or batch sizes do not divide.
        """
        return EngineConfig(
            learning_rate=self.learning_rate,
            batch_size=self.batch_size * ranks,
            mini_batch_size=self.mini_batch_size * ranks,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            ppo_epochs=self.ppo_epochs,
            gamma=self.gamma,
            lam=self.lam,
            cliprange=self.cliprange,
            cliprange_value=self.cliprange_value,
            vf_coef=self.vf_coef,
            whiten_rewards=self.whiten_rewards,
            max_grad_norm=self.max_grad_norm,
            kl_estimator=KL_ESTIMATORS[self.kl_penalty],  # type: ignore[arg-type]
            init_kl_coef=self.init_kl_coef,
            adap_kl_ctrl=self.adap_kl_ctrl,
            kl_target=self.target,
            kl_horizon=self.horizon,
            ratio_threshold=self.ratio_threshold,
            early_stop_kl=1.5 * self.target_kl if self.early_stopping else None,
            disable_dropout=not self.strict,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def to_dict(self) -> dict[str, Any]:
        """All values by name, nested ones joined by "/"."""
        return flatten_dict({one.name: getattr(self, one.name) for one in fields(self)})

    def _warn_of_options_without_effect(self) -> None:
        idle = []
        if self.log_with is None:
            idle += [f"{name} (needs log_with)" for name in ("tracker_kwargs", "project_kwargs") if getattr(self, name)]
            if self.tracker_project_name != _TRACKER_PROJECT:
                idle.append("tracker_project_name (needs log_with)")
        if self.use_score_norm and not self.use_score_scaling:
            idle.append("use_score_norm (needs use_score_scaling)")
        if self.dataset_num_proc is not None:
            idle.append("dataset_num_proc (nothing maps the dataset here)")
        if idle:
            warnings.warn(f"without effect: {', '.join(idle)}", UserWarning, stacklevel=4)
