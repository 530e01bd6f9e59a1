"""One step's responses with their scores, over all ranks: the record, its statistics, its dump for inspection."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from yunque.rl.rollout import Response


@dataclass(frozen=True)
class Scored:
    """One response: its text, the score before any scaling, the summands of it, the unseen scorer's opinion."""

    query: str
    response: Response
    text: str
    score: float
    parts: dict[str, float]
    watch: float | None


def score_statistics(batch: Sequence[Scored]) -> dict[str, float]:
    """Means and standard deviations over a batch: of the raw scores, of their summands, of the unseen scorer."""
    scores = np.array([row.score for row in batch])
    statistics = {"scores/raw_mean": float(scores.mean()), "scores/raw_std": _std(scores)}
    watched = [row.watch for row in batch if row.watch is not None]
    if len(batch[0].parts) > 1 or watched:
        for name in batch[0].parts:
            part = np.array([row.parts[name] for row in batch])
            statistics |= {f"reward/{name}/mean": float(part.mean()), f"reward/{name}/std": _std(part)}
    if watched:
        statistics |= {"watch/mean_scores": float(np.mean(watched)), "watch/std_scores": _std(np.array(watched))}
    return statistics


def dump(path: Path, batch: Sequence[Scored]) -> None:
    """Write a batch as JSON Lines: query, response, tokens, score, finished; parts and watch where there are any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in batch:
            record = {
                "query": row.query,
                "response": row.text,
                "tokens": row.response.tokens,
                "score": row.score,
                "finished": row.response.finished,
                "parts": row.parts,
                "watch": row.watch,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _std(values: np.ndarray) -> float:
    """Unbiased standard deviation, 0 for a single value."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
