"""What an engine measures before it is ready: its speed by batch size, and the memory that it takes."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

from yunque.errors import InputError
from yunque.runtime.batch import Batch, sizes
from yunque.runtime.models import CausalModel, Seq2SeqModel
from yunque.runtime.options import GenerationOptions
from yunque.serving import machine
from yunque.serving.engine_settings import EngineSettings

_SIZES = (1, 2, 4, 8, 16, 32, 64)
_FEWEST = 16  # rows that are worth trying before speed decides
_GAIN = 1.1  # of tokens a second, that makes a larger batch worth the longer wait for a token
_SECONDS = 0.8
_LENGTH = 64
_READ = 8  # prompts at a time; more rows share them, and equal prompts are read once
_STEPS = 3
_NEW = _STEPS * len(_SIZES)
_STALL_STEPS = 6  # of _FEWEST rows: so long prompts may hold the running texts up

log = logging.getLogger("yunque.serving")


@dataclass(frozen=True)
class Capacity:
    """What an engine may do at once."""

    max_rows: int
    prefill_tokens: int
    cache_bytes: int  # that caches may take: the budget without working memory
    budget_bytes: int
    row_bytes: int  # of one small text, for people
    measured_bytes: int  # resident memory that the largest batch of the warm-up took
    predicted_bytes: int  # what its buffers were to take


def measure(model: Seq2SeqModel | CausalModel, settings: EngineSettings) -> Capacity:
    """Run prompts through all graphs, in growing batches, and choose what the settings leave open.

    Raises:
        InputError: the budget does not hold one small text.
    """
    budget = settings.memory_budget_bytes or int(machine.free_bytes() * settings.memory_share)
    prompts = _prompts(model)
    length = len(prompts[0])
    buffers = sizes(model.spec, prompts[0], _NEW)
    row_bytes = model.new_rows().bytes_for(1, *buffers)
    if row_bytes > budget:
        raise InputError(
            f"memory_budget: {budget} bytes do not hold one text of {length + _NEW} tokens, {row_bytes} bytes"
        )
    before = machine.resident_bytes()
    batch = model.new_batch()
    max_rows, step_s, prefill_s = _grow(batch, prompts, buffers, settings.max_rows, budget // row_bytes)
    taken = max(0, machine.resident_bytes() - before)
    predicted = batch.rows.bytes_for(*batch.rows.capacity)
    working = max(0, taken - predicted)
    if working + row_bytes > budget:
        raise InputError(f"memory_budget: {budget} bytes; working memory alone took {working} bytes; give more")
    tokens = settings.prefill_tokens or int(min(max(_STALL_STEPS * step_s * length / prefill_s, 128), 2048))
    log.info(
        "warm: up to %d texts at once, %d prompt tokens between steps; largest batch took %.1f MB, its buffers %.1f MB",
        max_rows, tokens, taken / 1e6, predicted / 1e6,
    )  # fmt: skip
    return Capacity(max_rows, tokens, budget - working, budget, row_bytes, taken, predicted)


def _prompts(model: Seq2SeqModel | CausalModel) -> list[list[int]]:
    most = model.spec.max_positions or 1 << 30
    length = min(_LENGTH, max(1, most - _NEW))
    return [[token % model.spec.vocab_size for token in range(first, first + length)] for first in range(3, 3 + _READ)]


def _grow(
    batch: Batch, prompts: list[list[int]], buffers: tuple[int, int], wanted: int | None, fitting: int
) -> tuple[int, float, float]:
    """Rows to allow, seconds of a step with a few, and seconds of reading one of ``prompts``.

    A batch of ``wanted`` rows is run whatever its speed; without, sizes grow while each makes more tokens a second.
    """
    options = GenerationOptions(max_new_tokens=_NEW, eos_token_ids=())
    begin = time.perf_counter()
    tried = [size for size in _SIZES if size <= fitting] if wanted is None else [1, min(wanted, fitting)]
    best, rate, step_s, prefill_s = 1, 0.0, 0.0, math.inf
    for size in tried:
        joining = range(len(batch), size)
        if joining:
            batch.rows.reserve(size, *buffers)
            batch.rows.touch()  # memory is not what is timed
            before = time.perf_counter()
            batch.add(joining, [prompts[number % _READ] for number in joining], [options] * len(joining))
            prefill_s = min(prefill_s, (time.perf_counter() - before) / min(len(joining), _READ))
        times = []
        for _ in range(_STEPS):
            before = time.perf_counter()
            batch.step()
            times.append(time.perf_counter() - before)
        now = min(times[1:])  # the first only hands out what was read
        if wanted is not None or size <= _FEWEST:
            step_s = now
        elif size / now <= _GAIN * rate:
            break
        best, rate = size, size / now
        if wanted is None and size >= _FEWEST and time.perf_counter() - begin > _SECONDS:
            break
    return best, step_s, prefill_s
