"""TRL 0.11's PPO step over its own pieces, and the statistics that every step reports.

``PPOTrainer.step`` comes here for TRL's arithmetic (``strict``), for tokens that ``response_masks`` switches off, and
where a subclass has its own version of a piece; all else is the engine's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yunque.compat.trl011.core import masked_mean, stack_dicts
from yunque.rl.statistics import Rollout
from yunque.rl.trainer import NonFiniteError


def step_by_pieces(
    trainer: Any,
    queries: list[Tensor],
    responses: list[Tensor],
    scores: Tensor,
    response_masks: list[Tensor] | None,
) -> dict[str, Any]:
    """One PPO step of a ``PPOTrainer`` on one process, from its own pieces, minibatch by minibatch."""
    started = time.perf_counter()
    inputs = trainer.prepare_model_inputs(queries, responses)
    before, ref_logprobs, kl_inputs = _score(trainer, queries, responses, inputs, response_masks)
    logprobs, values, masks = before
    forwarded = time.perf_counter()
    with torch.no_grad():
        rewards, non_score_rewards, kls = trainer.compute_rewards(scores, *kl_inputs, masks)
        rewarded = time.perf_counter()
        values, advantages, returns = trainer.compute_advantages(values, rewards, masks)
    advanced = time.perf_counter()
    batch = {
        "logprobs": logprobs.float(),
        "values": values.float(),
        "masks": masks,
        "advantages": advantages,
        "returns": returns,
    }
    train_stats = _update(trainer, queries, responses, inputs, batch)
    optimized = time.perf_counter()
    stats = trainer.record_step_stats(
        kl_coef=trainer.kl_ctl.value,
        scores=scores,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        non_score_reward=non_score_rewards,
        train_stats=train_stats,
        masks=masks,
        queries=queries,
        responses=responses,
        kls=kls,
    )
    trainer.kl_ctl.update(float(stats["objective/kl"]), len(queries))
    finished = time.perf_counter()
    return stats | {
        "ppo/learning_rate": trainer.optimizer.param_groups[0]["lr"],
        "time/ppo/forward_pass": forwarded - started,
        "time/ppo/compute_rewards": rewarded - forwarded,
        "time/ppo/compute_advantages": advanced - rewarded,
        "time/ppo/optimize_step": optimized - advanced,
        "time/ppo/calc_stats": finished - optimized,
        "time/ppo/total": finished - started,
    }


def _score(
    trainer: Any,
    queries: list[Tensor],
    responses: list[Tensor],
    inputs: dict[str, Tensor],
    response_masks: list[Tensor] | None,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, tuple[Tensor, Tensor]]:
    """Log-probabilities, values and mask of the policy; the reference's log-probabilities; what KL is taken of."""
    full = trainer.config.kl_penalty == "full"
    options = {"return_logits": full}
    with torch.no_grad():
        logprobs, logits, values, masks = trainer.batched_forward_pass(
            trainer.model, queries, responses, inputs, response_masks=response_masks, **options
        )
        with trainer.reference_model() as reference:
            theirs = trainer.batched_forward_pass(reference, queries, responses, inputs, **options)
    ref_logprobs, ref_logits = theirs[:2]
    kl_inputs = (logprobs, ref_logprobs)
    if full:
        kl_inputs = logits.log_softmax(dim=-1), ref_logits.log_softmax(dim=-1)
    return (logprobs, values, masks), ref_logprobs, kl_inputs


