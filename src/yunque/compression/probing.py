"""Teacher-forced passes that say what a changed model would answer, before it has to answer anything.

Shapes: P prompts, K answers sampled for each, N answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from yunque.errors import InputError
from yunque.models.adapter import ModelAdapter, ScoringBatch, TokenIds
from yunque.models.decoding import length_batches

_KEPT_BYTES = 1 << 30  # of the aligned policy's distributions; of the answers beyond, KL is not measured
_PASS_ROWS = 64  # answers forwarded together


@dataclass(frozen=True)
class ProbeTexts:
    """What is forced through the model, as token ids, end tokens included.

    ``references`` may be empty lists; ``greedy`` and ``sampled`` (K each) are the unchanged model's own answers, the
    latter drawn at ``temperature``. Of an answer without its end token only what there is counts.
    """

    prompts: Sequence[TokenIds]
    references: Sequence[TokenIds]
    greedy: Sequence[TokenIds]
    sampled: Sequence[Sequence[TokenIds]]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check the sizes."""
        counts = {len(answers) for answers in self.sampled}
        if not self.prompts or len(counts) != 1 or min(counts) < 2:
            raise InputError("num_answers: give at least one prompt and 2 answers to each")


@dataclass(frozen=True)
class Pass:
    """One pass: nats of each reference (P,) with their numbers of tokens, log-probabilities of the sampled answers.

    ``logprobs`` (P, K) are at the sampling temperature; ``kl`` (P,) is the mean over a prompt's answers, in nats per
    answer, from the first pass, NaN where not measured; ``kept`` (P,) says that greedy decoding would give the same.
    """

    nats: np.ndarray
    logprobs: np.ndarray
    kl: np.ndarray
    kept: np.ndarray


class Probe:
    """Forces the texts through ``model`` as it is now; what it was at the beginning is what is compared with."""

    def __init__(self, model: Any, adapter: ModelAdapter, texts: ProbeTexts, device: torch.device) -> None:
        self.model, self.adapter, self.texts, self.device = model, adapter, texts, device
        self.num_answers = len(texts.sampled[0])
        self.first: list[Tensor] = []  # log-probabilities (N, V) of each batch's sampled tokens, unchanged model
        self.batches = list(length_batches(texts.prompts, device, most_rows=max(1, _PASS_ROWS // self.num_answers)))
        self.unchanged = self._run(keep=True)

    def __call__(self) -> Pass:
        """Pass the texts through the model as it is now."""
        return self._run(keep=False)

    @torch.no_grad()
    def _run(self, *, keep: bool) -> Pass:
        count, texts = len(self.texts.prompts), self.texts
        nats, kl = np.zeros(count), np.full(count, np.nan)
        logprobs, kept = np.zeros((count, self.num_answers)), np.ones(count, dtype=bool)
        for number, rows in enumerate(self.batches):
            logits, tokens, owners = self._forward(rows)
            plain = logits.log_softmax(dim=-1)
            chosen = plain.gather(1, tokens[:, None])[:, 0].double().cpu().numpy()
            row, kind = np.array(rows)[owners // self._stride], owners % self._stride
            np.add.at(nats, row[kind == 0], -chosen[kind == 0])
            wrong = (logits.argmax(dim=-1) != tokens).cpu().numpy() & (kind == 1)
            kept[row[wrong]] = False
            sampled = kind >= 2
            chosen_rows = torch.from_numpy(sampled).to(logits.device)
            drawn = logits[chosen_rows]
            if texts.temperature != 1.0:
                drawn = drawn / texts.temperature
            drawn = drawn.log_softmax(dim=-1)
            own = drawn.gather(1, tokens[chosen_rows][:, None])[:, 0].double().cpu().numpy()
            np.add.at(logprobs, (row[sampled], kind[sampled] - 2), own)
            if keep and sum(part.nbytes for part in self.first) + drawn.nbytes <= _KEPT_BYTES:
                self.first.append(drawn)
            if number < len(self.first):
                kl[rows] = 0.0
                before = self.first[number]
                per_token = (before.exp() * (before - drawn)).sum(dim=-1).double().cpu().numpy()
                np.add.at(kl, row[sampled], per_token / self.num_answers)
        return Pass(nats, logprobs, kl, kept)

    @property
    def _stride(self) -> int:
        """Texts of a prompt: its reference, its greedy answer, the sampled ones."""
        return 2 + self.num_answers

    def _forward(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, np.ndarray]:
        """Float32 logits (N, V) of all tokens of the texts of ``rows``, these tokens (N,), and their texts' numbers."""
        texts = self.texts
        forced = [text for row in rows for text in (texts.references[row], texts.greedy[row], *texts.sampled[row])]
        batch = self._scoring_batch(rows, forced)
        logits, _ = self.adapter.score(self.model, batch)
        mask = batch.mask_BR
        owners = mask.nonzero()[:, 0].cpu().numpy()
        return logits[mask].float(), batch.response_BR[mask], owners

    def _scoring_batch(self, rows: Sequence[int], forced: Sequence[TokenIds]) -> ScoringBatch:
        """The texts after their prompts; an encoder reads each prompt once for all of them."""
        prompts = [self.texts.prompts[row] for row in rows for _ in range(self._stride)]
        batch = self.adapter.scoring_batch(prompts, forced, self.device)
        if not self.adapter.config.is_encoder_decoder:
            return batch
        once = self.adapter.generation_inputs([self.texts.prompts[row] for row in rows], self.device)
        states = self.model.get_encoder()(**once).last_hidden_state.repeat_interleave(self._stride, dim=0)
        inputs = {name: value for name, value in batch.inputs.items() if name != "input_ids"}
        inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=states)  # type: ignore[assignment]
        return ScoringBatch(inputs, batch.response_BR, batch.mask_BR)


# --- estimators -------------------------------------------------------------------------------------------------------


def expected_changes(log_ratios: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Estimates (P,) of how far each prompt's expected score moves, from answers of the unchanged model alone.

    E_q[r] - E_p[r] = E_p[(q/p - 1)(r - b)], unbiased, b being the mean score of the prompt's other answers, which are
    independent of this one (a leave-one-out control variate). ``log_ratios`` log q - log p and ``scores`` r: (P, K).
    """
    return (np.expm1(log_ratios) * _advantages(scores)).mean(axis=1)


def first_order_changes(log_ratios: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The same to first order in log q - log p, E_p[(log q - log p)(r - b)]: less noise, and biased for large steps."""
    return (log_ratios * _advantages(scores)).mean(axis=1)


def effective_share(log_ratios: np.ndarray) -> float:
    """Effective number of answers behind ``expected_changes`` as a share of all: (sum w)² / (n sum w²), w = q/p."""
    shifted = np.exp(log_ratios - log_ratios.max())
    return float(shifted.sum() ** 2 / (shifted.size * (shifted**2).sum()))


def _advantages(scores: np.ndarray) -> np.ndarray:
    count = scores.shape[1]
    others = (scores.sum(axis=1, keepdims=True) - scores) / (count - 1)
    return scores - others
