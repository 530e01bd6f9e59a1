"""How long a text a model reads: its positions, and what rotary scaling makes of them."""

from __future__ import annotations

from typing import Any


def position_limit(config: Any) -> int | None:
    """Positions of a text; None where the configuration names none.

    transformers computes rotary embeddings at any position. ``linear`` and ``yarn`` scaling by a factor are made for
    factor times the original positions, which may be more than ``max_position_embeddings``: model cards leave that at
    the original.
    """
    most: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if most and rope.get("rope_type") in ("linear", "yarn"):
        original = rope.get("original_max_position_embeddings") or most
        return max(most, int(original * (rope.get("factor") or 1)))
    return most


def fixed_rotary_limit(config: Any) -> int:
    """Positions up to which rotary embeddings do not change with the length of the text.

    Beyond ``max_position_embeddings`` those of kind ``dynamic`` do, and those of ``longrope`` beyond the original
    positions: there the numbers of transformers depend on the cache and on the longest text of the batch.
    """
    most = position_limit(config) or 0
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return min(most, int(rope["original_max_position_embeddings"]))
    return most
