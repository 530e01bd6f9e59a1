"""Engines over the exported tiny models."""

import threading

import pytest
from exported import exported, prompts  # noqa: F401  # fixtures

from yunque.runtime import Batch
from yunque.serving.engine import Engine
from yunque.serving.engine_settings import EngineSettings
from yunque.serving.metrics import EngineMetrics, Metrics


@pytest.fixture
def engine(exported):  # noqa: F811
    """A function from a model's name and settings to a started engine, closed at the end."""
    started = []

    def start(name, **settings):
        made = Engine(exported(name).runtime, EngineSettings(**settings), EngineMetrics(Metrics(), name))
        started.append(made)
        made.start()
        return made

    yield start
    for made in started:
        made.close()


@pytest.fixture
def gate(monkeypatch):
    """A semaphore: every step of every batch takes one, once ``gate.shut`` is set."""
    step, semaphore = Batch.step, threading.Semaphore(0)
    semaphore.shut = False

    def wait(self):
        if semaphore.shut:
            assert semaphore.acquire(timeout=20)
        return step(self)

    monkeypatch.setattr(Batch, "step", wait)
    yield semaphore
    semaphore.shut = False
    semaphore.release(1000)
