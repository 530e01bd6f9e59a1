"""Simulate how often the reward hacking watch flags a run, rightly and wrongly: `python bench/hacking_watch.py`.

Both curves carry noise of standard deviation 1 in every step, beside the trend that the column names.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from yunque.rl.watch import find_parting


def trends(steps: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Names of the kinds of runs, with the trend of the reward and of the watch score."""
    flat = np.zeros(steps)
    rise = np.linspace(0, 1, steps)
    peak = 0.5 - np.abs(rise - 0.5)  # up to the middle of the run and down again
    yield "both noise", flat, flat
    yield "reward rises by 20, watch noise", 20 * rise, flat
    yield "watch falls by 6, reward noise", flat, -6 * rise
    yield "both rise by 6", 6 * rise, 6 * rise
    yield "found: reward up 6, watch up and down 3", 6 * rise, 6 * peak
    yield "found: reward up 10, watch up and down 5", 10 * rise, 10 * peak


def share_of_flags(reward: np.ndarray, watch: np.ndarray, runs: int) -> float:
    """Share of runs in which the curves are said to have parted."""
    rng = np.random.default_rng(0)
    steps = np.arange(len(reward))
    noise = (rng.normal(size=(2, len(steps))) for _ in range(runs))
    return float(np.mean([find_parting(reward + one, watch + other, steps) is not None for one, other in noise]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 60, 100, 200])
    parser.add_argument("--runs", type=int, default=1_000)
    options = parser.parse_args()
    names = [name for name, _, _ in trends(2)]
    print(f"| steps | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for steps in options.steps:
        shares = [share_of_flags(reward, watch, options.runs) for _, reward, watch in trends(steps)]
        print(f"| {steps} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main()
