"""Rewards: what classifiers and reward models say of the responses, alone or in a weighted sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from yunque.data.encoding import encode
from yunque.errors import InputError
from yunque.models.adapter import ModelAdapter, pad, readable_positions
from yunque.models.decoding import length_batches
from yunque.rl.config import RewardArguments
from yunque.runtime.spec import label_indices

MULTI_LABEL = "multi_label_classification"
"""``problem_type`` of classifiers whose labels do not exclude each other."""

REWARD_MODEL = "reward_model"
"""Name of the reward model among the parts of a reward."""


Columns = Mapping[str, Sequence[Any]]
NO_COLUMNS: Columns = {}


@dataclass(frozen=True)
class RewardScores:
    """Scores of n responses: ``total`` is trained on; ``parts`` are its summands before their weights.

    All arrays are (n,). ``probabilities`` (of the measured label: toxicity, sentiment) and ``watch`` (of the unseen
    scorer) are there where measured.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    probabilities: np.ndarray | None = None
    watch: np.ndarray | None = None


class Reward(Protocol):
    """Scores responses; each response's scores depend on itself and its query alone."""

    def scores(
        self, queries: Sequence[str], responses: Sequence[str], num_tokens: Sequence[int], columns: Columns = NO_COLUMNS
    ) -> RewardScores:
        """Scores of n responses, of ``num_tokens`` tokens each, the end token included.

        ``columns`` are those of the data set: name -> one value per response.
        """
        ...


class Scorer(Protocol):
    """One summand of a reward."""

    def __call__(self, queries: Sequence[str], responses: Sequence[str], columns: Columns = NO_COLUMNS) -> np.ndarray:
        """Scores (n,), one per response."""
        ...


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
        self.max_length = readable_positions(model, tokenizer)
        self.pad_id = model.config.pad_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.pad_id  # decoder-only classifiers look for the last token before it

    @property
    def has_one_output(self) -> bool:
        """Whether the model is a reward model with a score of its own rather than a classifier with labels."""
        return self.model.config.num_labels == 1

    def label_index(self, label: str, option: str) -> int:
        """Index of a class by its name.

        Raises:
            InputError: the classifier has no such label; the message lists those it has.
        """
        labels = label_indices(self.model.config.id2label)
        if label not in labels:
            raise InputError(f"{option}: the classifier has no label {label!r}; it has {', '.join(labels)}")
        return labels[label]

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Probabilities of the labels, as ``label_probabilities``."""
        return label_probabilities(logits, multi_label=self.model.config.problem_type == MULTI_LABEL)

    @torch.no_grad()
    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """Class logits in float32, shape (texts, classes), in the order of ``texts``."""
        encoded = encode(self.tokenizer, texts)
        for row, ids in enumerate(encoded):
            if len(ids) > self.max_length:
                self.truncated_texts += 1
                encoded[row] = encode(self.tokenizer, [texts[row]], truncation=True, max_length=self.max_length)[0]
        logits = np.zeros((len(texts), self.model.config.num_labels), dtype=np.float32)
        most_rows = 1 if self.pad_id is None else self.batch_size  # what cannot be padded is read alone
        for rows in length_batches(encoded, self.device, most_rows=most_rows):
            left = self.tokenizer.padding_side == "left"
            input_ids, mask = pad([encoded[row] for row in rows], self.pad_id or 0, self.device, left=left)
            output = self.model(input_ids=input_ids, attention_mask=mask.long())
            logits[rows] = output.logits.float().cpu().numpy()
        return logits


class LabelScore:
    """Score of responses by one label of a classifier, or by the only output of a reward model."""

    def __init__(
        self, scorer: ClassifierScorer, adapter: ModelAdapter, args: RewardArguments, *, label: str, option: str
    ) -> None:
        self.scorer, self.adapter, self.args = scorer, adapter, args
        self.label = 0 if scorer.has_one_output else scorer.label_index(label, option)

    def __call__(self, queries: Sequence[str], responses: Sequence[str], columns: Columns = NO_COLUMNS) -> np.ndarray:
        """Scores (n,) in float32; other columns do not matter."""
        return self.of_logits(self.logits(queries, responses))

    def logits(self, queries: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Logits (n, classes) of queries with their responses, or of the responses alone."""
        if self.args.reward_text == "response":
            return self.scorer.logits(responses)
        pairs = zip(queries, responses, strict=True)
        return self.scorer.logits([self.adapter.join_text(query, response) for query, response in pairs])

    def of_logits(self, logits: np.ndarray) -> np.ndarray:
        """Scores (n,) from logits (n, classes): the label's logit or its probability."""
        as_logit = self.args.reward_output == "logit" or self.scorer.has_one_output
        return (logits if as_logit else self.scorer.probabilities(logits))[:, self.label]


