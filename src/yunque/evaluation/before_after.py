"""Answers to the same prompts before and after training: metrics with paired intervals, files, tables."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from yunque.errors import InputError
from yunque.metrics.bootstrap import finite_vector, paired_bootstrap
from yunque.metrics.diversity import distinct_n
from yunque.metrics.rouge import rouge_scores

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDTH_CHARS = 100  # of the printed tables
_CELL_CHARS = 110  # of a text in them, before an ellipsis

# name of the metric, its label, its format (z: no -0.000); shown in this order where measured
_SUMMARY = (
    ("rude_words", "Rude words in all answers", ",d"),
    ("reward", "Reward (mean)", "z.3f"),
    ("rougeL", "ROUGE-L (mean F1)", "z.3f"),
    ("response_words", "Words per answer", "z.1f"),
    ("distinct_2", "Distinct pairs of words (share)", "z.3f"),
    ("kl", "KL to the reference (nats/answer)", "z.3f"),
)


@dataclass(frozen=True)
class Measure:
    """A probability that is measured of every answer beside its reward: its name in metrics and files, its label."""

    name: str
    label: str


TOXICITY = Measure("toxicity", "Toxicity")
SENTIMENT = Measure("sentiment", "Positive sentiment")


@dataclass(frozen=True)
class Answers:
    """Answers of one model, with the reward and the measured probability of each, of shape [num_prompts].

    Raises:
        InputError: unequal lengths, no answers, values that are not finite, a probability outside 0..1.
    """

    texts: list[str]
    rewards: np.ndarray
    probabilities: np.ndarray

    def __post_init__(self) -> None:
        for name in ("rewards", "probabilities"):
            vector = finite_vector(getattr(self, name), name)
            if len(vector) != len(self.texts):
                raise InputError(f"{name}: {len(vector)} values for {len(self.texts)} answers; give one per answer")
            object.__setattr__(self, name, vector)
        if self.probabilities.min() < 0 or self.probabilities.max() > 1:
            raise InputError("probabilities: give values in 0..1, not logits")


@dataclass(frozen=True)
class Row:
    """Prompt number ``prompt`` with the answers to it.

    The fields are the columns of the files, which put the measure's name for "measure".
    """

    query: str
    response_before: str
    response_after: str
    reward_before: float
    reward_after: float
    reward_difference: float
    measure_before: float
    measure_after: float
    prompt: int

    def columns(self, measure: Measure) -> dict[str, Any]:
        """The row as it stands in the files."""
        return {name.replace("measure", measure.name): value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class BeforeAfter:
    """The rows, largest gain of reward first, and the metrics over them."""

    rows: list[Row]
    metrics: dict[str, Any]
    measure: Measure = TOXICITY

    def write(self, folder: Path) -> list[Path]:
        """Write the rows to ``before_after.jsonl`` and ``before_after.csv`` in ``folder`` and return the two paths."""
        return write_rows([row.columns(self.measure) for row in self.rows], folder / "before_after")

    def print(self, console: Console, rows: int = 5) -> None:
        """Print the metrics with their 95 % intervals and the ``rows`` answers that gained most."""
        console.print(_summary_table(self.metrics, self.measure))
        if rows > 0:
            shown = [
                (row.query, row.response_before, row.response_after, row.reward_before, row.reward_after)
                for row in self.rows[:rows]
            ]
            title = f"The {len(shown)} of {len(self.rows):,} answers that gained most reward"
            headers = ("Prompt", "Before", "After", "Reward")
            print_answers(console, title, headers, shown, [row.query for row in self.rows])


def compare(
    queries: Sequence[str],
    references: Sequence[Sequence[str]] | None,
    before: Answers,
    after: Answers,
    *,
    kl: float,
    seed: int,
    measure: Measure = TOXICITY,
    rude_words: Callable[[Iterable[str]], int] | None = None,
) -> BeforeAfter:
    """Compare two models' answers to ``queries``; ``kl`` is the final mean KL to the reference in nats per answer.

    Metrics of the answers' probabilities are named after ``measure``: ``toxicity_before``, ``sentiment_before``.
    ROUGE-L is measured on the prompts that have a reference (``rougeL_prompts`` counts them) and absent if none has.

    Raises:
        InputError: not one answer before, one after and one list of references per query.
    """
    for name, column in (("before", before.texts), ("after", after.texts), ("references", references)):
        if column is not None and len(column) != len(queries):
            raise InputError(f"{name}: {len(column)} rows for {len(queries)} queries; give one per query")
    metrics: dict[str, Any] = {"num_prompts": len(queries)}
    metrics |= _change(measure.name, before.probabilities, after.probabilities, seed)
    for side, answers in (("before", before), ("after", after)):
        metrics[f"{measure.name}_std_{side}"] = float(answers.probabilities.std())
        metrics |= {f"distinct_{n}_{side}": distinct_n(answers.texts, n) for n in (1, 2)}
    metrics |= _change("reward", before.rewards, after.rewards, seed)
    metrics |= _rouge(references or [], before.texts, after.texts, seed)
    metrics |= _change("response_words", _num_words(before.texts), _num_words(after.texts), seed)
    if rude_words is not None:
        metrics |= {"rude_words_before": rude_words(before.texts), "rude_words_after": rude_words(after.texts)}
    metrics |= {"kl_before": 0.0, "kl_final": float(kl)}
    return BeforeAfter(_rows(queries, before, after), metrics, measure)


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> list[Path]:
    """Write ``rows`` (at least one) to ``path`` with .jsonl and with .csv added, and return the two paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    jsonl, table = path.with_suffix(".jsonl"), path.with_suffix(".csv")
    jsonl.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return [jsonl, table]


