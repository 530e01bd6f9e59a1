"""transformers' Trainers with batches of similar length, a JSONL log that survives a resume, and a stop by signal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler
from transformers import Seq2SeqTrainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from yunque.distributed.checkpoint import StopSignal
from yunque.distributed.resumable import ResumableTrainer
from yunque.errors import CheckFailed, InputError

_POOL_BATCHES = 50


def label_loss(smoothing: float) -> Callable[..., Tensor]:
    """Cross entropy summed over the labels of a batch, divided by their number over all ranks and accumulated batches.

    To be given to a Trainer as ``compute_loss_func``: T5 and RoBERTa ignore the count it offers them, and with their
    own means the gradient grows with ranks and accumulation. ``smoothing`` is the share of the target spread over all
    classes; labels of -100 do not count.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs.logits.flatten(0, -2).float()
        total = cross_entropy(logits, labels.flatten(), reduction="sum", label_smoothing=smoothing)
        return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    return loss


class LengthGroupedSampler(Sampler[int]):
    """Rows in an order whose batches hold similar lengths and come in random order, the same for a seed and epoch.

    transformers' own leaves the batches of a pool sorted from long to short, so that lengths, and with them the mix of
    labels, drift through every pool; it also reorders the rows of an evaluation.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        whole = len(order) // self.batch_size * self.batch_size  # the odd rows make the last, smaller batch
        batches = []
        for start in range(0, whole, _POOL_BATCHES * self.batch_size):
            pool = order[start : min(start + _POOL_BATCHES * self.batch_size, whole)]
            pool.sort(key=lambda row: self.lengths[row])
            batches += [pool[first : first + self.batch_size] for first in range(0, len(pool), self.batch_size)]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[index]
        yield from order[whole:]

    def set_epoch(self, epoch: int) -> None:
        """Called by Accelerate's loader, also when a run is resumed."""
        self.epoch = epoch


class LengthGrouping(ResumableTrainer):
    """Trainer whose batches may be grouped by length."""

    group_by_length = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if not self.group_by_length:
            return super()._get_train_sampler(rows)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(self.num_tokens(rows), batch_size, self.args.seed)

    def num_tokens(self, rows: Any) -> list[int]:
        """Length of each row, by which they are grouped."""
        return [len(ids) for ids in rows["input_ids"]]


class ClassifierTrainer(LengthGrouping):
    """Trainer whose batches may be grouped by length; it evaluates accuracy too."""

    eval_metrics = ("loss", "accuracy")

    model: Any

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a batch; where nothing trains, hits are counted."""
        labels = inputs["labels"]  # the Trainer takes them out
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not self.model.training:
            hits = outputs.logits.argmax(dim=-1) == labels
            counts = torch.stack([hits.sum(), torch.full_like(hits.sum(), hits.numel())])
            self._sums = counts if self._sums is None else self._sums + counts
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the accuracy to the line of an evaluation."""
        if "eval_loss" in logs and self._sums is not None:
            hits, count = self.accelerator.reduce(self._sums, reduction="sum").tolist()
            logs["eval_accuracy"] = hits / count
        super().log(logs, start_time)


class AnswerTrainer(LengthGrouping, Seq2SeqTrainer):
    """Seq2SeqTrainer whose batches may be grouped by length."""


class LogLines(TrainerCallback):
    """Writes every log line of the run as JSON; a loss that is not a number ends it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin with the lines the checkpoint knows: later ones are about to be repeated."""
        if state.is_world_process_zero:
            self.path.write_text("".join(json.dumps(line) + "\n" for line in state.log_history))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the last step too, whatever ``logging_steps``."""
        if state.global_step == state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append the line the Trainer has just put into its history."""
        line = state.log_history[-1]
        if not math.isfinite(line.get("loss", 0.0)):
            raise CheckFailed(f"the loss is {line['loss']} at step {state.global_step}; lower learning_rate")
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


class BeforeTraining(TrainerCallback):
    """Measures the model as it starts, once the engine holds it: before, a sharded model is on no rank.

    ``measure`` runs on every rank and returns what JSON can hold; a resumed run reads it from ``path``.
    """

    def __init__(self, measure: Callable[[], Any], path: Path) -> None:
        self.measure, self.path = measure, path
        self.result: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, unless a checkpoint has been loaded."""
        if state.global_step:
            if not self.path.is_file():
                raise InputError(f"resume: {self.path} is missing; start again with --overwrite_output_dir")
            self.result = json.loads(self.path.read_text(encoding="utf-8"))
            return
        self.result = self.measure()
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.result), encoding="utf-8")


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and stops after the step in which any rank was signalled."""

    def __init__(self, signal: StopSignal, accelerator: Accelerator) -> None:
        self.signal, self.accelerator = signal, accelerator
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the Trainer to save and stop; at the last step it does so anyway."""
        self.stopped = self.signal.agreed(self.accelerator)
        if self.stopped:
            control.should_save = control.should_training_stop = True
