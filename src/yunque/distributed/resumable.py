"""transformers' Trainer with our checkpoints: atomic, checked, and readable by every engine on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from yunque.distributed.checkpoint import Checkpoints, Found, Score, Training
from yunque.distributed.gathering import buffers_left_whole
from yunque.distributed.identity import check_same_run, check_steps
from yunque.distributed.zero import forget_forward_passes
from yunque.models import start_check
from yunque.models.copying import eval_mode


class ResumableTrainer(Trainer):
    """A Trainer that saves to and goes on from ``checkpoints``; ``identity`` is what may not change in between."""

    checkpoints: Checkpoints
    found: Found | None = None
    identity: Mapping[str, Any] = {}

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
        losses = [line["eval_loss"] for line in self.state.log_history if line["step"] == step and "eval_loss" in line]
        self.checkpoints.save(
            step,
            self._training(),
            {"identity": dict(self.identity)},
            texts={TRAINER_STATE_NAME: json.dumps(asdict(self.state))},
            score=Score("eval_loss", losses[-1], higher_is_better=False) if losses else None,
        )

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
