"""The classifier that judges answers in an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from yunque import runtime
from yunque.data.encoding import encode
from yunque.errors import InputError
from yunque.evaluation.arguments import EvaluatedModelArguments, EvaluationArguments, HeldOutArguments
from yunque.models.embedded import EMBEDDED, ensure_embedded
from yunque.models.loading import load_classifier, load_labels
from yunque.rl.rewards import MULTI_LABEL, ClassifierScorer, label_probabilities
from yunque.runtime.spec import is_onnx, label_indices, read_spec

_OPTION = "toxicity_model_name_or_path"
_BATCH_SIZE = 16


class ToxicityJudge:
    """Probability of one label of a classifier, torch or ONNX; loaded once the model that answered has gone.

    As its training had it: by softmax over the labels, or of each label by itself (multi-label classification).

    Raises:
        InputError: no such classifier, no such label; before anything is generated.
    """

    def __init__(self, name: str, label: str) -> None:
        self.name, self.label = name, label
        self.is_onnx = is_onnx(name)
        labels, self.is_multi_label = _onnx_labels(name) if self.is_onnx else _torch_labels(name)
        if len(labels) < 2:
            raise InputError(f"{_OPTION}: {name} has one output and no labels; give a classifier")
        if label not in labels:
            raise InputError(f"toxicity_label: {name} has no label {label!r}; it has {', '.join(labels)}")
        self.index = labels[label]
        self.scorer: ClassifierScorer | None = None
        self.onnx: runtime.Classifier | None = None

    @property
    def truncated_texts(self) -> int:
        """Texts longer than the classifier reads, where that is known."""
        return 0 if self.scorer is None else self.scorer.truncated_texts

    def load(self, device: torch.device) -> None:
        """Load the classifier, if that is still to do.

        Raises:
            InputError: it has no trained head.
        """
        if self.is_onnx and self.onnx is None:
            loaded = runtime.load(self.name, threads=torch.get_num_threads())
            assert isinstance(loaded, runtime.Classifier), "its specification said so"
            self.onnx = loaded
        elif not self.is_onnx and self.scorer is None:
            parts = load_classifier(self.name, _OPTION)
            self.scorer = ClassifierScorer(*parts, batch_size=_BATCH_SIZE, device=device)

    def toxicity(self, texts: Sequence[str]) -> list[float]:
        """Probability of the label for each text; NaN for one that the tokenizer makes no tokens of."""
        read = [row for row, count in enumerate(self._num_tokens(texts)) if count]
        values = [float("nan")] * len(texts)
        if read:
            logits = self._logits([texts[row] for row in read])
            probabilities = label_probabilities(logits, multi_label=self.is_multi_label)
            for row, value in zip(read, probabilities[:, self.index].tolist(), strict=True):
                values[row] = value
        return values

    def _num_tokens(self, texts: Sequence[str]) -> list[int]:
        if self.onnx is not None:
            return [len(ids) for ids in self.onnx.encode(list(texts))]
        assert self.scorer is not None, "load the judge first"
        return [len(ids) for ids in encode(self.scorer.tokenizer, texts)]

    def _logits(self, texts: Sequence[str]) -> np.ndarray:
        if self.onnx is not None:
            return self.onnx.logits(list(texts), batch_size=_BATCH_SIZE)
        assert self.scorer is not None, "load the judge first"
        return self.scorer.logits(texts)


def _torch_labels(name: str) -> tuple[dict[str, int], bool]:
    config = load_labels(name, _OPTION)
    labels = label_indices({int(index): label for index, label in (config.id2label or {}).items()})
    return labels, config.problem_type == MULTI_LABEL


def _onnx_labels(name: str) -> tuple[dict[str, int], bool]:
    spec = read_spec(Path(name))
    if spec.kind != "classifier":
        raise InputError(f"{_OPTION}: {name} is a language model; give a classifier")
    return {label: index for index, label in enumerate(spec.labels)}, spec.independent_labels


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
    names = (args.toxicity_model_name_or_path, args.kl_model_name_or_path)
    if EMBEDDED not in (model.model_name_or_path, data.dataset_name, *names):
        return
    embedded = ensure_embedded()
    if model.model_name_or_path == EMBEDDED:
        model.model_name_or_path = str(embedded.policy)
    if data.dataset_name == EMBEDDED:
        data.dataset_name = str(embedded.dataset)
    if args.kl_model_name_or_path == EMBEDDED:
        args.kl_model_name_or_path = str(embedded.policy)
    if args.toxicity_model_name_or_path == EMBEDDED:
        args.toxicity_model_name_or_path = str(embedded.reward_model)
