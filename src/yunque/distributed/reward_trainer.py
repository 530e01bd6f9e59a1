"""TRL's RewardTrainer with batches of similar length, and the rewards of pairs on any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer
from trl import RewardTrainer

from yunque.distributed.trainers import LengthGrouping


class PairTrainer(LengthGrouping, RewardTrainer):
    """RewardTrainer on rows of "chosen_ids", "rejected_ids" and maybe "margin", batches grouped by length if asked."""

    eval_metrics = ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward")

    def rewards(self, rows: Any) -> np.ndarray:
        """Rewards (rows, 2) of the chosen and the rejected answers, in float32."""
        return np.asarray(Trainer.predict(self, rows).predictions)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, None]:
        """Loss and rewards (pairs, 2) of a batch: one row a pair, so that what fills up the last batch is cut off."""
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        rewards = torch.stack(outputs.logits.squeeze(-1).float().chunk(2), dim=1)
        return loss.detach(), None if prediction_loss_only else rewards, None

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Write none into the checkpoints: the manifest says where a model comes from."""

    def num_tokens(self, rows: Any) -> list[int]:
        """Tokens of the longer text of each pair."""
        return [max(map(len, pair)) for pair in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]
