"""Plots of a training run and of the answers before and after it, as PNG files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from yunque.errors import InputError
from yunque.evaluation.before_after import BeforeAfter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# file -> panels from top to bottom: key of the log and label of the vertical axis
_TRAINING_PLOTS = {
    "reward.png": (("ppo/mean_scores", "mean reward per answer"),),
    "kl.png": (
        ("objective/kl", "KL to the reference\n(nats per answer)"),
        ("objective/kl_coef", "KL coefficient\n(reward per nat)"),
    ),
    "loss.png": (
        ("ppo/loss/total", "total loss"),
        ("ppo/loss/policy", "policy loss"),
        ("ppo/loss/value", "value loss\n(reward²)"),
    ),
}
_BLUE, _ORANGE = "#1f6fb4", "#d9662b"
_SMOOTHING = 0.1  # window of the running mean, as a part of the run


def plot_training(log_path: Path, folder: Path) -> list[Path]:
    """Plot a JSONL training log, one object per PPO step, and return the paths of reward, KL and loss in ``folder``.

    Steps logged twice, as after a resume, count once: the last line wins.

    Raises:
        InputError: no readable log, an empty one, a line that is no JSON object or lacks one of the numbers.
    """
    log = _read_log(log_path)
    return [_save(_training_figure(log, panels), folder / name) for name, panels in _TRAINING_PLOTS.items()]


def plot_before_after(before_after: BeforeAfter, folder: Path) -> Path:
    """Plot the histograms of toxicity before and after into ``toxicity.png`` in ``folder`` and return its path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    sides = [[row.toxicity_before for row in before_after.rows], [row.toxicity_after for row in before_after.rows]]
    means = [float(np.mean(side)) for side in sides]
    labels = [f"{name} (mean {mean:.3f})" for name, mean in zip(("before", "after"), means, strict=True)]
    axes.hist(sides, bins=20, range=(0, 1), color=[_ORANGE, _BLUE], label=labels)
    for mean, color in zip(means, (_ORANGE, _BLUE), strict=True):
        axes.axvline(mean, color=color, linestyle="--", linewidth=1.2)
    axes.set(title=f"Toxicity of the answers to {len(before_after.rows):,} prompts", xlim=(0, 1))
    axes.set(xlabel="toxicity (probability; dashed: mean)", ylabel="number of answers")
    axes.legend(frameon=False)
    _clean(axes)
    return _save(figure, folder / "toxicity.png")


def _read_log(path: Path) -> dict[str, np.ndarray]:
    """The logged numbers by key, each of shape [num_steps], in the order of first logging."""
    keys = ["step", *(key for panels in _TRAINING_PLOTS.values() for key, _ in panels)]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"training log {path}: {getattr(error, 'strerror', None) or error}") from error
    rows = [_read_line(line, keys, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(f"training log {path}: no steps in it")
    by_step = {row[0]: row for row in rows}
    return dict(zip(keys, np.array(list(by_step.values())).T, strict=True))


def _read_line(line: str, keys: Sequence[str], where: str) -> list[float]:
    try:
        entry: dict[str, Any] = json.loads(line)
        return [float(entry[key]) for key in keys]
    except json.JSONDecodeError as error:
        raise InputError(f"training log {where}: not valid JSON: {error}") from error
    except KeyError as error:
        raise InputError(f"training log {where}: no key {error}") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"training log {where}: expected an object of numbers: {error}") from error


def _training_figure(log: dict[str, np.ndarray], panels: Sequence[tuple[str, str]]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = log["step"]
    figure = Figure(figsize=(7, 1.4 + 2.2 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    window = 2 * round(_SMOOTHING * len(steps) / 2) + 1  # odd, so that its mean is centred
    for axes, (key, label) in zip(all_axes, panels, strict=True):
        if window == 1:
            axes.plot(steps, log[key], color=_BLUE, marker="o", markersize=3)
        else:
            axes.plot(steps, log[key], color=_BLUE, alpha=0.3, linewidth=1, label="each step")
            smooth = _running_mean(log[key], window)
            axes.plot(steps, smooth, color=_BLUE, linewidth=2, label=f"mean of {window} steps")
        axes.set_ylabel(label)
        _clean(axes)
    if window > 1:
        all_axes[0].legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    all_axes[-1].set_xlabel("PPO step")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    return figure


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean of ``window`` values, an odd number; at the ends, of those there are."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, mode="same") / np.convolve(np.ones(len(values)), kernel, mode="same")


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
