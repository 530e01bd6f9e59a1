"""A plan as text: one line for each layout, then what the model would cost to train from nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence

from yunque.distributed.plan import USABLE, LayoutPlan, Plan, Request
from yunque.errors import InputError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_COLUMNS = ("profile", "weights", "gradients", "optimizer", "reference", "value head", "buffers", "activations")
_MORE = ("checkpointed", "logits", "rollout", "KV cache", "total", "fits", "largest batch")


def parse_bytes(text: str, option: str) -> int:
    """A size such as 80GiB, 24GB or 8e10, in bytes.

    Raises:
        InputError: anything else.
    """
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?I?)B?", text.strip().upper().replace("E", "e"))
    if match:
        try:
            size = float(match[1]) * _UNITS[match[2]]
        except (ValueError, KeyError):
            size = 0.0
        if size >= 1:
            return int(size)
    raise InputError(f"{option}: {text!r} is no size; give one such as 80GiB or 24GB")


def show_bytes(size: int) -> str:
    """``size`` in the unit that leaves one to four digits before the point."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} GiB"


def describe(plan: Plan, request: Request, chosen: str | None) -> str:
    """Tables for the terminal."""
    batch = request.batch
    lines = [
        f"{plan.model}: {plan.parameters:,} parameters, {plan.trained:,} train ({plan.method})",
        f"{request.devices} devices of {show_bytes(request.device_memory_bytes)}, {USABLE:.0%} of it usable; a forward "
        f"pass of {batch.rows} rows of {batch.prompt_tokens} + {batch.answer_tokens} tokens",
        "",
    ]
    rows = [_row(layout) for layout in plan.layouts if layout.impossible is None]
    lines += _table([*_COLUMNS, *_MORE], rows) if rows else []
    lines += [f"{layout.profile}: impossible: {layout.impossible}" for layout in plan.layouts if layout.impossible]
    hosts = [
        f"{layout.profile}: {show_bytes(layout.host)} of host memory a device" for layout in plan.layouts if layout.host
    ]
    lines += ["", *hosts] if hosts else [""]
    lines += _rules(plan)
    if chosen is not None:
        lines += ["", _verdict(plan.of(chosen), request)]
    return "\n".join(lines)


def _row(layout: LayoutPlan) -> list[str]:
    sizes = (
        *(layout.weights, layout.gradients, layout.optimizer, layout.reference, layout.value_head, layout.buffers),
        *(layout.activations, layout.activations_checkpointed, layout.logits, layout.rollout_weights, layout.kv_cache),
        layout.total,
    )
    fits = "yes" if layout.fits else "checkpointed" if layout.fits_checkpointed else "no"
    largest = f"{layout.largest_batch} / {layout.largest_batch_checkpointed}"
    return [layout.profile, *(show_bytes(size) if size else "-" for size in sizes), fits, largest]


def _rules(plan: Plan) -> list[str]:
    gigabytes = [size / 1e9 for size in (plan.course_weights_bytes, plan.course_training_bytes)]
    return [
        f"rule of the course: 4 bytes a parameter to hold it in float32 ({gigabytes[0]:,.1f} GB), about 20 more to "
        f"train it ({gigabytes[1]:,.1f} GB)",
        f"compute-optimal from nothing: {plan.chinchilla_tokens:,} tokens (20 a parameter), 6 N D = "
        f"{plan.chinchilla_flops:.2e} FLOPs = {plan.chinchilla_petaflop_days:,.3g} petaFLOP/s-days; fine-tuning on 1e9 "
        f"tokens: {plan.petaflop_days_per_billion_tokens:.3g}",
    ]


def _verdict(layout: LayoutPlan, request: Request) -> str:
    if layout.impossible:
        return f"{layout.profile}: impossible: {layout.impossible}"
    if layout.fits:
        return f"{layout.profile}: fits; the largest batch is {layout.largest_batch}"
    if layout.fits_checkpointed:
        return (
            f"{layout.profile}: fits with --gradient_checkpointing; the largest batch is then "
            f"{layout.largest_batch_checkpointed}, and {layout.largest_batch} without"
        )
    over = layout.total_checkpointed - int(USABLE * request.device_memory_bytes)
    smaller = max(layout.largest_batch, layout.largest_batch_checkpointed)
    hint = f"a batch of {smaller} does" if smaller else "no batch does: take more devices or another layout"
    return f"{layout.profile}: does not fit, {show_bytes(over)} too many even with --gradient_checkpointing; {hint}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in (header, *rows))
    ]