class ClassifierReward:
    """Reward of one model, which also measures the probability of a label where it has labels.

    The measured label, ``toxicity_label``, may be another than the rewarded one. A model with one output (a reward
    model trained on pairs) scores by it and measures none.
    """

    def __init__(self, scorer: ClassifierScorer, adapter: ModelAdapter, args: RewardArguments) -> None:
        self.scorer = scorer
        self.score = LabelScore(scorer, adapter, args, label=args.reward_label, option="reward_label")
        self.measured_label: int | None = None
        if not scorer.has_one_output:
            self.measured_label = scorer.label_index(args.toxicity_label, "toxicity_label")

    def __call__(self, queries: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Rewards (n,) in float32."""
        return self.score(queries, responses)

    def scores(
        self, queries: Sequence[str], responses: Sequence[str], num_tokens: Sequence[int] | None = None
    ) -> RewardScores:
        """Rewards and probabilities from the same forward pass; the number of tokens does not matter here."""
        logits = self.score.logits(queries, responses)
        rewards = self.score.of_logits(logits)
        measured = self.measured_label
        probabilities = None if measured is None else self.scorer.probabilities(logits)[:, measured]
        return RewardScores(rewards, {REWARD_MODEL: rewards}, probabilities)


class WeightedReward:
    """Weighted sum of the reward model (if any) and further scorers, less a charge on length.

    total = sum_i weight_i * part_i - length_penalty * |tokens - length_target|. ``weights`` holds the reward model's
    first, then one per entry of ``further``. ``watch`` is scored beside them and enters no sum.
    """

    def __init__(
        self,
        args: RewardArguments,
        reward_model: ClassifierReward | None,
        further: Mapping[str, Scorer],
        weights: Sequence[float],
        watch: LabelScore | None = None,
    ) -> None:
        self.args, self.reward_model, self.further = args, reward_model, dict(further)
        self.weights, self.watch = list(weights), watch

    @property
    def measures_label(self) -> bool:
        """Whether the reward model is a classifier, which measures the probability of a label."""
        return self.reward_model is not None and self.reward_model.measured_label is not None

    @property
    def truncated_texts(self) -> int:
        """Texts that were longer than a model reads, counted once per model."""
        models = [self.reward_model, *self.further.values(), self.watch]
        return sum(model.scorer.truncated_texts for model in models if isinstance(model, ClassifierReward | LabelScore))

    def scores(
        self, queries: Sequence[str], responses: Sequence[str], num_tokens: Sequence[int], columns: Columns = NO_COLUMNS
    ) -> RewardScores:
        """Scores of n responses in float64."""
        parts: dict[str, np.ndarray] = {}
        probabilities = None
        if self.reward_model is not None:
            scored = self.reward_model.scores(queries, responses)
            parts, probabilities = scored.parts, scored.probabilities
        parts |= {name: score(queries, responses, columns) for name, score in self.further.items()}
        total = np.zeros(len(responses))
        for weight, part in zip(self.weights, parts.values(), strict=True):
            total += weight * part.astype(float)
        if self.args.length_penalty:
            excess = np.abs(np.asarray(num_tokens, dtype=float) - self.args.length_target)
            parts["length_penalty"] = -self.args.length_penalty * excess
            total += parts["length_penalty"]
        watch = None if self.watch is None else self.watch(queries, responses)
        return RewardScores(total, parts, probabilities, watch)


def label_probabilities(logits: np.ndarray, *, multi_label: bool) -> np.ndarray:
    """Probabilities (rows, labels) of logits, as training had them: by softmax, or of each label by itself."""
    if multi_label:
        return np.exp(-np.logaddexp(0.0, -logits))
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)
