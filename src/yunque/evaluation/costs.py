"""What a model costs, as its evaluation measured it: bytes, start, memory, latency, throughput."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from yunque.evaluation.evaluations import Evaluation, settings_value


@dataclass(frozen=True)
class Cost:
    """A cost by name; files hold ``value * scale`` of the shown unit."""

    name: str
    label: str
    unit: str
    scale: float = 1.0
    digits: int = 0

    def show(self, value: float | None) -> str:
        """``value`` as stored, in the shown unit; a dash where there is none."""
        return "-" if value is None else f"{value / self.scale:,.{self.digits}f}"


BYTES = Cost("bytes", "On disk", "MB", 1e6, 2)
FIRST_TOKEN = Cost("first_token_s", "First token", "ms", 1e-3, 1)
_FIXED = (
    BYTES,
    Cost("start_s", "Start", "s", digits=2),
    Cost("load_s", "Load", "s", digits=2),
    Cost("peak_memory_bytes", "Peak memory", "MB", 1e6),
    FIRST_TOKEN,
)


def costs_of(evaluation: Evaluation) -> dict[str, float | None]:
    """The costs by name, those of a fresh process as far as it was measured; throughputs are tokens_per_s_SIZE."""
    model = evaluation.settings["model"]
    size = model.get("bytes")
    fresh = settings_value(evaluation.settings, "speed", "fresh_process") or {}
    costs: dict[str, float | None] = {"bytes": size + (model.get("base_bytes") or 0) if size else None}
    costs |= {cost.name: fresh.get(cost.name) for cost in _FIXED if cost is not BYTES}
    return costs | {f"tokens_per_s_{number}": rate for number, rate in _rates(evaluation).items()}


def _rates(evaluation: Evaluation) -> dict[str, float]:
    found: dict[str, Any] = settings_value(evaluation.settings, "speed", "fresh_process", "tokens_per_s") or {}
    return found


def kinds(evaluations: Sequence[Evaluation]) -> list[Cost]:
    """The costs that any of the evaluations knows, in the order of tables."""
    sizes = sorted({int(number) for each in evaluations for number in _rates(each)})
    every = [*_FIXED, *(Cost(f"tokens_per_s_{size}", f"Batch {size}", "tokens/s") for size in sizes)]
    known = [costs_of(each) for each in evaluations]
    return [cost for cost in every if any(costs.get(cost.name) is not None for costs in known)]


def measured(evaluations: Sequence[Evaluation]) -> bool:
    """Whether any model was measured in a process of its own, or against the aligned model."""
    return any(settings_value(each.settings, "speed", "fresh_process") or "kl" in each.scores for each in evaluations)


def largest_batch(evaluations: Sequence[Evaluation]) -> str | None:
    """The name of the throughput at the largest batch that all models were measured at."""
    common = set.intersection(*(set(_rates(each)) for each in evaluations))
    return f"tokens_per_s_{max(common, key=int)}" if common else None
