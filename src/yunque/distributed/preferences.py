"""transformers' Trainer on preference pairs, for encoder-decoder and decoder-only models alike."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainingArguments

from yunque.distributed.resumable import ResumableTrainer
from yunque.distributed.trainers import LengthGroupedSampler
from yunque.models.adapter import ModelAdapter
from yunque.models.copying import eval_mode
from yunque.models.policy import Policy, Reference, disable_dropout, score_tokens
from yunque.models.preference_losses import Objective, PairLosses, PairScores
from yunque.models.preference_pairs import REFERENCE, PairCollator, answer_tokens, scoring_batch

_SUMS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "loss/preference",
)


class PreferenceTrainer(ResumableTrainer):
    """Minimises an objective over pairs, and keeps the start model as its reference where the objective needs one.

    TRL's DPOTrainer has no encoder-decoder and its ORPOTrainer scores prompts too; both keep whole logits or a fused
    head of their own. Here both families are scored by the policy's code, in one forward pass for both answers, and
    sums are divided by counts over all ranks and accumulated batches.
    """

    eval_metrics = ("loss", *_SUMS, "rewards/margins")
    group_by_length = False
    loss_is_scaled_for_ga = True
    objective: Objective
    model: Any  # a PreTrainedModel or PeftModel

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        adapter: ModelAdapter,
        objective: Objective,
        train_dataset: datasets.Dataset,
        tokenizer: Any,
        keep_dropout: bool = False,
    ) -> None:
        if not keep_dropout:
            disable_dropout(model)
        self.collator = PairCollator(adapter)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=self.collator,
            processing_class=tokenizer,
        )
        self.adapter, self.objective = adapter, objective
        self.policy = Policy(self.model, adapter, value_head=False)
        self.reference: Reference | None = None

    def keep_reference(self, *, adapter_is_trained: bool) -> None:
        """Keep the model as it is now to compare with: by its adapters where it has them, else as a frozen copy.

        A copy is whole on every rank: of a model that does not fit so, take precompute_reference.
        """
        copy = None if isinstance(self.model, PeftModel) else deepcopy(self.model).to(self.args.device)
        self.reference = Reference(self.policy, adapter_is_trained=adapter_is_trained, model=copy)

    def precompute_reference(self, cache: Path) -> None:
        """Score train and evaluated pairs with the model as it is now, or read what a former run left in ``cache``."""
        parts: list[Any] = [part for part in (self.train_dataset, self.eval_dataset) if part is not None]
        rows: Any = datasets.concatenate_datasets(parts).sort("row", keep_in_memory=True)
        scores_N2 = np.load(cache, allow_pickle=False) if cache.is_file() else None
        if scores_N2 is None or len(scores_N2) != len(rows):
            scores_N2 = self.log_probabilities(rows)
            if self.is_world_process_zero():
                cache.parent.mkdir(parents=True, exist_ok=True)
                partial = cache.with_name(f".{cache.name}")  # a kill must not leave half a file under its name
                with partial.open("wb") as file:
                    np.save(file, scores_N2)
                partial.rename(cache)
        self.collator.reference = dict(zip(rows["row"], scores_N2.tolist(), strict=True))

    @property
    def splits_weights(self) -> bool:
        """Whether the engine leaves each rank a part of the weights only."""
        deepspeed = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        return deepspeed or self.is_fsdp_enabled or self.is_distributed_loading_by_transformers

    @torch.no_grad()
    def log_probabilities(self, rows: datasets.Dataset, *, per_token: bool = False) -> np.ndarray:
        """Summed (or mean) log-probabilities (N, 2) of chosen and rejected answers under the model as it is now.

        Trainer.predict would wrap the model for inference, which some engines cannot undo before training.
        """
        if self.model.device != self.args.device:  # an engine that places the model itself has not done so yet
            self.model.to(self.args.device)
        model: Any = self.model_wrapped if self.state.global_step else self.model
        parts = []
        known, self.collator.reference = self.collator.reference, None  # of the train rows
        with eval_mode(model):
            for batch in self.get_test_dataloader(rows):
                scores = self._pair_scores(model, self._prepare_inputs(batch))
                scores_B2 = torch.stack([scores.chosen_B, scores.rejected_B], dim=1)
                if per_token:
                    scores_B2 /= torch.stack([scores.chosen_tokens_B, scores.rejected_tokens_B], dim=1)
                ranks = self.accelerator.gather(scores_B2).chunk(self.accelerator.num_processes)
                parts += ranks[:: self.get_tp_size()]  # tensor-parallel ranks have scored the same rows
        self.collator.reference = known
        return torch.cat(parts)[: len(rows)].cpu().numpy()  # without those that fill up the last batch

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """Batches of one optimizer step, with their pairs and chosen tokens counted over all ranks."""
        batches, _ = super().get_batch_samples(*args)
        tokens = [answer_tokens(batch)[0] for batch in batches]
        counts = [sum(len(part) for part in tokens), sum(int(part.sum()) for part in tokens)]
        return batches, self.accelerator.reduce(torch.tensor(counts, device=self.args.device), reduction="sum")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum of the pairs' losses and of the chosen tokens' NLL, each by its count over ranks and accumulation."""
        reference = self._reference_scores(inputs) if self.objective.needs_reference else None
        policy = self._pair_scores(model, inputs)
        found = self.objective(policy, reference)
        pairs, tokens = num_items_in_batch
        loss = found.losses_B.sum() / pairs
        if self.objective.sft_weight:
            loss = loss - self.objective.sft_weight * policy.chosen_B.sum() / tokens
        self._add_up(policy, found)
        return loss * self.accelerator.num_processes  # the engine averages gradients over ranks

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the pairs' means since the last line to a line that holds a loss."""
        prefix = "eval_" if "eval_loss" in logs else ""
        if f"{prefix}loss" in logs and self._sums is not None:
            count, *sums = self.accelerator.reduce(self._sums, reduction="sum").tolist()
            means = {name: value / count for name, value in zip(_SUMS, sums, strict=True)}
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
            logs |= {f"{prefix}{name}": value for name, value in means.items()}
            self._sums = None
        super().log(logs, start_time)

    def _pair_scores(self, model: Any, inputs: Mapping[str, Tensor]) -> PairScores:
        batch = scoring_batch(inputs)
        with self.accelerator.autocast():
            scores, _ = score_tokens(model, self.adapter, batch, 1.0, lean=self.policy.plain_head)
        chosen_B, rejected_B = (scores.logprobs_BR * batch.mask_BR).sum(dim=1).chunk(2)
        return PairScores(chosen_B, rejected_B, *answer_tokens(inputs))

    def _reference_scores(self, inputs: Mapping[str, Tensor]) -> PairScores:
        if REFERENCE in inputs:
            chosen_B, rejected_B = inputs[REFERENCE].unbind(dim=1)
            return PairScores(chosen_B, rejected_B, *answer_tokens(inputs))
        assert self.reference is not None, "keep_reference or precompute_reference comes before training"
        with torch.no_grad(), self.reference.model() as model, eval_mode(model):
            return self._pair_scores(model, inputs)

    def _add_up(self, policy: PairScores, found: PairLosses) -> None:
        rewards = (found.chosen_rewards_B, found.rejected_rewards_B)
        columns = (*rewards, rewards[0] > rewards[1], policy.chosen_B, policy.rejected_B, found.losses_B)
        count = torch.tensor(float(len(rewards[0])), device=self.args.device)
        sums = torch.stack([count, *(column.detach().float().sum() for column in columns)])
        self._sums = sums if self._sums is None else self._sums + sums

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if not self.group_by_length:
            return super()._get_train_sampler(rows)
        columns = zip(rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"], strict=True)
        lengths = [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in columns]
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(lengths, batch_size, self.args.seed)
