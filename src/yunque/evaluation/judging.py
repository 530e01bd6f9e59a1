"""The classifier that judges answers in an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from yunque.errors import InputError
from yunque.evaluation.arguments import EvaluatedModelArguments, EvaluationArguments, HeldOutArguments
from yunque.models.arguments import ModelArguments
from yunque.models.embedded import EMBEDDED, ensure_embedded
from yunque.models.loading import load_classifier, load_config
from yunque.rl.rewards import ClassifierScorer, softmax

_BATCH_SIZE = 16


class ToxicityJudge:
    """Probability of one label of a classifier; loaded when it is needed, after the model that answered has gone.

    Raises:
        InputError: no such classifier, no such label; before anything is generated.
    """

    def __init__(self, name: str, label: str) -> None:
        self.name, self.label = name, label
        try:
            config = load_config(name, ModelArguments(model_name_or_path=name))
        except InputError as error:
            raise InputError(f"toxicity_{error}") from error
        labels = {str(known): int(index) for index, known in (config.id2label or {}).items()}
        if len(labels) < 2:
            raise InputError(f"toxicity_model_name_or_path: {name} has one output and no labels; give a classifier")
        if label not in labels:
            raise InputError(f"toxicity_label: {name} has no label {label!r}; it has {', '.join(labels)}")
        self.index = labels[label]
        self.scorer: ClassifierScorer | None = None

    def load(self, device: torch.device) -> None:
        """Load the classifier, if that is still to do.

        Raises:
            InputError: it has no trained head.
        """
        if self.scorer is None:
            loaded = load_classifier(self.name, "toxicity_model_name_or_path")
            self.scorer = ClassifierScorer(*loaded, batch_size=_BATCH_SIZE, device=device)

    def toxicity(self, texts: Sequence[str]) -> list[float]:
        """Probability of the label for each text; NaN for one that the tokenizer makes no tokens of."""
        assert self.scorer is not None, "load the judge first"
        encoded = self.scorer.tokenizer(list(texts), verbose=False)["input_ids"]
        read = [row for row, ids in enumerate(encoded) if ids]
        values = [float("nan")] * len(texts)
        if read:
            probabilities = softmax(self.scorer.logits([texts[row] for row in read]))[:, self.index]
            for row, value in zip(read, probabilities.tolist(), strict=True):
                values[row] = value
        return values


def judge_of(args: EvaluationArguments) -> ToxicityJudge | None:
    """The judge that ``args`` names, if any.

    Raises:
        InputError: as ``ToxicityJudge``.
    """
    name = args.toxicity_model_name_or_path
    return None if name is None else ToxicityJudge(name, args.toxicity_label)


def embed(model: EvaluatedModelArguments, data: HeldOutArguments, args: EvaluationArguments) -> None:
    """Put the paths of the embedded default where the arguments say "embedded".

    Raises:
        InputError: the cache folder cannot be written.
    """
    if EMBEDDED not in (model.model_name_or_path, data.dataset_name, args.toxicity_model_name_or_path):
        return
    embedded = ensure_embedded()
    if model.model_name_or_path == EMBEDDED:
        model.model_name_or_path = str(embedded.policy)
    if data.dataset_name == EMBEDDED:
        data.dataset_name = str(embedded.dataset)
    if args.toxicity_model_name_or_path == EMBEDDED:
        args.toxicity_model_name_or_path = str(embedded.reward_model)
