"""Rewards: what a classifier says of the responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from yunque.errors import InputError
from yunque.models.adapter import ModelAdapter
from yunque.rl.config import RewardArguments


class ClassifierScorer:
    """Logits of a sequence classifier for texts, batched by length, on a device of its own."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, *, batch_size: int, device: torch.device) -> None:
        self.model = model.eval()
        self.model.to(device)
        self.tokenizer = tokenizer
        # the end of the text holds the response: a text that is too long loses its beginning, and is counted
        self.tokenizer.truncation_side = "left"
        self.batch_size = batch_size
        self.device = device
        self.truncated_texts = 0
        self.max_length = _max_length(model, tokenizer)

    def label_index(self, label: str, option: str) -> int:
        """Index of a class by its name.

        Raises:
            InputError: the classifier has no such label; the message lists those it has.
        """
        labels = {str(name): int(index) for index, name in self.model.config.id2label.items()}
        if label not in labels:
            raise InputError(f"{option}: the classifier has no label {label!r}; it has {', '.join(labels)}")
        return labels[label]

    @torch.no_grad()
    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """Class logits in float32, shape (texts, classes), in the order of ``texts``."""
        encoded = self.tokenizer(list(texts), add_special_tokens=True)["input_ids"]
        lengths = np.array([len(ids) for ids in encoded])
        self.truncated_texts += int((lengths > self.max_length).sum())
        order = np.argsort(lengths, kind="stable")
        logits = np.zeros((len(texts), self.model.config.num_labels), dtype=np.float32)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = self.tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.device)
            batch.pop("token_type_ids", None)
            logits[rows] = self.model(**batch).logits.float().cpu().numpy()
        return logits


class ClassifierReward:
    """Reward of a response: the classifier's logit or probability of one label, for query and response or either."""

    def __init__(self, scorer: ClassifierScorer, adapter: ModelAdapter, args: RewardArguments) -> None:
        self.scorer, self.adapter, self.args = scorer, adapter, args
        self.label = scorer.label_index(args.reward_label, "reward_label")
        self.toxic_label = scorer.label_index(args.toxicity_label, "toxicity_label")

    def __call__(self, queries: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Rewards in float32, one per response."""
        return self.scores(queries, responses)[0]

    def scores(self, queries: Sequence[str], responses: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Rewards, and probabilities of the toxic label, one of each per response."""
        logits = self.scorer.logits(self._texts(queries, responses))
        probabilities = softmax(logits)
        rewards = logits if self.args.reward_output == "logit" else probabilities
        return rewards[:, self.label], probabilities[:, self.toxic_label]

    def _texts(self, queries: Sequence[str], responses: Sequence[str]) -> list[str]:
        if self.args.reward_text == "response":
            return list(responses)
        return [self.adapter.join_text(query, response) for query, response in zip(queries, responses, strict=True)]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (rows, classes) of logits (rows, classes)."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _max_length(model: PreTrainedModel, tokenizer: Any) -> int:
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    # RoBERTa counts positions from pad_token_id + 1, so that many of its embeddings are never reached
    offset = model.config.pad_token_id + 1 if model.config.model_type in ("roberta", "xlm-roberta") else 0
    return min(positions - offset, tokenizer.model_max_length)
