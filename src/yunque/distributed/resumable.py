"""transformers' Trainer with our checkpoints: atomic, checked, and readable by every engine on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import find_batch_size

from yunque.distributed.checkpoint import Checkpoints, Found, Score, Training
from yunque.distributed.gathering import buffers_left_whole
from yunque.distributed.identity import check_same_run, check_steps
from yunque.distributed.zero import forget_forward_passes
from yunque.errors import CheckFailed
from yunque.models import start_check
from yunque.models.copying import eval_mode


class ResumableTrainer(Trainer):
    """A Trainer that saves to and goes on from ``checkpoints``; ``identity`` is what may not change in between."""

    checkpoints: Checkpoints
    found: Found | None = None
    identity: Mapping[str, Any] = {}
    eval_metrics: tuple[str, ...] = ("loss",)
    """What ``evaluate`` measures, under these names with eval_ before them."""
    keep_best = False
    """Whether to save after each evaluation that is the best so far."""
    _sums: Tensor | None = None
    """What a subclass adds up for the next line of the log."""

    def go_on_from(self, found: Found) -> str:
        """Take ``found`` as the start of the next ``train``; returns its folder, which that method wants.

        Raises:
            InputError: its run had another identity; the message names the option.
        """
        check_same_run(self.identity, found.state.get("identity", {}), found.path)
        self.found = found
        return str(found.path)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save ours in place of the Trainer's, which writes where a kill leaves half of it."""
        self.store_flos()
        step = self.state.global_step
        metric = self.args.metric_for_best_model or "eval_loss"
        values = [line[metric] for line in self.state.log_history if line["step"] == step and metric in line]
        self.checkpoints.save(
            step,
            self._training(),
            {"identity": dict(self.identity)},
            texts={TRAINER_STATE_NAME: json.dumps(asdict(self.state))},
            score=Score(metric, values[-1], bool(self.args.greater_is_better)) if values else None,
        )

    @torch.no_grad()
    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """The training objective over all held-out rows as one batch: the Trainer's own mean depends on their batches.

        Smaller batches are what passes through the model; on several ranks the last may repeat a few rows.
        """
        model = self.model_wrapped
        held_out: Any = self.eval_dataset
        loader = self.get_test_dataloader(held_out)
        trained, self._sums = self._sums, None
        total = torch.zeros(2, device=self.args.device)
        with eval_mode(model):
            batches, count = self.get_batch_samples(iter(loader), len(loader), self.args.device)
            for batch in batches:
                inputs = self._prepare_inputs(batch)
                rows = 1 if count is not None else find_batch_size(inputs)
                with self.compute_loss_context_manager():
                    loss: Any = self.compute_loss(model, inputs, num_items_in_batch=count)
                total += torch.stack([loss.detach().float() * rows, torch.full_like(total[0], rows)])
            if count is not None:  # each loss is divided by it already
                total[1] = 1
            total = self.accelerator.reduce(total, reduction="sum")
            metrics = {"eval_loss": (total[0] / total[1]).item()}
            self.log(metrics)  # a subclass adds its own
        self._sums = trained
        forget_forward_passes(model)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def load_best(self) -> dict[str, float]:
        """Load the weights of the best checkpoint; return its step and its metric."""
        best = self.checkpoints.best(self.state.global_step)
        if best is None:
            raise CheckFailed("load_best_model_at_end: no evaluation gave a number, so that no checkpoint is the best")
        found, metric, value = best
        if found.step < self.state.global_step:
            self.checkpoints.load(found, self._training())
        return {"best_step": found.step, f"best_{metric}": value}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best: bool = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= is_best and self.keep_best
        return is_best

    def _load_from_checkpoint(self, *args: Any, **options: Any) -> None:
        """Wait until engine and optimizer are there: ``_prepare_for_training`` loads all at once."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Prepare as for a fresh run, then load: the Trainer's own way differs by engine and reads only its files.

        In between, the engine has the model as it starts, which is checked.
        """
        model: Any = self.model
        start = start_check.plain_start(model, self.accelerator)
        with buffers_left_whole(model, self.accelerator):
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if start is not None:
            with eval_mode(self.model_wrapped):
                start_check.check_start(start, model, self.accelerator, self._logits)
            forget_forward_passes(self.model_wrapped)
        if resume_from_checkpoint is not None:
            assert self.found is not None, "go_on_from comes before training"
            check_steps(self.found.step, max_steps, self.found.path)
            self.checkpoints.load(self.found, self._training())
        return prepared

    def _logits(self, inputs: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.model_wrapped(**inputs).logits
        return logits

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.found is not None:
            self.checkpoints.set_random_state(self.found)

    def _run_epoch(self, *args: Any, **options: Any) -> Any:
        """Nothing where the last step is done: a run may be stopped, and resumed, in what follows training."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **options)

    def _training(self) -> Training:
        return Training(self.model_wrapped, self.optimizer, [self.lr_scheduler])
