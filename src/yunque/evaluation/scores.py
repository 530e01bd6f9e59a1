"""The scores of answers: what each is called, its unit and range as shown, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Score:
    """A metric with a value per answer; files hold ``value / per_stored``, as ROUGE's 0.25 is shown as 25 points."""

    name: str
    label: str
    better: Literal["lower", "higher"] | None = None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    per_stored: float = 1.0
    digits: int = 3

    def show(self, value: float, sign: bool = False) -> str:
        """``value`` as it stands in tables, without -0."""
        return format(value, f"{'+' if sign else ''}z.{self.digits}f")


def _points(name: str, label: str, per_stored: float) -> Score:
    return Score(name, label, "higher", "points of 100", 0, 100, per_stored, digits=2)


def _share(name: str, label: str, better: Literal["lower", "higher"] | None) -> Score:
    return Score(name, label, better, "share", 0, 1)


_KINDS = {
    score.name: score
    for score in (
        Score("toxicity", "Toxicity", "lower", "probability", 0, 1),
        Score("sentiment", "Positive sentiment", "higher", "probability", 0, 1),
        _points("rouge1", "ROUGE-1", 100),
        _points("rouge2", "ROUGE-2", 100),
        _points("rougeL", "ROUGE-L", 100),
        _points("rougeLsum", "ROUGE-Lsum", 100),
        _points("bleu", "BLEU of the answer", 1),  # sacrebleu's own scale
        _share("exact_match", "Exact match", "higher"),
        _share("f1", "F1 of words", "higher"),
        Score("nll", "NLL of the reference", "lower", "nats per token", 0, digits=4),
        Score("kl", "KL from the aligned model", "lower", "nats per token", 0, digits=4),
        Score("length", "Length", None, "words", 0, digits=1),
        Score("tokens", "Tokens", None, "tokens", 0, digits=1),
        _share("repetition", "Repetition", "lower"),
        _share("distinct_1", "Distinct words", "higher"),
        _share("distinct_2", "Distinct pairs of words", "higher"),
        _share("refusal", "Refusals", "lower"),
        _share("empty", "Empty answers", "lower"),
        _share("unfinished", "Cut at the limit", "lower"),
        _share("format", "Format kept", "higher"),
        _share("agreement", "Agreement of samples", "higher"),
    )
}


def score_kind(name: str) -> Score:
    """What is known of the metric ``name``; of an unknown one, its name."""
    return _KINDS.get(name) or Score(name, name)


def in_order(names: set[str]) -> list[str]:
    """Metrics in the order of tables: the known ones as they are listed, then the others by name."""
    return [name for name in _KINDS if name in names] + sorted(names - set(_KINDS))