def _rows(queries: Sequence[str], before: Answers, after: Answers) -> list[Row]:
    gains = after.rewards - before.rewards
    return [
        Row(
            query=queries[row],
            response_before=before.texts[row],
            response_after=after.texts[row],
            reward_before=float(before.rewards[row]),
            reward_after=float(after.rewards[row]),
            reward_difference=float(gains[row]),
            measure_before=float(before.probabilities[row]),
            measure_after=float(after.probabilities[row]),
            prompt=int(row),
        )
        for row in np.argsort(-gains, kind="stable")
    ]


def _change(name: str, before: np.ndarray, after: np.ndarray, seed: int) -> dict[str, Any]:
    return {
        f"{name}_before": float(before.mean()),
        f"{name}_after": float(after.mean()),
        f"{name}_change": paired_bootstrap(before, after, seed=seed).as_dict(),
    }


def _rouge(
    references: Sequence[Sequence[str]], before: Sequence[str], after: Sequence[str], seed: int
) -> dict[str, Any]:
    given = [[text for text in row if text.strip()] for row in references]
    known = {row: texts for row, texts in enumerate(given) if texts}
    if not known:
        return {}
    targets = list(known.values())
    f1_before, f1_after = (rouge_scores([texts[row] for row in known], targets)["rougeL"] for texts in (before, after))
    return {**_change("rougeL", f1_before, f1_after, seed), "rougeL_prompts": len(known)}


def _num_words(texts: Sequence[str]) -> np.ndarray:
    return np.array([len(text.split()) for text in texts], dtype=np.float64)


def _summary_table(metrics: dict[str, Any], measure: Measure) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=f"Before and after on {metrics['num_prompts']:,} prompts", box=box.SIMPLE_HEAD)
    table.add_column("Metric")
    for header in ("Before", "After", "Change [95 % interval]"):
        table.add_column(header, justify="right")
    measured = (
        (measure.name, f"{measure.label} (mean probability)", "z.3f"),
        (f"{measure.name}_std", f"{measure.label} (standard deviation)", "z.3f"),
    )
    for name, label, spec in (*measured, *_SUMMARY):
        if f"{name}_before" in metrics:
            before, after = metrics[f"{name}_before"], metrics["kl_final" if name == "kl" else f"{name}_after"]
            change = show_change(metrics.get(f"{name}_change", {"mean": after - before}), spec)
            table.add_row(label, format(before, spec), format(after, spec), change)
    return table


def show_change(change: dict[str, Any], spec: str, sign: str = "+") -> str:
    """A mean and, where there is one, its interval; without a ``sign`` for shares and their like."""
    spec = f"{sign}{spec}"
    shown = format(change["mean"], spec)
    if "low" not in change:
        return shown
    ends = ("?" if end is None else format(end, spec) for end in (change["low"], change["high"]))
    return f"{shown} [{', '.join(ends)}]"


def print_answers(
    console: Console,
    title: str,
    headers: Sequence[str],
    rows: Sequence[tuple[str, str, str, float, float]],
    queries: Sequence[str],
) -> None:
    """Print a table of ``rows`` (query, two answers, value of each); what all ``queries`` begin with is left out."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    template_chars = common_start(queries)
    table = Table(title=title, box=box.SIMPLE_HEAD, leading=1, width=min(_WIDTH_CHARS, console.width))
    for header in headers[:3]:
        table.add_column(header, ratio=1, overflow="fold")
    table.add_column(headers[3], justify="right", no_wrap=True)
    for query, first, second, first_value, second_value in rows:
        texts = (query[template_chars:], first, second)
        values = f"{first_value:+.2f}\n→ {second_value:+.2f}"
        table.add_row(*(Text(_shorten(text)) for text in texts), values)  # Text: its brackets are not markup
    console.print(table)


def common_start(queries: Sequence[str]) -> int:
    """Characters of the lines that open every query, the template's instruction: they tell the reader nothing."""
    first, last = min(queries), max(queries)  # what the extremes of the sorted order share, all share
    if first == last:
        return 0
    pairs = zip(first.splitlines(keepends=True), last.splitlines(keepends=True), strict=False)
    return sum(len(line) for line, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _shorten(text: str) -> str:
    """``text`` on one line, without control characters, cut with an ellipsis."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= _CELL_CHARS else line[: _CELL_CHARS - 1].rstrip() + "…"
