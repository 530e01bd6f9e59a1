"""PPO for encoder-decoder and decoder-only models: score, reward, advantages, update.

Batches are global: every rank holds the token ids and per-token numbers of all responses (small), computes its share of
the forward passes (large), and averages by the token counts of all ranks. So a batch gives the same update on one rank,
on many, and in accumulated pieces.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import get_scheduler

from yunque.errors import CheckFailed, InputError
from yunque.models.adapter import TokenIds, pad
from yunque.models.policy import Policy, Reference, disable_dropout
from yunque.rl.advantages import token_rewards, whitened_gae
from yunque.rl.config import PPOConfig
from yunque.rl.kl import AdaptiveKLController, FixedKLController, KLController, full_kl, kl_per_token
from yunque.rl.losses import policy_loss, value_loss
from yunque.rl.statistics import Rollout, minibatch_variances, rollout_statistics, update_statistics

T = TypeVar("T")


class NonFiniteError(CheckFailed):
    """NaN or infinity in scores, log-probabilities, values, loss or gradients; no weight has been moved by it."""


class PPOTrainer:
    """Proximal policy optimisation (Schulman et al. 2017) with a per-token KL penalty (Ziegler et al. 2019)."""

    def __init__(
        self,
        config: PPOConfig,
        policy: Policy,
        reference: Reference,
        accelerator: Accelerator,
        *,
        seed: int,
        total_steps: int,
        temperature: float = 1.0,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        ranks = accelerator.num_processes
        if config.mini_batch_size % ranks:
            raise InputError(f"mini_batch_size: {config.mini_batch_size} does not divide over {ranks} ranks")
        if config.disable_dropout:
            disable_dropout(policy)
        if config.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.config, self.reference, self.accelerator = config, reference, accelerator
        self.adapter, self.seed, self.temperature = policy.adapter, seed, temperature
        optimizer = optimizer or _adam(policy, config)
        updates = config.ppo_epochs * config.batch_size // (config.mini_batch_size * config.gradient_accumulation_steps)
        scheduler = get_scheduler(
            config.lr_scheduler_type, optimizer, config.warmup_steps * updates, total_steps * updates
        )
        self.unwrapped = policy
        self.policy, self.optimizer = accelerator.prepare(policy, optimizer)
        self.scheduler = scheduler
        accelerator.register_for_checkpointing(scheduler)
        self.kl_controller: KLController = (
            AdaptiveKLController(config.init_kl_coef, config.kl_target, config.kl_horizon)
            if config.adap_kl_ctrl
            else FixedKLController(config.init_kl_coef)
        )
        self.steps_done = 0

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """The consecutive part of ``rows`` that this rank works on; the ranks' parts in order make up ``rows``."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        return rows[rank * len(rows) // ranks : (rank + 1) * len(rows) // ranks]

    def step(
        self, queries: Sequence[TokenIds], responses: Sequence[TokenIds], scores: Sequence[float]
    ) -> dict[str, float]:
        """Update the policy from one batch (the same lists on every rank) and return its statistics.

        Raises:
            ValueError: not ``batch_size`` queries, responses and scores.
            NonFiniteError: NaN or infinity anywhere; the update that met it has not been applied.
        """
        sizes = (len(queries), len(responses), len(scores))
        if sizes != (self.config.batch_size,) * 3:
            raise ValueError(f"batch_size is {self.config.batch_size}; got {sizes} queries, responses and scores")
        started = time.perf_counter()
        scores_B = torch.tensor(scores, dtype=torch.float32, device=self.accelerator.device)
        rollout = self._score(queries, responses, scores_B)
        kl_coef = self.kl_controller.value
        rewards_BR, penalty_BR = token_rewards(rollout.scores_B, rollout.kl_BR, kl_coef, rollout.mask_BR)
        advantages_BR, returns_BR = whitened_gae(
            rollout.values_BR,
            rewards_BR,
            rollout.mask_BR,
            gamma=self.config.gamma,
            lam=self.config.lam,
            whiten_rewards=self.config.whiten_rewards,
        )
        scored = time.perf_counter()
        statistics = rollout_statistics(rollout, penalty_BR, kl_coef)
        statistics |= self._update(rollout, advantages_BR, returns_BR)
        self.kl_controller.update(statistics["objective/kl"], len(queries))
        self.steps_done += 1
        finished = time.perf_counter()
        return statistics | {
            "ppo/learning_rate": self.scheduler.get_last_lr()[0],
            "time/ppo/forward_pass": scored - started,
            "time/ppo/optimize_step": finished - scored,
            "time/ppo/total": finished - started,
        }

    # --- before the update ---

    @torch.no_grad()
    def _score(self, queries: Sequence[TokenIds], responses: Sequence[TokenIds], scores_B: Tensor) -> Rollout:
        """Log-probabilities, values and KL of all responses; this rank forwards its share, shortest rows first."""
        _check_finite("the reward", scores_B)
        queries_here, responses_here = self.share(queries), self.share(responses)
        mask_BR = pad(responses, 0, self.accelerator.device)[1]
        numbers = torch.zeros((4, len(queries_here), mask_BR.shape[1]), device=self.accelerator.device)
        order = sorted(range(len(queries_here)), key=lambda row: (len(responses_here[row]), len(queries_here[row])))
        rows_per_pass = self.config.mini_batch_size // self.accelerator.num_processes
        self.policy.eval()
        for start in range(0, len(order), rows_per_pass):
            rows = order[start : start + rows_per_pass]
            scored = self._forward_pair([queries_here[row] for row in rows], [responses_here[row] for row in rows])
            numbers[:, rows, : scored.shape[2]] = scored
        numbers = self.accelerator.gather(numbers.transpose(0, 1).contiguous()).transpose(0, 1) * mask_BR
        _check_finite("log-probabilities or values of the policy", numbers)
        return Rollout(queries, responses, scores_B, mask_BR, *numbers)

    def _forward_pair(self, queries: Sequence[TokenIds], responses: Sequence[TokenIds]) -> Tensor:
        """Stack log-probabilities, the reference's, values and KL of a few responses: (4, rows, R)."""
        full = self.config.kl_estimator == "full"
        batch = self.adapter.scoring_batch(queries, responses, self.accelerator.device)
        with self.accelerator.autocast():
            ours = self.unwrapped(batch, self.temperature, full)
            theirs = self.reference.score(batch, self.temperature, full)
        if ours.logits_BRV is not None and theirs.logits_BRV is not None:
            kl_BR = full_kl(ours.logits_BRV, theirs.logits_BRV)
        else:
            kl_BR = kl_per_token(self.config.kl_estimator, ours.logprobs_BR, theirs.logprobs_BR)
        return torch.stack([ours.logprobs_BR, theirs.logprobs_BR, ours.values_BR.float(), kl_BR])

    # --- the update ---

    def _update(self, rollout: Rollout, advantages_BR: Tensor, returns_BR: Tensor) -> dict[str, float]:
        """Run the PPO epochs over shuffled minibatches."""
        per_update = self.config.gradient_accumulation_steps
        means: list[Tensor] = []
        variances: list[tuple[float, float]] = []
        skipped = 0
        self.policy.train()
        for epoch in range(self.config.ppo_epochs):
            order = self._permutation(len(rollout.queries), epoch)
            minibatches = [rows.tolist() for rows in np.split(order, len(order) // self.config.mini_batch_size)]
            epoch_means: list[Tensor] = []
            for start in range(0, len(minibatches), per_update):
                group = minibatches[start : start + per_update]
                group_means = self._accumulate(rollout, advantages_BR, returns_BR, group)
                skipped += not self._optimizer_step(group_means)
                epoch_means.extend(group_means)
                variances.extend(
                    minibatch_variances(returns_BR[rows], rollout.values_BR[rows], rollout.mask_BR[rows])
                    for rows in group
                )
            means.extend(epoch_means)
            approx_kl = float(torch.stack(epoch_means)[:, 3].mean())
            if self.config.early_stop_kl is not None and approx_kl > self.config.early_stop_kl:
                break
        self.policy.eval()
        statistics = update_statistics(means, variances, self.config.vf_coef)
        return statistics | {"ppo/epochs_done": float(epoch + 1), "ppo/skipped_updates": float(skipped)}

    def _permutation(self, size: int, epoch: int) -> np.ndarray:
        """Order of a batch in one epoch: the same on every rank and after a resume."""
        return np.random.default_rng([self.seed, self.steps_done, epoch]).permutation(size)

    def _accumulate(
        self, rollout: Rollout, advantages_BR: Tensor, returns_BR: Tensor, group: Sequence[list[int]]
    ) -> list[Tensor]:
        """Add up the gradients of the minibatches of one optimizer step; returns their statistics over all ranks."""
        tokens = [rollout.mask_BR[rows].sum() for rows in group]
        means = []
        for index, rows in enumerate(group):
            if self.config.loss_normalization == "tokens":
                denominator = torch.stack(tokens).sum()
            else:
                denominator = tokens[index] * len(group)
            last = index == len(group) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.policy):
                sums = self._backward(rollout, advantages_BR, returns_BR, self.share(rows), denominator)
            means.append(self.accelerator.reduce(sums, reduction="sum") / tokens[index])
        return means

    def _backward(
        self, rollout: Rollout, advantages_BR: Tensor, returns_BR: Tensor, rows: Sequence[int], denominator: Tensor
    ) -> Tensor:
        """Forward and backward of this rank's rows of a minibatch; returns the token sums of its statistics."""
        batch = self.adapter.scoring_batch(
            [rollout.queries[row] for row in rows], [rollout.responses[row] for row in rows], self.accelerator.device
        )
        window = (list(rows), slice(0, batch.mask_BR.shape[1]))
        mask_BR, advantages_BR, returns_BR = batch.mask_BR, advantages_BR[window], returns_BR[window]
        old_logprobs_BR, old_values_BR = rollout.logprobs_BR[window], rollout.values_BR[window]
        with self.accelerator.autocast():
            new = self.policy(batch, self.temperature)
        policy = policy_loss(new.logprobs_BR, old_logprobs_BR, advantages_BR, self.config.cliprange)
        value = value_loss(new.values_BR.float(), old_values_BR, returns_BR, self.config.cliprange_value)
        loss_BR = policy.per_token_BR + self.config.vf_coef * value.per_token_BR
        # DDP and its kin average gradients over ranks; the loss is a sum over all ranks' tokens
        self.accelerator.backward((loss_BR * mask_BR).sum() / denominator * self.accelerator.num_processes)
        with torch.no_grad():
            change_BR = new.logprobs_BR - old_logprobs_BR
            per_token = (
                policy.per_token_BR,
                value.per_token_BR,
                new.entropy_BR,
                0.5 * change_BR.square(),
                -change_BR,
                policy.clipped_BR,
                change_BR.exp(),
                advantages_BR,
                new.values_BR,
                (new.values_BR - returns_BR).square(),
                value.clipped_BR,
                old_values_BR,
                returns_BR,
            )
            return torch.stack([(values_BR * mask_BR).sum().float() for values_BR in per_token])

    def _optimizer_step(self, means: Sequence[Tensor]) -> bool:
        """Apply the accumulated gradients, unless a minibatch's mean ratio says that the policy ran away.

        A skipped step moves nothing: TRL 0.11 multiplies the loss by 0 and lets Adam's momentum move the weights on.
        """
        stacked = torch.stack(list(means))
        norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm or float("inf"))
        if not (torch.isfinite(stacked).all() and torch.isfinite(torch.as_tensor(norm))):
            self.optimizer.zero_grad()
            raise NonFiniteError(f"step {self.steps_done}: NaN or infinity in the loss or its gradient")
        ran_away = bool((stacked[:, 6] > self.config.ratio_threshold).any())
        if not ran_away:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return not ran_away

    def gather(self, rows: Sequence[T]) -> list[T]:
        """Join the ranks' lists of Python objects, in the order of ``share``."""
        return gather_object(list(rows)) if self.accelerator.num_processes > 1 else list(rows)


def _adam(policy: Policy, config: PPOConfig) -> torch.optim.Optimizer:
    """Adam over all that trains, with a learning rate of its own for the value head."""
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(
        [
            {"params": trained, "lr": config.learning_rate},
            {"params": list(policy.v_head.parameters()), "lr": config.value_learning_rate or config.learning_rate},
        ]
    )


def _check_finite(what: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise NonFiniteError(f"NaN or infinity in {what}")
