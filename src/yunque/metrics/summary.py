"""One metric over many rows: mean with its interval, standard deviation, quantiles."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from yunque.metrics.bootstrap import bootstrap, finite_vector

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def summarize(values: ArrayLike) -> dict[str, Any]:
    """Mean with its 95 % bootstrap interval (10,000 resamples, seed 0), population std, quantiles, extremes, rows.

    Raises:
        InputError: no values, or one that is not finite.
    """
    vector = finite_vector(values, "summary")
    quantiles = np.quantile(vector, QUANTILES)
    return {
        **bootstrap(vector).as_dict(),
        "std": float(vector.std()),
        "quantiles": {str(share): float(value) for share, value in zip(QUANTILES, quantiles, strict=True)},
        "min": float(vector.min()),
        "max": float(vector.max()),
        "rows": len(vector),
    }
