"""The memory of a running batch is taken beforehand, little by little, and never from a text."""

import itertools
import sys

import numpy as np
import pytest
from resident import resident_share

from yunque.serving import cache_memory
from yunque.serving.cache_memory import CacheMemory

WIDE = 1 << 15  # positions: a row of a buffer is several pages


@pytest.fixture
def rows(exported):
    made = exported("llama").runtime.new_rows()
    made.most = 40
    made.append(3, WIDE)
    made.forward(0, np.full((3, 2), 5), np.full(3, 2))
    return made


def settle(memory):
    """Takes until nothing more is wanted."""
    before = -1
    while memory._taken != before:
        before = memory._taken
        memory.take()


@pytest.mark.parametrize(("at_once", "wanted"), [(3, 8), (5, 16), (9, 32), (17, 40)])
def test_twice_as_many_have_their_memory_as_ever_ran_at_once(rows, monkeypatch, at_once, wanted):
    monkeypatch.setattr(cache_memory, "_PIECE_S", 60)
    memory = CacheMemory(rows)
    rows.append(at_once - 3, WIDE)
    memory.take()
    rows.truncate(3)  # those that have run count, not those that do
    settle(memory)
    assert memory.bytes == rows.bytes_for(wanted, WIDE, 0)
    if sys.platform == "linux":
        for cache in rows.caches:
            assert resident_share(cache[at_once:wanted]) == 1
    rows.step(np.array([5, 5, 5]))
    assert np.isfinite(rows.logits[:3]).all()


def test_texts_keep_what_they_hold(rows, monkeypatch):
    monkeypatch.setattr(cache_memory, "_PIECE_S", 60)
    memory, kept = CacheMemory(rows), [cache[:3].copy() for cache in rows.caches]
    settle(memory)
    for cache, former in zip(rows.caches, kept, strict=True):
        assert (cache[:3] == former).all()


def test_a_step_waits_for_a_few_buffers_only(rows, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(cache_memory.time, "perf_counter", lambda: next(ticks) * 0.6 * cache_memory._PIECE_S)
    memory = CacheMemory(rows)
    for passed in range(1, 5):
        memory.take()
        assert memory._taken == 3 * len(rows.caches) + passed


def test_wider_buffers_are_taken_anew(rows, monkeypatch):
    monkeypatch.setattr(cache_memory, "_PIECE_S", 60)
    memory = CacheMemory(rows)
    settle(memory)
    rows.reserve(3, 2 * WIDE, 0)
    settle(memory)
    assert memory.bytes == rows.bytes_for(8, 2 * WIDE, 0)
    if sys.platform == "linux":
        assert {resident_share(cache[3:8]) for cache in rows.caches} == {1.0}
