"""``evaluate.load`` for toxicity and ROUGE without a hub: the same ``compute`` on local classifiers and rouge-score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from yunque.errors import InputError
from yunque.evaluation.judging import ToxicityJudge
from yunque.models.embedded import EMBEDDED, ensure_embedded

_ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def load(path: str, config_name: str | None = None, *, toxic_label: str = "hate", **_: Any) -> Toxicity | Rouge:
    """Load "toxicity", with the folder of a classifier or "embedded" as ``config_name``, or "rouge".

    Raises:
        InputError: another module, or no such classifier.
    """
    if path == "rouge":
        return Rouge()
    if path == "toxicity":
        return Toxicity(config_name or EMBEDDED, toxic_label)
    raise InputError(f"evaluate.load: {path!r} is neither 'toxicity' nor 'rouge'")


class Toxicity:
    """Probability of the toxic label; texts longer than the classifier reads are cut."""

    def __init__(self, model: str, toxic_label: str = "hate") -> None:
        self._model = str(ensure_embedded(quiet=True).reward_model) if model == EMBEDDED else model
        self._toxic_label = toxic_label
        self._judges: dict[str, ToxicityJudge] = {}

    def compute(
        self,
        *,
        predictions: Sequence[str],
        aggregation: str = "all",
        toxic_label: str | None = None,
        threshold: float = 0.5,
    ) -> dict[str, Any]:
        """Scores as {"toxicity": [...]}, or {"max_toxicity": ...} or {"toxicity_ratio": ...} by ``aggregation``."""
        label = toxic_label or self._toxic_label
        if label not in self._judges:
            judge = ToxicityJudge(self._model, label)
            judge.load(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            self._judges[label] = judge
        scores = self._judges[label].toxicity(list(predictions))
        if aggregation == "maximum":
            return {"max_toxicity": max(scores)}
        if aggregation == "ratio":
            return {"toxicity_ratio": sum(score >= threshold for score in scores) / len(scores)}
        return {"toxicity": scores}


class Rouge:
    """ROUGE by rouge-score with its own tokenizer, which keeps a-z and 0-9 only, as ``evaluate`` has it."""

    def compute(
        self,
        *,
        predictions: Sequence[str],
        references: Sequence[Any],
        rouge_types: Sequence[str] | None = None,
        use_aggregator: bool = True,
        use_stemmer: bool = False,
        tokenizer: Callable[[str], list[str]] | None = None,
    ) -> dict[str, Any]:
        """F1 by type: the bootstrap's middle value, or with ``use_aggregator=False`` one number for each row."""
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.scoring import BootstrapAggregator

        if len(predictions) != len(references):
            raise InputError(f"rouge: {len(predictions)} predictions but {len(references)} references")
        types = list(rouge_types or _ROUGE_TYPES)
        scorer = RougeScorer(types, use_stemmer=use_stemmer, tokenizer=tokenizer and _Tokenizer(tokenizer))
        rows = [
            scorer.score(reference, text) if isinstance(reference, str) else scorer.score_multi(reference, text)
            for reference, text in zip(references, predictions, strict=True)
        ]
        if not use_aggregator:
            return {name: [row[name].fmeasure for row in rows] for name in types}
        aggregator = BootstrapAggregator()
        for row in rows:
            aggregator.add_scores(row)
        return {name: score.mid.fmeasure for name, score in aggregator.aggregate().items()}


class _Tokenizer:
    def __init__(self, tokenize: Callable[[str], list[str]]) -> None:
        self.tokenize = tokenize


def label_scores(outputs: Sequence[Sequence[dict[str, Any]]], label: str) -> list[torch.Tensor]:
    """Scores of ``label`` from a text-classification pipeline's outputs, as tensors for ``PPOTrainer.step``.

    Such a pipeline sorts each text's labels by score, so a position names no label.

    Raises:
        InputError: an output lacks the label, as it does without ``top_k=None``.
    """
    scores = []
    for row, output in enumerate(outputs):
        found = {entry["label"]: entry["score"] for entry in output}
        if label not in found:
            raise InputError(
                f"label: output {row} has no {label!r} but {', '.join(found)}; call the pipeline with top_k=None"
            )
        scores.append(torch.tensor(float(found[label])))
    return scores
