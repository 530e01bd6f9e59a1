"""Plots of a training run and of the answers before and after it, as PNG files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from yunque.errors import InputError
from yunque.evaluation.before_after import BeforeAfter
from yunque.rl.watch import Parting, smoothing_window, trailing_mean

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
_WITH_VALUE_HEAD = "ppo/loss/value"  # of all panels, the only one that not every run has
_BLUE, _ORANGE = "#1f6fb4", "#d9662b"
_SMOOTHING = 0.1  # window of the running mean, as a part of the run


def plot_training(log_path: Path, folder: Path) -> list[Path]:
    """Plot a JSONL training log, one object per PPO step, and return the paths of reward, KL and loss in ``folder``.

    Steps logged twice, as after a resume, count once: the last line wins.

    Raises:
        InputError: no readable log, an empty one, a line that is no JSON object or lacks one of the numbers.
    """
    log = _read_log(log_path)
    plots = {name: [panel for panel in panels if panel[0] in log] for name, panels in _TRAINING_PLOTS.items()}
    return [_save(_training_figure(log, panels), folder / name) for name, panels in plots.items()]


def plot_before_after(before_after: BeforeAfter, folder: Path) -> Path:
    """Plot the histograms of the measure before and after into a file of its name (``toxicity.png``) in ``folder``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    measure = before_after.measure
    rows = before_after.rows
    sides = [[row.measure_before for row in rows], [row.measure_after for row in rows]]
    means = [float(np.mean(side)) for side in sides]
    labels = [f"{name} (mean {mean:.3f})" for name, mean in zip(("before", "after"), means, strict=True)]
    axes.hist(sides, bins=20, range=(0, 1), color=[_ORANGE, _BLUE], label=labels)
    for mean, color in zip(means, (_ORANGE, _BLUE), strict=True):
        axes.axvline(mean, color=color, linestyle="--", linewidth=1.2)
    axes.set(title=f"{measure.label} of the answers to {len(rows):,} prompts", xlim=(0, 1))
    axes.set(xlabel=f"{measure.label.lower()} (probability; dashed: mean)", ylabel="number of answers")
    axes.legend(frameon=False)
    _clean(axes)
    return _save(figure, folder / f"{measure.name}.png")


def plot_reward_hacking(
    steps: np.ndarray, reward: np.ndarray, watch: np.ndarray, parting: Parting | None, folder: Path
) -> Path:
    """Plot reward and watch score, each in its own standard deviations, into ``reward_hacking.png`` in ``folder``.

    The arrays are (num_steps,); the step at which the curves part, if they do, is marked. Returns the path.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    window = smoothing_window(len(steps))
    for values, color, name in ((reward, _BLUE, "reward (trained on)"), (watch, _ORANGE, "unseen scorer")):
        standard = (values - values.mean()) / (values.std() or 1.0)
        axes.plot(steps, standard, color=color, alpha=0.3, linewidth=1)
        axes.plot(steps[window - 1 :], trailing_mean(standard, window), color=color, linewidth=2, label=name)
    if parting is not None:
        axes.axvline(parting.step, color="black", linestyle="--", linewidth=1.2, label=f"parted: step {parting.step}")
    axes.set(xlabel="PPO step", ylabel=f"standard deviations of the curve\n(thick: mean of the last {window} steps)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    _clean(axes)
    return _save(figure, folder / "reward_hacking.png")


def _read_log(path: Path) -> dict[str, np.ndarray]:
    """The logged numbers by key, each of shape [num_steps], in the order of first logging."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"training log {path}: {getattr(error, 'strerror', None) or error}") from error
    keys = ["step", *(key for panels in _TRAINING_PLOTS.values() for key, _ in panels)]
    if lines and f'"{_WITH_VALUE_HEAD}"' not in lines[0]:
        keys.remove(_WITH_VALUE_HEAD)
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
