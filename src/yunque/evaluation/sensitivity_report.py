"""What a sensitivity measurement and its search found: a table for the terminal, a plot, JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from yunque.compression.sensitivity import Change, Measured

if TYPE_CHECKING:
    from rich.table import Table

_COLOURS = ("#1f6fb4", "#d9662b", "#3c8d40", "#8757a8", "#8a8a8a")


def sensitivity_table(measured: Sequence[Measured], chosen: Mapping[str, str]) -> Table:
    """Layers by their largest KL, one line per scheme; the scheme of the plan is marked."""
    from rich import box
    from rich.table import Table

    metrics = list(measured[0].damage.greedy)
    table = Table(title="Damage of one layer alone (mean ± standard error)", box=box.SIMPLE_HEAD)
    table.add_column("Layer, scheme (*: chosen)", no_wrap=True)
    for header in ("Bytes", "Task loss (nats/token)", "KL (nats/answer)", "Answers changed"):
        table.add_column(header, justify="right")
    for metric in metrics:
        table.add_column(f"{metric} (expected)", justify="right")
        table.add_column(f"{metric} (greedy)", justify="right")
    for layer in by_damage(measured):
        for one in (each for each in measured if each.layer == layer):
            damage = one.damage
            cells = [f"{damage.num_bytes:,}", _shown(damage.nll, 4), f"{damage.kl.mean:.2g}", f"{damage.changed:.1%}"]
            for metric in metrics:
                cells += [_shown(damage.expected[metric], 3), _shown(damage.greedy[metric], 3)]
            mark = " *" if chosen.get(layer) == one.scheme else ""
            table.add_row(f"{layer} {one.scheme}{mark}", *cells)
    return table


def by_damage(measured: Sequence[Measured]) -> list[str]:
    """Names of the layers, the one with the largest KL first."""
    worst: dict[str, float] = {}
    for one in measured:
        worst[one.layer] = max(worst.get(one.layer, 0.0), one.damage.kl.mean)
    return sorted(worst, key=lambda layer: (-worst[layer], layer))


def plot_sensitivity(measured: Sequence[Measured], chosen: Mapping[str, str], path: Path) -> Path:
    """Plot the KL of every layer and scheme, and which scheme the plan gives it; returns ``path``."""
    from matplotlib.figure import Figure

    layers = by_damage(measured)[::-1]
    schemes = list(dict.fromkeys(one.scheme for one in measured))
    figure = Figure(figsize=(9, 1.4 + 0.24 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    for number, scheme in enumerate(schemes):
        points = {one.layer: one.damage.kl.mean for one in measured if one.scheme == scheme and one.damage.kl.mean > 0}
        colour = _COLOURS[number % len(_COLOURS)]
        for layer, value in points.items():
            filled = chosen.get(layer) == scheme
            axes.plot(
                value, layers.index(layer), "o", color=colour, markersize=8, fillstyle="full" if filled else "none"
            )
        axes.plot([], [], "o", color=colour, label=scheme)
    axes.set_xscale("log")
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.set(xlabel="KL from the aligned policy, this layer alone (nats per answer; filled: the plan's choice)")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    return path


def _shown(change: Change | None, digits: int) -> str:
    return "" if change is None else f"{change.mean:+.{digits}f} ± {change.error:.{digits}f}"