def _update(
    trainer: Any,
    queries: list[Tensor],
    responses: list[Tensor],
    inputs: dict[str, Tensor],
    batch: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Run the PPO epochs; statistics stacked over minibatches."""
    config, all_stats = trainer.config, []
    trainer.optimizer.zero_grad()
    for _ in range(config.ppo_epochs):
        order = np.random.permutation(len(queries))  # the random state that set_seed, and TRL's users, set
        skip = False
        for number, rows in enumerate(np.split(order, len(order) // config.mini_batch_size), start=1):
            logprobs, logits, vpreds, _ = trainer.batched_forward_pass(
                trainer.model,
                [queries[row] for row in rows],
                [responses[row] for row in rows],
                {name: tensor[rows] for name, tensor in inputs.items()},
                return_logits=True,
            )
            old = {name: tensor[rows] for name, tensor in batch.items()}
            policy_loss, value_loss, stats = trainer.loss(
                old["logprobs"],
                old["values"],
                logits,
                vpreds,
                logprobs,
                old["masks"],
                old["advantages"],
                old["returns"],
            )
            loss = policy_loss + value_loss
            if not (config.strict or torch.isfinite(loss)):
                trainer.optimizer.zero_grad()
                raise NonFiniteError("NaN or infinity in the loss of a minibatch")
            trainer.accelerator.backward(loss / config.gradient_accumulation_steps)
            all_stats.append(stats)
            skip |= bool(masked_mean(stats["policy/ratio"], old["masks"]) > config.ratio_threshold)
            if number % config.gradient_accumulation_steps == 0:
                _optimizer_step(trainer, skip and not config.strict)
                skip = False
        if config.early_stopping and all_stats[-1]["policy/policykl"] > 1.5 * config.target_kl:
            break
    stacked = stack_dicts(all_stats)
    for name in ("policy/advantages", "policy/ratio"):  # of every token, not averaged over minibatches
        stacked[name] = stacked[name].flatten().unsqueeze(0)
    return stacked


def _optimizer_step(trainer: Any, skip: bool) -> None:
    """Apply the accumulated gradients, or forget them: a skipped step moves nothing."""
    if trainer.config.max_grad_norm is not None:
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.config.max_grad_norm)
    if not skip:
        trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def record_step_stats(kl_coef: float, data: dict[str, Any]) -> dict[str, Any]:
    """TRL's statistics of a step by pieces: tensors (B, T-1) before the update, minibatch figures after it."""
    mask, kls = data["masks"], data["kls"]
    kl_list = (kls * mask).sum(dim=1)
    stats = {
        "objective/kl": kl_list.mean(),
        "objective/kl_dist": kl_list,
        "objective/logprobs": data["logprobs"],
        "objective/ref_logprobs": data["ref_logprobs"],
        "objective/kl_coef": kl_coef,
        "objective/entropy": -(data["logprobs"] * mask).sum(dim=1).mean(),
        "ppo/mean_non_score_reward": masked_mean(data["non_score_reward"], mask),
        "ppo/mean_scores": data["scores"].mean(),
        "ppo/std_scores": data["scores"].std(),
    }
    stats |= length_statistics(data["queries"], data["responses"])
    stats |= {f"ppo/{name}": figures.mean(dim=0) for name, figures in data["train_stats"].items()}
    stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / stats["ppo/returns/var"]
    return stats


def length_statistics(queries: Sequence[Any], responses: Sequence[Any]) -> dict[str, Any]:
    """Lengths in tokens: each, their mean and standard deviation."""
    stats: dict[str, Any] = {}
    for name, rows in (("queries", queries), ("responses", responses)):
        lengths = torch.tensor([float(len(row)) for row in rows])
        stats[f"tokens/{name}_len_mean"] = lengths.mean().item()
        stats[f"tokens/{name}_len_std"] = lengths.std().item()
        stats[f"tokens/{name}_dist"] = lengths.numpy()
    return stats


def rollout_arrays(rollout: Rollout, advantages_BR: Tensor) -> dict[str, Any]:
    """TRL's statistics per response (B,) and per response token (B, R), of a step that the engine did."""
    lengths = length_statistics(rollout.queries, rollout.responses)
    return {
        "objective/kl_dist": (rollout.kl_BR * rollout.mask_BR).sum(dim=1),
        "objective/logprobs": rollout.logprobs_BR,
        "objective/ref_logprobs": rollout.ref_logprobs_BR,
        "ppo/policy/advantages": advantages_BR[rollout.mask_BR].unsqueeze(0),
        **{name: value for name, value in lengths.items() if name.endswith("dist")},
    }
