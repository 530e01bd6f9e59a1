"""Time 10,000 resamples of 2,000 pairs of every metric: `python bench/compare.py`."""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np

from yunque.metrics.paired import Resampling, paired_differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=2_000)
    parser.add_argument("--metrics", type=int, default=14)
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    scores = rng.beta(0.5, 4, size=(2, options.metrics, options.pairs))
    differences = {f"metric_{number}": column for number, column in enumerate(scores[1] - scores[0])}
    seconds, cpu_seconds = [], []
    for _ in range(options.repeats):
        start, cpu = time.perf_counter(), time.process_time()
        paired_differences(differences, Resampling(options.resamples))
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {"pairs": options.pairs, "metrics": options.metrics, "resamples": options.resamples}
    print(json.dumps(result | {"best_s": min(seconds), "cpu_s": min(cpu_seconds), "peak_memory_bytes": peak_bytes}))


if __name__ == "__main__":
    main()
