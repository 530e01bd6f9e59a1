"""Scores of answers: one number per row and metric, and what they come to over all rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from yunque.errors import InputError
from yunque.metrics.bleu import corpus_bleu, sentence_bleu
from yunque.metrics.diversity import distinct_n
from yunque.metrics.formats import Check, compliance
from yunque.metrics.refusals import refusals
from yunque.metrics.repetition import distinct_share, repetition
from yunque.metrics.rouge import rouge_scores
from yunque.metrics.short_answers import exact_match, token_f1
from yunque.metrics.summary import summarize

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")

SCALE = {
    **dict.fromkeys((*ROUGE, "exact_match", "f1", "toxicity", "format", "refusal", "repetition"), 1),
    **dict.fromkeys(("distinct_1", "distinct_2", "empty", "unfinished", "agreement"), 1),
    **dict.fromkeys(("corpus_distinct_1", "corpus_distinct_2"), 1),
    **dict.fromkeys(("bleu", "corpus_bleu"), 100),
}
"""Top of each bounded metric's range: 1 for fractions, 100 for points."""

UNITS = {
    "nll": "nats per token of the reference",
    "kl": "nats per token of the aligned model's answer",
    "length": "words",
    "tokens": "tokens",
}
"""Of the metrics without a range."""


@dataclass
class AnsweredRow:
    """One row with its answer; ``samples`` are all texts of a vote and ``agreement`` the winner's share of them."""

    position: int
    id: str
    prompt: str
    references: list[str]
    answer: str
    tokens: int
    finished: bool
    nats: float | None = None
    reference_tokens: int | None = None
    reference_cut: int = 0
    toxicity: float | None = None
    kl: float | None = None
    samples: list[str] | None = None
    agreement: float | None = None
    scores: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The row as it stands in generations.jsonl; what there is not is left out."""
        given = {
            "id": self.id,
            "prompt": self.prompt,
            "reference": self.references[0] if self.references else None,
            "references": self.references if len(self.references) > 1 else None,
            "answer": self.answer,
            "samples": self.samples,
            "tokens": self.tokens,
            "finished": self.finished,
            "scores": self.scores,
        }
        return {name: value for name, value in given.items() if value is not None}


def score(rows: Sequence[AnsweredRow], checks: Sequence[Check]) -> tuple[dict[str, Any], list[str]]:
    """Fill the rows' ``scores``; metrics over all rows (a summary or one number each) and notes for the reader.

    A score that is not finite is left out of its row and of the summary, and noted.

    Raises:
        InputError: a metric that is finite for no row.
    """
    notes: list[str] = []
    columns = answer_scores(rows, checks)
    metrics: dict[str, Any] = {}
    for name, values in columns.items():
        present = [value for value in values if value is not None]
        finite = [value for value in present if math.isfinite(value)]
        if not finite:
            raise InputError(
                f"{name}: none of the {len(present)} answers got a finite score; check the model behind it"
            )
        if len(finite) < len(present):
            notes.append(f"{name}: {len(present) - len(finite)} of {len(present)} scores are not finite and left out")
        metrics[name] = summarize(finite)
        for row, value in zip(rows, values, strict=True):
            if value is not None and math.isfinite(value):
                row.scores[name] = float(value)
    metrics |= _corpus_numbers(rows)
    if empty := sum(not row.answer for row in rows):
        notes.append(f"{empty} of {len(rows)} answers are empty; they score 0 against references")
    if unfinished := sum(not row.finished for row in rows):
        notes.append(f"{unfinished} of {len(rows)} answers were cut at max_new_tokens")
    if cut := sum(row.reference_cut > 0 for row in rows):
        notes.append(f"nll: {cut} references were cut to what the model reads")
    if not any(row.references for row in rows):
        notes.append("no references: ROUGE, BLEU, exact match, F1, nll and perplexity are left out")
    return metrics, notes


Column = Sequence[float | None]


def answer_scores(rows: Sequence[AnsweredRow], checks: Sequence[Check]) -> dict[str, Column]:
    """The score of every row by each metric, None where a row has none."""
    return _text_columns(rows, checks) | _reference_columns(rows) | _model_columns(rows)


def _text_columns(rows: Sequence[AnsweredRow], checks: Sequence[Check]) -> dict[str, Column]:
    texts = [row.answer for row in rows]
    columns: dict[str, Column] = {
        "length": [float(len(text.split())) for text in texts],
        "tokens": [float(row.tokens) for row in rows],
        "repetition": repetition(texts).tolist(),
        "distinct_1": distinct_share(texts, 1).tolist(),
        "distinct_2": distinct_share(texts, 2).tolist(),
        "refusal": refusals(texts).tolist(),
        "empty": [float(not text) for text in texts],
        "unfinished": [float(not row.finished) for row in rows],
    }
    if checks:
        columns["format"] = compliance(texts, checks).tolist()
    return columns


def _reference_columns(rows: Sequence[AnsweredRow]) -> dict[str, Column]:
    known = [number for number, row in enumerate(rows) if row.references]
    if not known:
        return {}
    texts, references = [rows[number].answer for number in known], [rows[number].references for number in known]
    measured = {
        **rouge_scores(texts, references, ROUGE),
        "bleu": sentence_bleu(texts, references),
        "exact_match": exact_match(texts, references),
        "f1": token_f1(texts, references),
    }
    columns: dict[str, Column] = {}
    for name, values in measured.items():
        by_row = dict(zip(known, values.tolist(), strict=True))
        columns[name] = [by_row.get(number) for number in range(len(rows))]
    return columns


def _model_columns(rows: Sequence[AnsweredRow]) -> dict[str, Column]:
    columns: dict[str, Column] = {
        "nll": [
            None if row.nats is None or not row.reference_tokens else row.nats / row.reference_tokens for row in rows
        ],
        "toxicity": [row.toxicity for row in rows],
        "kl": [row.kl for row in rows],
        "agreement": [row.agreement for row in rows],
    }
    return {name: values for name, values in columns.items() if any(value is not None for value in values)}


def _corpus_numbers(rows: Sequence[AnsweredRow]) -> dict[str, float]:
    texts = [row.answer for row in rows]
    numbers = {f"corpus_distinct_{n}": distinct_n(texts, n) for n in (1, 2)}
    known = [row for row in rows if row.references]
    if known:
        numbers["corpus_bleu"] = corpus_bleu([row.answer for row in known], [row.references for row in known])
    losses = [(row.nats, row.reference_tokens) for row in rows if row.nats is not None and math.isfinite(row.nats)]
    if losses:
        nats, tokens = (np.array(column, dtype=np.float64).sum() for column in zip(*losses, strict=True))
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(nats / tokens))
        if math.isfinite(perplexity):
            numbers["perplexity"] = perplexity
    return numbers
