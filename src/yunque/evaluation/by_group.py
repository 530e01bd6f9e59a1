"""Before and after, group by group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from yunque.evaluation.before_after import Answers, Measure, show_change
from yunque.metrics.bootstrap import paired_bootstrap

if TYPE_CHECKING:
    from rich.table import Table


def compare_groups(
    groups: Sequence[str], before: Answers, after: Answers, *, measure: Measure, seed: int
) -> dict[str, dict[str, Any]]:
    """Per group, most prompts first: prompts, and reward and measured probability with their paired changes."""
    labels = np.array(groups)
    names = sorted(set(groups), key=lambda name: (-groups.count(name), name))
    return {name: _compare(labels == name, before, after, measure, seed) for name in names}


def _compare(rows: np.ndarray, before: Answers, after: Answers, measure: Measure, seed: int) -> dict[str, Any]:
    metrics: dict[str, Any] = {"prompts": int(rows.sum())}
    columns = {
        "reward": (before.rewards, after.rewards),
        measure.name: (before.probabilities, after.probabilities),
    }
    for name, (old, new) in columns.items():
        metrics[f"{name}_before"], metrics[f"{name}_after"] = float(old[rows].mean()), float(new[rows].mean())
        metrics[f"{name}_change"] = paired_bootstrap(old[rows], new[rows], seed=seed).as_dict()
    return metrics


def group_table(metrics: dict[str, dict[str, Any]], measure: Measure) -> Table:
    """The groups' changes as a table to print."""
    from rich import box
    from rich.table import Table

    table = Table(title="By group", box=box.SIMPLE_HEAD)
    table.add_column("Group")
    for header in ("Prompts", f"{measure.name.capitalize()} before", "After", "Change [95 % interval]"):
        table.add_column(header, justify="right")
    for group, row in metrics.items():
        table.add_row(
            group,
            f"{row['prompts']:,}",
            f"{row[f'{measure.name}_before']:.3f}",
            f"{row[f'{measure.name}_after']:.3f}",
            show_change(row[f"{measure.name}_change"], "z.3f"),
        )
    return table
