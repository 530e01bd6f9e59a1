"""Supervised training on transformers' Trainer: its arguments in Hugging Face's words, resume, signals, a JSONL log."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from yunque.artifacts import CHECKPOINTS, LOG, prepare_output_dir
from yunque.distributed.arguments import RunArguments
from yunque.distributed.identity import run_identity
from yunque.distributed.layouts import data_ranks
from yunque.distributed.start import precision
from yunque.errors import InputError, Stopped, disk_full, is_disk_full
from yunque.models.placement import tensor_parallel

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from yunque.distributed.preferences import PreferenceTrainer
    from yunque.distributed.trainers import LengthGrouping

    AnyTrainingArguments = TypeVar("AnyTrainingArguments", bound=TrainingArguments)


@dataclass
class SupervisedArguments(RunArguments):
    """How long, how fast and in what batches; the names are those of transformers' TrainingArguments.

    A dataclass of our own, since theirs takes seconds to import and `--help` should not.
    """

    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the train split if max_steps is -1."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows per forward pass of a device."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes per optimizer step."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = field(
        default="linear", metadata={"help": "Schedule of the learning rate."}
    )
    warmup_steps: float = field(default=0, metadata={"help": "Steps of linear warm-up; below 1 a share of all steps."})
    warmup_ratio: float | None = field(
        default=None, metadata={"help": "Share of all steps for warm-up; the same as a warmup_steps below 1."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's decay, biases and norms left out."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip of the gradient's norm."})
    label_smoothing_factor: float = field(default=0.0, metadata={"help": "Share of the target spread over all labels."})
    train_sampling_strategy: Literal["random", "group_by_length"] = field(
        default="random", metadata={"help": "Order of rows; group_by_length pads less."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations to save memory."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes of a rank that collate batches."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between lines of the log."})
    save_steps: int = field(default=200, metadata={"help": "Steps between checkpoints."})
    eval_strategy: Literal["no", "steps", "epoch"] | None = field(
        default=None,
        metadata={"help": "When eval_loss is measured while training; steps where eval_steps is given, else no."},
    )
    eval_steps: int | None = field(
        default=None, metadata={"help": "Steps between evaluations; logging_steps if eval_strategy alone is given."}
    )
    eval_size: float = field(
        default=0.1, metadata={"help": "Share of the train rows held out for these evaluations; never test rows."}
    )
    load_best_model_at_end: bool = field(
        default=False, metadata={"help": "Keep each best checkpoint, and end with the weights of the best one."}
    )
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "What best goes by: loss (default), or another eval_ value of the log."}
    )
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Whether more of it is better; by default unless its name ends with loss."}
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        self._check_evaluations()
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is too small; give 1 or more")
        if self.dataloader_num_workers < 0:
            raise InputError(f"dataloader_num_workers: {self.dataloader_num_workers} is negative; give 0 or more")
        if self.warmup_ratio is not None:
            if not 0 <= self.warmup_ratio < 1:
                raise InputError(f"warmup_ratio: {self.warmup_ratio} is not a share in [0, 1); see warmup_steps")
            if self.warmup_steps not in (0, self.warmup_ratio):
                raise InputError("warmup_ratio: warmup_steps is given too; leave one of them out")
            self.warmup_steps = self.warmup_ratio
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate: {self.learning_rate} is not positive")
        if not 0 <= self.label_smoothing_factor < 1:
            raise InputError(f"label_smoothing_factor: {self.label_smoothing_factor} is not a share in [0, 1)")

    def _check_evaluations(self) -> None:
        if self.eval_strategy is None:
            self.eval_strategy = "no" if self.eval_steps is None else "steps"
        if self.eval_steps is not None and self.eval_steps < 1:
            raise InputError(f"eval_steps: {self.eval_steps} is too small; give 1 or more")
        if self.eval_steps is not None and self.eval_strategy != "steps":
            raise InputError(f"eval_steps: eval_strategy is {self.eval_strategy}; leave one of them out")
        if not 0 < self.eval_size < 1:
            raise InputError(f"eval_size: {self.eval_size} is not a share in (0, 1)")
        for name in ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"):
            if getattr(self, name) not in (None, False) and self.eval_strategy == "no":
                raise InputError(f"{name}: nothing is evaluated while training; add eval_steps or eval_strategy epoch")


def trainer_arguments(
    args: SupervisedArguments, kind: type[AnyTrainingArguments], **extra: Any
) -> AnyTrainingArguments:
    """Translate to transformers' own ``kind`` of arguments; the Trainer writes below ``output_dir``/checkpoints only.

    Raises:
        InputError: a value that transformers refuses, such as bf16 on a device without it.
    """
    if "tensorboard" in args.report_to:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(args.output_dir) / "tensorboard"))
    if args.mixed_precision == "no":  # the launch profile's choice arrives in this variable
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    import torch

    bf16 = precision(args) == "bf16"
    if bf16 and not torch.accelerator.is_available():
        extra["use_cpu"] = True  # or transformers takes bf16 for a mistake
    if tensor_parallel():
        extra["save_strategy"] = "no"  # the Trainer has no checkpoints of weights that are split as they are read
    # Always said, since TRL's default is to do it; later 5.x versions warn of the old name.
    names = {option.name for option in fields(kind)}
    recompute = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    extra[recompute] = args.gradient_checkpointing
    try:
        return kind(
            output_dir=str(Path(args.output_dir) / CHECKPOINTS),
            max_steps=args.max_steps,
            num_train_epochs=args.num_train_epochs,
            per_device_train_batch_size=args.per_device_train_batch_size,
            per_device_eval_batch_size=args.per_device_eval_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type=args.lr_scheduler_type,
            warmup_steps=args.warmup_steps,
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm,
            logging_steps=args.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # it would hide a loss that is not a number
            save_steps=args.save_steps,
            save_total_limit=args.save_total_limit,
            seed=args.seed,
            bf16=bf16,
            report_to=args.report_to or ["none"],
            dataloader_pin_memory=False,
            dataloader_num_workers=args.dataloader_num_workers,
            **extra,
        )
    except ValueError as error:
        raise InputError(f"training arguments: {error}") from error


def claim_output_dir(args: RunArguments) -> None:
    """Make ``output_dir`` this run's, on one rank after all have checked it; call it before the Trainer writes there.

    Raises:
        InputError: as ``prepare_output_dir``.
    """
    from accelerate import PartialState

    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        prepare_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resume=args.resume)
    state.wait_for_everyone()


def fit(
    trainer: LengthGrouping | PreferenceTrainer,
    args: SupervisedArguments,
    config: Mapping[str, Any],
    before: Callable[[], Any] | None = None,
) -> tuple[dict[str, float], Any]:
    """Train, from the last checkpoint under ``resume``; return first and last loss, steps and time.

    ``config`` are all options of the run, by which a resumed one is known to be the same. ``before`` measures the
    start model, when the engine has it; what it returned, as JSON keeps it, comes second.

    Raises:
        CheckFailed: the loss is not a number.
        Stopped: a signal came; a checkpoint is saved.
        InputError: ``resume`` finds a checkpoint of another run, or damaged ones only; the disk is full.
    """
    from transformers.trainer_utils import SaveStrategy

    from yunque.distributed.checkpoint import Checkpoints, StopSignal
    from yunque.distributed.trainers import BeforeTraining, LogLines, StopOnSignal

    folder = Path(args.output_dir)
    trainer.group_by_length = args.train_sampling_strategy == "group_by_length"
    _plan_evaluations(trainer, args)
    trainer.identity = _identity(trainer, args, config)
    trainer.checkpoints = Checkpoints(
        folder / CHECKPOINTS, trainer.accelerator, keep=args.save_total_limit, asynchronous=args.async_save
    )
    _keep_outputs_exact(trainer)
    if tensor_parallel():
        trainer.args.save_strategy = SaveStrategy.STEPS  # with checkpoints of ours, which the Trainer did not know of
    found = trainer.checkpoints.newest() if args.resume else None
    start = BeforeTraining(lambda: _measured(trainer, before), folder / CHECKPOINTS / "before.json")
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    try:
        with StopSignal() as signal, trainer.checkpoints:
            stop = StopOnSignal(signal, trainer.accelerator)
            for callback in (start, LogLines(folder / LOG), stop):
                trainer.add_callback(callback)
            trainer.train(resume_from_checkpoint=trainer.go_on_from(found) if found else None)
    except Exception as error:
        if is_disk_full(error):
            raise disk_full(folder, error) from error
        raise
    if stop.stopped:
        step, steps = trainer.state.global_step, trainer.state.max_steps
        trainer.checkpoints.mark_stopped(step, steps)
        raise Stopped(f"at step {step} of {steps}; go on with --resume")
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    metrics = {
        "train_loss_first": losses[0],
        "train_loss": losses[-1],
        "train_steps": trainer.state.global_step,
        "train_epochs": trainer.state.epoch or math.nan,
        "train_wall_s": time.perf_counter() - wall_s,
        "train_cpu_s": time.process_time() - cpu_s,
    }
    if args.load_best_model_at_end:
        metrics |= trainer.load_best()
    return metrics, start.result


def _plan_evaluations(trainer: LengthGrouping | PreferenceTrainer, args: SupervisedArguments) -> None:
    """Hold rows out and say when to evaluate on them; the Trainer is told of no epochs, which it ends after saving.

    Raises:
        InputError: another metric than the trainer's, too few rows.
    """
    if args.eval_strategy == "no":
        return
    from transformers.trainer_utils import IntervalStrategy

    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in trainer.eval_metrics:
        raise InputError(f"metric_for_best_model: there is no '{metric}'; choose of {', '.join(trainer.eval_metrics)}")
    rows, held_out = split_off(trainer.train_dataset, args.eval_size, args.seed)
    trainer.train_dataset, trainer.eval_dataset = rows, held_out
    options = trainer.args
    options.eval_strategy = IntervalStrategy.STEPS
    options.eval_steps = args.eval_steps or args.logging_steps
    if args.eval_strategy == "epoch":
        _, ranks = data_ranks(trainer.accelerator.process_index, trainer.accelerator.num_processes)
        batches = math.ceil(len(rows) / (args.per_device_train_batch_size * ranks))
        options.eval_steps = math.ceil(batches / args.gradient_accumulation_steps)
    options.metric_for_best_model = f"eval_{metric}"
    better = args.greater_is_better
    options.greater_is_better = not metric.endswith("loss") if better is None else better
    trainer.keep_best = args.load_best_model_at_end


def split_off(rows: Any, share: float, seed: int) -> tuple[Any, Any]:
    """Hold ``share`` of ``rows`` out, drawn by ``seed``; rows of one prompt, or equal ones, stay together.

    Raises:
        InputError: nothing would be left to train on.
    """
    import numpy as np

    columns = [name for name in ("prompt_ids", "input_ids", "chosen_ids") if name in rows.column_names]
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, ids in enumerate(rows[columns[0]]):
        groups.setdefault(tuple(ids), []).append(number)
    members = list(groups.values())
    held: set[int] = set()
    for group in np.random.default_rng(seed).permutation(len(members))[:-1].tolist():
        if len(held) >= share * len(rows):
            break
        held.update(members[group])
    if not held:
        raise InputError(f"eval_size: {len(rows)} rows of one prompt cannot be split; leave the evaluations out")
    kept = [number for number in range(len(rows)) if number not in held]
    return rows.select(kept, keep_in_memory=True), rows.select(sorted(held), keep_in_memory=True)


def _measured(trainer: LengthGrouping | PreferenceTrainer, before: Callable[[], Any] | None) -> Any:
    """What ``before`` returns; then ZeRO-3 forgets its forward passes, by whose order it would gather weights."""
    from yunque.distributed.zero import forget_forward_passes

    if before is None:
        return None
    result = before()
    forget_forward_passes(trainer.model_wrapped)
    return result


def _keep_outputs_exact(trainer: LengthGrouping | PreferenceTrainer) -> None:
    """Let losses leave the model as they are: FSDP2 would round all outputs to the type it computes in."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def _identity(
    trainer: LengthGrouping | PreferenceTrainer, args: SupervisedArguments, config: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides the curve of a run; of how a batch is spread over ranks and passes, only its size."""
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps")
    rows: Any = trainer.train_dataset
    _, ranks = data_ranks(trainer.accelerator.process_index, trainer.accelerator.num_processes)
    return run_identity({name: value for name, value in config.items() if name not in sizes}) | {
        "train rows": len(rows),
        " x ".join([*sizes, "ranks"]): args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks,
    }


def remove_checkpoints(args: RunArguments) -> None:
    """Remove the checkpoints of a run whose model is saved."""
    shutil.rmtree(Path(args.output_dir) / CHECKPOINTS, ignore_errors=True)
