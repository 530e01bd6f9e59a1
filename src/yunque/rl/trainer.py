"""PPO, GRPO, RLOO and REINFORCE for encoder-decoder and decoder-only models: score, reward, advantages, update.

Batches are global: every rank holds the token ids and per-token numbers of all responses (small), computes its share of
the forward passes (large), and averages by the token counts of all ranks. So a batch gives the same update on one rank,
on many, and in accumulated pieces.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from transformers import get_scheduler

from yunque.errors import CheckFailed, InputError
from yunque.models.adapter import ScoringBatch, TokenIds, pad
from yunque.models.encodings import QueryEncodings
from yunque.models.policy import Policy, Reference, TokenScores, disable_dropout
from yunque.rl.advantages import Rewards, estimate_advantages, token_rewards
from yunque.rl.config import PPOConfig
from yunque.rl.kl import AdaptiveKLController, FixedKLController, KLController, full_kl, kl_per_token
from yunque.rl.losses import policy_loss, row_weights, value_loss
from yunque.rl.statistics import Rollout, group_statistics, minibatch_variances, rollout_statistics, update_statistics

T = TypeVar("T")

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


@dataclass(frozen=True)
class Sampled:
    """Per response, log-probabilities of its tokens and values before each, as sampling computed them.

    ``values`` is None for a policy without a value head.
    """

    logprobs: Sequence[Sequence[float]]
    values: Sequence[Sequence[float]] | None


class NonFiniteError(CheckFailed):
    """NaN or infinity in scores, log-probabilities, values, loss or gradients; no weight has been moved by it."""


class PPOTrainer:
    """Clipped policy updates (Schulman et al. 2017) under a KL penalty (Ziegler et al. 2019), advantages by choice."""

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
        if (policy.v_head is not None) != (config.advantage_estimator == "gae"):
            raise ValueError(f"advantage_estimator {config.advantage_estimator}: only gae goes with a value head")
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
        self.encodings = QueryEncodings(policy.model, sharded=accelerator.distributed_type in _SHARDED)
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
        self,
        queries: Sequence[TokenIds],
        responses: Sequence[TokenIds],
        scores: Sequence[float],
        *,
        groups: Sequence[Hashable] | None = None,
        sampled: Sampled | None = None,
    ) -> dict[str, float]:
        """Update the policy from one batch (the same lists on every rank) and return its statistics.

        ``groups`` label the responses that are compared with each other; without it, each ``num_generations`` in a row
        are. ``sampled`` spares a forward pass: what sampling already computed.

        Raises:
            ValueError: not ``batch_size`` queries, responses, scores and groups.
            NonFiniteError: NaN or infinity anywhere; the update that met it has not been applied.
        """
        size = self.config.batch_size
        labels = [row // self.config.num_generations for row in range(size)] if groups is None else groups
        sizes = (len(queries), len(responses), len(scores), len(labels))
        if sizes != (size,) * 4:
            raise ValueError(f"batch_size is {size}; got {sizes} queries, responses, scores and groups")
        started = time.perf_counter()
        scores_B = torch.tensor(scores, dtype=torch.float32, device=self.accelerator.device)
        rollout = self._score(queries, responses, scores_B, labels, sampled)
        kl_coef = self.kl_controller.value
        charged = kl_coef if self.config.kl_placement == "reward" else 0.0
        rewards_BR, penalty_BR = token_rewards(rollout.scores_B, rollout.kl_BR, charged, rollout.mask_BR)
        rewards = Rewards(rewards_BR, rollout.values_BR, rollout.mask_BR, rollout.groups_B)
        advantages_BR, returns_BR = estimate_advantages(rewards, self.config)
        scored = time.perf_counter()
        statistics = rollout_statistics(rollout, penalty_BR, kl_coef)
        if groups is not None:
            statistics |= group_statistics(rollout, advantages_BR)
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
    def _score(
        self,
        queries: Sequence[TokenIds],
        responses: Sequence[TokenIds],
        scores_B: Tensor,
        labels: Sequence[Hashable],
        sampled: Sampled | None,
    ) -> Rollout:
        """Log-probabilities, values and KL of all responses; this rank forwards its share, shortest rows first."""
        _check_finite("the reward", scores_B)
        device = self.accelerator.device
        here = self.share(range(len(queries)))
        mask_BR = pad(responses, 0, device)[1]
        numbers = torch.zeros((4, len(here), mask_BR.shape[1]), device=device)
        rows_per_pass = self.config.mini_batch_size // self.accelerator.num_processes
        known = None if self.config.kl_estimator == "full" else sampled
        self.policy.eval()
        self.encodings.clear()
        order = self._by_length(queries, responses, here)
        with nullcontext() if known is None else self.reference.model():  # switching adapters once is enough
            for start in range(0, len(order), rows_per_pass):
                rows = order[start : start + rows_per_pass]
                batch = self._batch(queries, responses, rows)
                ours = None if known is None else self._known(known, rows, batch.mask_BR)
                scored = self._forward_pair(batch, ours)
                numbers[:, [row - here[0] for row in rows], : scored.shape[2]] = scored
        numbers = self.accelerator.gather(numbers.transpose(0, 1).contiguous()).transpose(0, 1) * mask_BR
        _check_finite("log-probabilities or values of the policy", numbers)
        names = list(dict.fromkeys(labels))
        groups_B = torch.tensor([names.index(label) for label in labels], device=device)
        return Rollout(queries, responses, scores_B, names, groups_B, mask_BR, *numbers)

    def _known(self, sampled: Sampled, rows: Sequence[int], mask_BR: Tensor) -> TokenScores:
        """What sampling computed of ``rows``, as a forward pass would return it."""
        columns = torch.zeros((2, *mask_BR.shape), device=mask_BR.device)
        for index, row in enumerate(rows):
            columns[0, index, : len(sampled.logprobs[row])] = torch.tensor(sampled.logprobs[row])
            if sampled.values:
                columns[1, index, : len(sampled.values[row])] = torch.tensor(sampled.values[row])
        return TokenScores(columns[0], torch.zeros_like(columns[0]), columns[1])

    def _forward_pair(self, batch: ScoringBatch, ours: TokenScores | None) -> Tensor:
        """Stack log-probabilities, the reference's, values and KL of a few responses: (4, rows, R)."""
        full = self.config.kl_estimator == "full"
        with self.accelerator.autocast():
            ours = ours or self.unwrapped(batch, self.temperature, full)
            theirs = self.reference.score(batch, self.temperature, full)
        if ours.logits_BRV is not None and theirs.logits_BRV is not None:
            kl_BR = full_kl(ours.logits_BRV, theirs.logits_BRV)
        else:
            kl_BR = kl_per_token(self.config.kl_estimator, ours.logprobs_BR, theirs.logprobs_BR)
        values_BR = torch.zeros_like(kl_BR) if ours.values_BR is None else ours.values_BR.float()
        return torch.stack([ours.logprobs_BR, theirs.logprobs_BR, values_BR, kl_BR])

    def _batch(self, queries: Sequence[TokenIds], responses: Sequence[TokenIds], rows: Sequence[int]) -> ScoringBatch:
        """Inputs that score the responses of ``rows``, with encoder states at hand where these never change."""
        batch = self.adapter.scoring_batch(
            [queries[row] for row in rows], [responses[row] for row in rows], self.accelerator.device
        )
        with self.accelerator.autocast():
            return self.encodings.attach(batch, rows)

    def _by_length(self, queries: Sequence[TokenIds], responses: Sequence[TokenIds], rows: Sequence[int]) -> list[int]:
        """Sort ``rows`` so that neighbours are padded little: by query, which is long, and by response."""
        return sorted(rows, key=lambda row: (len(queries[row]) + len(responses[row]), len(responses[row])))

    # --- the update ---

    def _update(self, rollout: Rollout, advantages_BR: Tensor, returns_BR: Tensor) -> dict[str, float]:
        """Run the PPO epochs over shuffled minibatches."""
        means: list[Tensor] = []
        variances: list[tuple[float, float]] = []
        skipped = 0
        self.policy.train()
        for epoch in range(self.config.ppo_epochs):
            updates = self._updates(rollout, epoch)
            epoch_means: list[Tensor] = []
            for group in updates:
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
                for _ in range((self.config.ppo_epochs - epoch - 1) * len(updates)):
                    self.scheduler.step()  # the schedule counts the updates planned
                break
        self.policy.eval()
        statistics = update_statistics(means, variances, self.config.vf_coef, values=self.unwrapped.v_head is not None)
        return statistics | {"ppo/epochs_done": float(epoch + 1), "ppo/skipped_updates": float(skipped)}

    def _permutation(self, size: int, epoch: int) -> np.ndarray:
        """Order of a batch in one epoch: the same on every rank and after a resume."""
        return np.random.default_rng([self.seed, self.steps_done, epoch]).permutation(size)

    def _updates(self, rollout: Rollout, epoch: int) -> list[list[list[int]]]:
        """Shuffle the batch into optimizer steps, each a list of minibatches of rows.

        With ``group_by_length`` the rows of a step are of similar length, and the steps are shuffled.
        """
        size = self.config.mini_batch_size
        rows_per_update, count = size * self.config.gradient_accumulation_steps, len(rollout.queries)
        if self.config.group_by_length:
            order = self._by_length(rollout.queries, rollout.responses, range(count))
            starts = (rows_per_update * self._permutation(count // rows_per_update, epoch)).tolist()
        else:
            order = self._permutation(count, epoch).tolist()
            starts = list(range(0, count, rows_per_update))
        return [
            [order[first : first + size] for first in range(start, start + rows_per_update, size)] for start in starts
        ]

    def _accumulate(
        self, rollout: Rollout, advantages_BR: Tensor, returns_BR: Tensor, group: Sequence[list[int]]
    ) -> list[Tensor]:
        """Add up the gradients of the minibatches of one optimizer step; returns their statistics over all ranks."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        tokens_B = rollout.mask_BR.sum(dim=1)
        weight_of = self.config.weight_of_group()
        weight_of_G = torch.tensor([weight_of.get(str(name), 1.0) for name in rollout.groups], device=tokens_B.device)
        weights_B = row_weights(self.config.loss_normalization, tokens_B, group, rollout.groups_B, weight_of_G)
        means = []
        for index, rows in enumerate(group):
            last = index == len(group) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.policy):
                # every rank takes every so many-th row: neighbours are of similar length, so ranks are done together
                sums = self._backward(rollout, advantages_BR, returns_BR, rows[rank::ranks], weights_B)
            means.append(self.accelerator.reduce(sums, reduction="sum") / tokens_B[rows].sum())
        return means

    def _backward(
        self, rollout: Rollout, advantages_BR: Tensor, returns_BR: Tensor, rows: Sequence[int], weights_B: Tensor
    ) -> Tensor:
        """Forward and backward of this rank's rows of a minibatch; returns the token sums of its statistics."""
        batch = self._batch(rollout.queries, rollout.responses, rows)
        window = (list(rows), slice(0, batch.mask_BR.shape[1]))
        mask_BR, advantages_BR, returns_BR = batch.mask_BR, advantages_BR[window], returns_BR[window]
        old_logprobs_BR, old_values_BR = rollout.logprobs_BR[window], rollout.values_BR[window]
        kl_in_loss = self.config.kl_placement == "loss"
        with self.accelerator.autocast():
            new = self.policy(batch, self.temperature, kl_in_loss and self.config.kl_estimator == "full")
        values_BR = old_values_BR if new.values_BR is None else new.values_BR.float()
        policy = policy_loss(new.logprobs_BR, old_logprobs_BR, advantages_BR, self.config.cliprange)
        value = value_loss(values_BR, old_values_BR, returns_BR, self.config.cliprange_value)
        loss_BR = policy.per_token_BR
        if new.values_BR is not None:
            loss_BR = loss_BR + self.config.vf_coef * value.per_token_BR
        if kl_in_loss:
            loss_BR = loss_BR + self.kl_controller.value * self._kl(batch, new, rollout.ref_logprobs_BR[window])
        # DDP and its kin average gradients over ranks; the loss is a sum over all ranks' tokens
        loss = (loss_BR * mask_BR * weights_B[list(rows), None]).sum()
        self.accelerator.backward(loss * self.accelerator.num_processes)
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
                values_BR,
                (values_BR - returns_BR).square(),
                value.clipped_BR,
                old_values_BR,
                returns_BR,
            )
            return torch.stack([(numbers_BR * mask_BR).sum().float() for numbers_BR in per_token])

    def _kl(self, batch: ScoringBatch, new: TokenScores, ref_logprobs_BR: Tensor) -> Tensor:
        """KL to the reference at each token with a gradient into the policy, shape (B, R)."""
        if new.logits_BRV is None:
            return kl_per_token(self.config.kl_estimator, new.logprobs_BR, ref_logprobs_BR)
        with self.accelerator.autocast():
            theirs = self.reference.score(batch, self.temperature, keep_logits=True)
        assert theirs.logits_BRV is not None
        return full_kl(new.logits_BRV, theirs.logits_BRV)

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
    groups = [{"params": trained, "lr": config.learning_rate}]
    if policy.v_head is not None:
        value_learning_rate = config.value_learning_rate or config.learning_rate
        groups.append({"params": list(policy.v_head.parameters()), "lr": value_learning_rate})
    return torch.optim.Adam(groups)


def _check_finite(what: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise NonFiniteError(f"NaN or infinity in {what}")
