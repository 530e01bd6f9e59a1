"""PPO, GRPO, RLOO and REINFORCE for encoder-decoder and decoder-only models: score, reward, advantages, update.

Batches are global: every rank holds the token ids and per-token numbers of all responses (small), computes its share of
the forward passes (large), and averages by the token counts of all ranks. So a batch gives the same update on one rank,
on many, and in accumulated pieces.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from transformers import get_scheduler

from yunque.distributed.gathering import Twin, compute_dtype, is_sharded, shard_frozen
from yunque.distributed.updates import prepare_updates
from yunque.distributed.zero import forget_forward_passes
from yunque.errors import CheckFailed, InputError
from yunque.models import start_check
from yunque.models.adapter import ScoringBatch, TokenIds, pad
from yunque.models.copying import eval_mode
from yunque.models.encodings import QueryEncodings
from yunque.models.policy import Policy, Reference, TokenScores, disable_dropout
from yunque.rl.advantages import Rewards, estimate_advantages, token_rewards
from yunque.rl.config import PPOConfig
from yunque.rl.kl import AdaptiveKLController, FixedKLController, KLController, full_kl, kl_per_token
from yunque.rl.losses import policy_loss, row_weights, value_loss
from yunque.rl.rollout import check_rollouts
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
        check_rollouts(policy.model, policy.adapter, accelerator.device)
        if config.disable_dropout:
            disable_dropout(policy)
        if config.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.config, self.reference, self.accelerator = config, reference, accelerator
        self.check_rollouts(policy)
        self.adapter, self.seed, self.temperature = policy.adapter, seed, temperature
        optimizer = optimizer or _adam(policy, config)
        updates = config.ppo_epochs * config.batch_size // (config.mini_batch_size * config.gradient_accumulation_steps)
        scheduler = get_scheduler(
            config.lr_scheduler_type, optimizer, config.warmup_steps * updates, total_steps * updates
        )
        self.encodings = QueryEncodings(policy.model, sharded=accelerator.distributed_type in _SHARDED)
        self.unwrapped = policy
        self._twins = self._make_twins()
        start = start_check.plain_start(policy.model, accelerator)
        self.updates = prepare_updates(
            accelerator,
            policy,
            optimizer,
            rows_per_rank=config.mini_batch_size // ranks,
            max_grad_norm=config.max_grad_norm,
        )
        self.policy, self.optimizer = self.updates.module, self.updates.optimizer
        self.scheduler = scheduler
        accelerator.register_for_checkpointing(scheduler)
        self.kl_controller: KLController = (
            AdaptiveKLController(config.init_kl_coef, config.kl_target, config.kl_horizon)
            if config.adap_kl_ctrl
            else FixedKLController(config.init_kl_coef)
        )
        self.steps_done = 0
        if start is not None:
            self._check_start(start)

    def _check_start(self, start: start_check.PlainStart) -> None:
        """Check the model that learns, the one that answers and the reference, as the engine has them."""

        def logits(score: Callable[..., TokenScores]) -> Callable[[dict[str, Tensor]], Tensor]:
            def forward(inputs: dict[str, Tensor]) -> Tensor:
                response_BR = inputs.get("decoder_input_ids", inputs["input_ids"])
                batch = ScoringBatch(inputs, response_BR, torch.ones_like(response_BR, dtype=torch.bool))
                found = score(batch, keep_logits=True).logits_BRV
                assert found is not None
                return found

            return forward

        check = partial(start_check.check_start, start, self.unwrapped.model, self.accelerator)
        with eval_mode(self.policy):
            check(logits(self.policy))
        forget_forward_passes(self.policy)
        with self.whole() as (policy, reference):
            if policy is not self.unwrapped:
                check(logits(policy), "gathered model")
            if not self.reference.is_given:
                check(logits(reference.score), "reference")

    def check_rollouts(self, policy: Policy) -> None:
        """Check that rollouts sample from ``policy`` as its forward pass has it.

        Raises:
            InputError: they do not.
        """
        check_rollouts(policy.model, policy.adapter, self.accelerator.device)

    def _make_twins(self) -> tuple[Twin[Policy], Twin[nn.Module] | None, Reference] | None:
        """Twins of policy and of the reference's frozen copy, if any, for an engine that shards their weights."""
        copy = self.reference.copy
        if not is_sharded(self.unwrapped, self.accelerator):
            dtype = compute_dtype(self.accelerator)
            for weight in () if copy is None or dtype is None else copy.parameters():
                weight.data = weight.data.to(dtype)  # ZeRO-1 and 2 compute in bf16, by the policy's own type
            return None
        policy = Twin(self.unwrapped, self.accelerator)
        if copy is None:
            return policy, None, self.reference.on(policy.twin, None)
        shard_frozen(copy, self.accelerator)
        frozen = Twin(copy, self.accelerator)
        return policy, frozen, self.reference.on(policy.twin, frozen.twin)

    @contextmanager
    def whole(self, *, reference: bool = True) -> Iterator[tuple[Policy, Reference]]:
        """Policy and ``reference`` to work with without gradients, for the time of the context.

        Sharded weights are gathered once, when it is entered: every rank must enter it, and none waits for another
        inside. It may be entered again inside.
        """
        if self._twins is None:
            yield self.unwrapped, self.reference
            return
        policy, frozen, reference_on_twins = self._twins
        with ExitStack() as stack:
            entered = stack.enter_context(policy.gathered())
            if reference and frozen is not None:
                stack.enter_context(frozen.gathered())
            yield entered, reference_on_twins

    def model_to_save(self) -> Any:
        """The trained language model, whole on the main process; every rank must ask for it, and training is over."""
        if self._twins is None:
            return self.unwrapped.model
        return self._twins[0].kept(on_this_rank=self.accelerator.is_main_process).model

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
        with ExitStack() as stack:
            policy, reference = stack.enter_context(self.whole())
            if known is not None:
                stack.enter_context(reference.model())  # switching adapters once is enough
            for start in range(0, len(order), rows_per_pass):
                rows = order[start : start + rows_per_pass]
                batch = self._batch(queries, responses, rows)
                ours = None if known is None else self._known(known, rows, batch.mask_BR)
                scored = self._forward_pair(policy, reference, batch, ours)
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

    def _forward_pair(
        self, policy: Policy, reference: Reference, batch: ScoringBatch, ours: TokenScores | None
    ) -> Tensor:
        """Stack log-probabilities, the reference's, values and KL of a few responses: (4, rows, R)."""
        full = self.config.kl_estimator == "full"
        with self.accelerator.autocast():
            ours = ours or policy(batch, self.temperature, full)
            theirs = reference.score(batch, self.temperature, full)
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
        rank, ranks = self.updates.data_rank, self.updates.data_ranks
        tokens_B = rollout.mask_BR.sum(dim=1)
        weight_of = self.config.weight_of_group()
        weight_of_G = torch.tensor([weight_of.get(str(name), 1.0) for name in rollout.groups], device=tokens_B.device)
        weights_B = row_weights(self.config.loss_normalization, tokens_B, group, rollout.groups_B, weight_of_G)
        means: list[Tensor] = []
        for index, rows in enumerate(group):
            with self.updates.collecting(last=index == len(group) - 1):
                # every rank takes every so many-th row: neighbours are of similar length, so ranks are done together
                loss, sums = self._loss(rollout, advantages_BR, returns_BR, rows[rank::ranks], weights_B)
                means.append(self.updates.sum(sums) / tokens_B[rows].sum())
                self.updates.backward(loss, lambda: self._ran_away(means) or not _all_finite(means))
        return means

    def _loss(
        self, rollout: Rollout, advantages_BR: Tensor, returns_BR: Tensor, rows: Sequence[int], weights_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss of this rank's rows of a minibatch, a part of a sum over all, and the token sums of its statistics."""
        batch = self._batch(rollout.queries, rollout.responses, rows)
        window = (list(rows), slice(0, batch.mask_BR.shape[1]))
        mask_BR, advantages_BR, returns_BR = batch.mask_BR, advantages_BR[window], returns_BR[window]
        old_logprobs_BR, old_values_BR = rollout.logprobs_BR[window], rollout.values_BR[window]
        kl_in_loss = self.config.kl_placement == "loss"
        full = kl_in_loss and self.config.kl_estimator == "full"
        ref_logits_BRV = self._reference_logits(batch) if full else None  # first: it may gather what the policy shards
        with self.accelerator.autocast():
            new = self.policy(batch, self.temperature, full)
        values_BR = old_values_BR if new.values_BR is None else new.values_BR.float()
        policy = policy_loss(new.logprobs_BR, old_logprobs_BR, advantages_BR, self.config.cliprange)
        value = value_loss(values_BR, old_values_BR, returns_BR, self.config.cliprange_value)
        loss_BR = policy.per_token_BR
        if new.values_BR is not None:
            loss_BR = loss_BR + self.config.vf_coef * value.per_token_BR
        if kl_in_loss:
            loss_BR = loss_BR + self.kl_controller.value * self._kl(
                new, rollout.ref_logprobs_BR[window], ref_logits_BRV
            )
        loss = (loss_BR * mask_BR * weights_B[list(rows), None]).sum()
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
            return loss, torch.stack([(numbers_BR * mask_BR).sum().float() for numbers_BR in per_token])

    def _kl(self, new: TokenScores, ref_logprobs_BR: Tensor, ref_logits_BRV: Tensor | None) -> Tensor:
        """KL to the reference at each token with a gradient into the policy, shape (B, R)."""
        if ref_logits_BRV is None:
            return kl_per_token(self.config.kl_estimator, new.logprobs_BR, ref_logprobs_BR)
        assert new.logits_BRV is not None
        return full_kl(new.logits_BRV, ref_logits_BRV)

    def _reference_logits(self, batch: ScoringBatch) -> Tensor | None:
        with self.whole() as (_, reference), self.accelerator.autocast():
            return reference.score(batch, self.temperature, keep_logits=True).logits_BRV

    def _optimizer_step(self, means: Sequence[Tensor]) -> bool:
        """Apply the accumulated gradients, unless a minibatch's mean ratio says that the policy ran away.

        A skipped step moves nothing: TRL 0.11 multiplies the loss by 0 and lets Adam's momentum move the weights on.
        """
        ran_away, finite = self._ran_away(means), _all_finite(means)
        if not (self.updates.step(void=ran_away or not finite) and finite):
            raise NonFiniteError(f"step {self.steps_done}: NaN or infinity in the loss or its gradient")
        self.scheduler.step()
        return not ran_away

    def _ran_away(self, means: Sequence[Tensor]) -> bool:
        return bool((torch.stack(list(means))[:, 6] > self.config.ratio_threshold).any())

    def gather(self, rows: Sequence[T]) -> list[T]:
        """Join the ranks' lists of Python objects, in the order of ``share``."""
        return gather_object(list(rows)) if self.accelerator.num_processes > 1 else list(rows)


def _adam(policy: Policy, config: PPOConfig) -> torch.optim.Optimizer:
    """Adam over all that trains, with a learning rate of its own for the value head."""
    trained: dict[type, list[nn.Parameter]] = {}  # Adam's fused loops take no split weights beside whole ones
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            trained.setdefault(type(parameter), []).append(parameter)
    groups: list[dict[str, Any]] = [{"params": kind, "lr": config.learning_rate} for kind in trained.values()]
    if policy.v_head is not None:
        value_learning_rate = config.value_learning_rate or config.learning_rate
        groups.append({"params": list(policy.v_head.parameters()), "lr": value_learning_rate})
    return torch.optim.Adam(groups)


def _all_finite(means: Sequence[Tensor]) -> bool:
    return bool(torch.isfinite(torch.stack(list(means))).all())


def _check_finite(what: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise NonFiniteError(f"NaN or infinity in {what}")
