"""Arguments of a run: where it writes, how long it goes, what it saves."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from typing import Literal

from yunque.errors import InputError

_TRACKERS = {
    name: name.replace("_", "-")
    for name in ("tensorboard", "wandb", "mlflow", "comet_ml", "clearml", "dvclive", "swanlab", "trackio")
}
"""Modules that both Accelerate and transformers report to, and their packages."""


@dataclass
class RunArguments:
    """Output folder, length, checkpoints and trackers of a training run."""

    output_dir: str = field(default="outputs/run", metadata={"help": "Folder for model, manifest, log and plots."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a former run in output_dir."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})
    seed: int = field(default=0, metadata={"help": "Seed of data order, sampling and initialisation."})
    max_steps: int = field(default=-1, metadata={"help": "Training steps; -1 follows num_train_epochs."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the prompts if max_steps is -1."})
    save_steps: int = field(default=20, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints kept, beside the best."})
    async_save: bool = field(default=True, metadata={"help": "Write checkpoints while training goes on."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Held-out prompts per forward pass."})
    mixed_precision: Literal["no", "bf16"] | None = field(
        default=None, metadata={"help": "Autocast precision; the launch profile's if unset."}
    )
    report_to: list[str] = field(
        default_factory=list, metadata={"help": "Trackers beside the JSONL log: tensorboard, wandb, ... or none."}
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):  # torchrun has started all ranks again
            self.resume = True
        if self.max_steps < -1 or self.max_steps == 0:
            raise InputError(f"max_steps: {self.max_steps} is not a number of steps; give 1 or more, or -1")
        if self.num_train_epochs <= 0:
            raise InputError(f"num_train_epochs: {self.num_train_epochs} is not positive")
        for name in ("save_steps", "save_total_limit", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is too small; give 1 or more")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed: {self.seed} is not in [0, 2^32)")
        self.report_to = [] if self.report_to == ["none"] else self.report_to
        for name in self.report_to:
            _check_tracker(name)


def _check_tracker(name: str) -> None:
    if name not in _TRACKERS:
        raise InputError(f"report_to: there is no tracker '{name}'; choose of {', '.join(_TRACKERS)}, or none")
    modules = (name, "tensorboardX") if name == "tensorboard" else (name,)
    if not any(importlib.util.find_spec(module) for module in modules):
        raise InputError(f"report_to: {name} is not installed; pip install {_TRACKERS[name]}, or leave the option out")
