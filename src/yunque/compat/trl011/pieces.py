"""The pieces of TRL 0.11's PPO step as methods of their own, in its layout of tensors.

Shapes: B samples, T tokens of the longest padded model input. Slot t of a (B, T-1) array belongs to token t+1. The
numbers come from ``yunque.rl``; with ``strict`` they are TRL's where the two differ.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import kl_div

from yunque.compat.trl011.config import KL_ESTIMATORS, PPOConfig
from yunque.compat.trl011.core import (
    entropy_from_logits,
    flatten_dict,
    logprobs_from_logits,
    masked_mean,
    masked_var,
    masked_whiten,
)
from yunque.rl.advantages import gae, whitened_gae
from yunque.rl.kl import KLController, kl_per_token
from yunque.rl.losses import policy_loss, value_loss


class PPOPieces:
    """What a PPO step is made of; ``step_by_pieces`` puts them together."""

    config: PPOConfig
    kl_ctl: KLController
    accelerator: Any
    optimizer: Any
    model: Any
    tokenizer: Any
    data_collator: Any
    is_encoder_decoder: bool
    current_device: torch.device

    def prepare_model_inputs(self, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> dict[str, Tensor]:
        """Pad to the model's inputs: query and response joined, or the query to encode and the response to decode.

        A response without the decoder's start token gets it, unless ``strict``.
        """
        if not self.is_encoder_decoder:
            return self._padded([torch.cat(pair) for pair in zip(queries, responses, strict=True)])
        if not self.config.strict:
            responses = [self._with_start(response) for response in responses]
        decoder = self._padded(responses)
        return self._padded(queries) | {f"decoder_{name}": tensor for name, tensor in decoder.items()}

    def batched_forward_pass(
        self,
        model: Any,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        model_inputs: Mapping[str, Tensor],
        return_logits: bool = False,
        response_masks: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Log-probabilities, logits (B, T-1, V) if asked for, values and mask, all but the logits (B, T-1).

        Runs in eval mode, ``mini_batch_size`` rows at a time.
        """
        model.eval()
        size, parts = self.config.mini_batch_size, []
        for start in range(0, len(queries), size):
            rows = slice(start, start + size)
            inputs = {name: tensor[rows] for name, tensor in model_inputs.items()}
            ids, attention = (inputs[self._prefix + name] for name in ("input_ids", "attention_mask"))
            with self.accelerator.autocast():
                logits, _, values = model(**inputs, **self._positions(model, inputs))
            mask = self._response_mask(attention, queries[rows], responses[rows])
            if response_masks is not None:
                mask = _switch_off(mask, response_masks[rows])
            logprobs = logprobs_from_logits(logits[:, :-1], ids[:, 1:])
            parts.append((logprobs, logits[:, :-1] if return_logits else None, values[:, :-1], mask))
        all_logprobs, all_logits, all_values, all_masks = (list(column) for column in zip(*parts, strict=True))
        joined = torch.cat(all_logits) if return_logits else None
        return torch.cat(all_logprobs), joined, torch.cat(all_values), torch.cat(all_masks)

    def compute_rewards(
        self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards, their part without the scores, and KL, all (B, T-1), from scores (B,) and log-probabilities.

        The score goes to the last slot where the mask is 1. Log-probabilities are (B, T-1, V) for the full KL.

        Raises:
            ValueError: a mask leaves nothing of a response.
        """
        empty = (~masks.bool().any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"responses: the mask leaves no token of sample {empty[0]} to reward")
        kls = self._kl_penalty(logprobs, ref_logprobs)
        non_score_rewards = -self.kl_ctl.value * kls
        last = (torch.arange(masks.shape[1], device=masks.device) * masks).argmax(dim=1)
        rewards = non_score_rewards.clone()
        rewards[torch.arange(len(scores), device=scores.device), last] += scores
        return rewards, non_score_rewards, kls

    def _kl_penalty(self, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
        """KL of each token, by the estimator ``kl_penalty``."""
        if self.config.kl_penalty == "full":
            return kl_div(ref_logprob, logprob, log_target=True, reduction="none").sum(dim=-1)
        return kl_per_token(KL_ESTIMATORS[self.config.kl_penalty], logprob, ref_logprob)

    def compute_advantages(self, values: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values where the mask is 1, whitened advantages, and returns, all (B, T-1).

        ``strict`` lets whitened rewards of the padding, no longer 0, flow back into the response.
        """
        values, discounts = values * mask, {"gamma": self.config.gamma, "lam": self.config.lam}
        if not (self.config.strict and self.config.whiten_rewards):
            whiten = self.config.whiten_rewards
            advantages, returns = whitened_gae(values, rewards, mask, whiten_rewards=whiten, **discounts)
            return values, advantages, returns
        leaking = masked_whiten(rewards * mask, mask, shift_mean=False)
        advantages, returns = gae(values, leaking, torch.ones_like(mask), **discounts)
        return values, masked_whiten(advantages, mask), returns

    def loss(
        self,
        old_logprobs: Tensor,
        values: Tensor,
        logits: Tensor,
        vpreds: Tensor,
        logprobs: Tensor,
        mask: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Policy loss, ``vf_coef`` times value loss, both means over the mask, and statistics; tensors are (B, T-1).

        ``strict`` multiplies both losses by 0 where the mean ratio is above ``ratio_threshold``.
        """
        policy = policy_loss(logprobs, old_logprobs, advantages, self.config.cliprange)
        value = value_loss(vpreds, values, returns, self.config.cliprange_value)
        policy_mean, value_mean = masked_mean(policy.per_token_BR, mask), masked_mean(value.per_token_BR, mask)
        ratio = (logprobs - old_logprobs).exp()
        if self._ran_away(ratio, mask) and self.config.strict:
            policy_mean, value_mean = policy_mean * 0, value_mean * 0
        stats = {
            "loss": {
                "policy": policy_mean,
                "value": value_mean,
                "total": policy_mean + self.config.vf_coef * value_mean,
            },
            "policy": {
                "entropy": masked_mean(entropy_from_logits(logits), mask),
                "approxkl": 0.5 * masked_mean((logprobs - old_logprobs).square(), mask),
                "policykl": masked_mean(old_logprobs - logprobs, mask),
                "clipfrac": masked_mean(policy.clipped_BR.float(), mask),
                "advantages": advantages,
                "advantages_mean": masked_mean(advantages, mask),
                "ratio": ratio,
            },
            "returns": {"mean": masked_mean(returns, mask), "var": masked_var(returns, mask)},
            "val": {
                "vpred": masked_mean(vpreds, mask),
                "error": masked_mean((vpreds - returns).square(), mask),
                "clipfrac": masked_mean(value.clipped_BR.float(), mask),
                "mean": masked_mean(values, mask),
                "var": masked_var(values, mask),
            },
        }
        detached = {name: number.detach() for name, number in flatten_dict(stats).items()}
        return policy_mean, self.config.vf_coef * value_mean, detached

    def _ran_away(self, ratio: Tensor, mask: Tensor) -> bool:
        """Whether the mean ratio of a minibatch is above ``ratio_threshold``."""
        mean = masked_mean(ratio, mask).item()
        if mean <= self.config.ratio_threshold:
            return False
        warnings.warn(
            f"the mean ratio {mean:.2f} is above ratio_threshold: minibatch skipped", UserWarning, stacklevel=3
        )
        return True

    # --- inputs ---

    @property
    def _prefix(self) -> str:
        return "decoder_" if self.is_encoder_decoder else ""

    def _padded(self, rows: Sequence[Tensor]) -> dict[str, Tensor]:
        batch = self.data_collator([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows])
        return {name: batch[name].to(self.current_device) for name in ("input_ids", "attention_mask")}

    def _positions(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Positions that leave padding on the left out: without them, learned ones (GPT-2) would count it."""
        attention = inputs["attention_mask"]
        if self.config.strict or self.is_encoder_decoder or bool(attention[:, 0].all()):
            return {}
        language_model = self.accelerator.unwrap_model(model).pretrained_model
        if isinstance(language_model, PeftModel):
            language_model = language_model.get_base_model()
        if "position_ids" not in inspect.signature(language_model.forward).parameters:
            return {}
        return {"position_ids": (attention.cumsum(dim=1) - 1).clamp(min=0)}

    def _response_mask(self, attention: Tensor, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor:
        """Slots (B, T-1) of response tokens.

        ``strict`` leaves the first generated token of encoder-decoder models out, as TRL did.
        """
        slots = torch.arange(attention.shape[1] - 1, device=attention.device)
        first = attention.argmax(dim=1)  # of what is not padding
        if self.is_encoder_decoder:
            start = torch.ones_like(first) if self.config.strict else first
            end = attention.sum(dim=1) - 1 + (0 if self.config.strict else first)
        else:
            start = first + torch.tensor([len(query) - 1 for query in queries], device=first.device)
            end = start + torch.tensor([len(response) for response in responses], device=first.device)
        mask = (slots >= start.unsqueeze(1)) & (slots < end.unsqueeze(1))
        return mask.to(attention.dtype) * attention[:, 1:]

    # --- the decoder's start token ---

    def _start_token(self) -> int:
        return self.accelerator.unwrap_model(self.model).config.decoder_start_token_id

    def _without_start(self, response: Tensor) -> Tensor:
        """The response without the decoder's start token that ``generate`` puts first.

        BART and its kin start with their end token: alone it is an empty answer, not a start.
        """
        start = self._start_token()
        begins = len(response) > 0 and int(response[0]) == start
        return response[1:] if begins and (len(response) > 1 or start != self.tokenizer.eos_token_id) else response

    def _with_start(self, response: Tensor) -> Tensor:
        return torch.cat([response.new_tensor([self._start_token()]), self._without_start(response)])


def _switch_off(mask: Tensor, response_masks: Sequence[Tensor]) -> Tensor:
    """Clear slots (B, T-1) of a response mask by a list of per-token masks, aligned with the response's end."""
    mask = mask.clone()
    for row, tokens in zip(mask, response_masks, strict=True):
        slots = row.nonzero().flatten()
        row[slots] *= tokens[len(tokens) - len(slots) :].to(row)
    return mask
