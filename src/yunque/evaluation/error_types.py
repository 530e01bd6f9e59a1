"""What is wrong with single answers, by rules on their scores, as a table for error analysis."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from yunque.errors import InputError
from yunque.evaluation.evaluations import Evaluation

COLUMNS = ("run", "id", "prompt", "prediction", "reference", "error_type")


@dataclass(frozen=True)
class ErrorRules:
    """Limits of the rules, in the units that tables show.

    Raises:
        InputError: a limit that is no number.
    """

    toxicity: float = 0.5  # probability, at least
    repetition: float = 0.2  # share of 4-grams that stood there before, at least
    rougeL: float = 10.0  # the metric's name; points of 100, below: off the reference

    def __post_init__(self) -> None:
        """Check that they are numbers."""
        for each in fields(self):
            value = getattr(self, each.name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise InputError(f"errors: {each.name}: {value!r} is no limit; give a number")


DEFAULT_RULES = ErrorRules()


def error_types(evaluation: Evaluation, row: int, rules: ErrorRules = DEFAULT_RULES) -> list[str]:
    """Everything that is wrong with one answer; a score that the row lacks finds nothing.

    empty: no visible character; truncated: cut at the limit of tokens; repeated, toxic: at least the rule's limit;
    refusal: declines; format: not of the form asked for; off-reference: ROUGE-L below the rule's limit.
    """
    if not evaluation.answers[row].strip():
        return ["empty"]  # whatever else its scores say follows from that

    def score(name: str) -> float:
        return float(evaluation.scores[name][row]) if name in evaluation.scores else math.nan

    found = {
        "truncated": score("unfinished") > 0,
        "repeated": score("repetition") >= rules.repetition,
        "toxic": score("toxicity") >= rules.toxicity,
        "refusal": score("refusal") > 0,
        "format": score("format") < 1,
        "off-reference": score("rougeL") < rules.rougeL,
    }
    return [name for name, holds in found.items() if holds]


def error_table(evaluations: Mapping[str, Evaluation], rules: ErrorRules = DEFAULT_RULES) -> str:
    """CSV with a line per run, answer and error type: run, id, prompt, prediction, reference, error_type."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for run, evaluation in evaluations.items():
        for row, key in enumerate(evaluation.ids):
            reference = "\n".join(evaluation.references[row])
            texts = (evaluation.prompts[row], evaluation.answers[row], reference)
            writer.writerows((run, key, *texts, kind) for kind in error_types(evaluation, row, rules))
    return out.getvalue()


def count_errors(evaluations: Sequence[Evaluation], rules: ErrorRules = DEFAULT_RULES) -> dict[str, dict[str, int]]:
    """Answers by name of the evaluation and error type."""
    counts: dict[str, dict[str, int]] = {}
    for evaluation in evaluations:
        of_this = counts.setdefault(evaluation.name, {})
        for row in range(len(evaluation.ids)):
            for kind in error_types(evaluation, row, rules):
                of_this[kind] = of_this.get(kind, 0) + 1
    return counts
