"""The numbers that ONNX Runtime's kernels compute with, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from yunque.compression.schemes import LayerScheme


def quantize_dequantize(weight: NDArray[Any], scheme: LayerScheme) -> NDArray[np.float32]:
    """``weight`` [in, out] as the kernel of ``scheme`` sees it: quantized and back to float32."""
    raise NotImplementedError
