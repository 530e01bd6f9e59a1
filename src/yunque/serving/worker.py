"""What the engines share: a thread that works on what waits in a fair queue, until it is drained or closed."""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from yunque.serving.fair_queue import FairQueue
from yunque.serving.metrics import EngineMetrics
from yunque.serving.requests import Draining, QueueFull, Refused

Item = TypeVar("Item")

log = logging.getLogger("yunque.serving")


class Worker(ABC, Generic[Item]):
    """A thread and its queue. Whoever changes what waits or runs, holds or notifies ``_changed``."""

    def __init__(self, metrics: EngineMetrics, max_queued: int) -> None:
        self.metrics = metrics
        self._max_queued = max_queued
        self._changed = threading.Condition()
        self._queue: FairQueue[Item] = FairQueue()
        self._thread: threading.Thread | None = None
        self._is_draining = self._is_closed = False

    @property
    @abstractmethod
    def running(self) -> int:
        """Texts at work."""

    @property
    def queued(self) -> int:
        """Texts that wait."""
        return len(self._queue)

    @property
    def healthy(self) -> bool:
        """Whether it works."""
        return self._thread is not None and self._thread.is_alive()

    @abstractmethod
    def _work(self) -> None:
        """What the thread does until ``_is_closed``."""

    @abstractmethod
    def _seconds_for(self, texts: int) -> int:
        """About how long so many texts take."""

    def _begin(self) -> None:
        self._thread = threading.Thread(target=self._work, name=f"engine-{self.metrics.model}", daemon=True)
        self._thread.start()

    def _push(self, queue: FairQueue[Item], client: str, items: Sequence[Item]) -> None:
        """Let items wait in a queue.

        Raises:
            Refused: all of them.
        """
        with self._changed:
            refusal = self._refusal(self.queued + len(items))
            if refusal is not None:
                self.metrics.refused(refusal.reason)
                raise refusal
            for item in items:
                queue.push(client, item)
            self.metrics.queued.set(self.queued)
            self._changed.notify_all()

    def _refusal(self, queued: int) -> Refused | None:
        """Why so many may not wait."""
        if self._is_draining:
            return Draining()
        return QueueFull(self._seconds_for(queued)) if queued > self._max_queued else None

    def drain(self, timeout_s: float) -> bool:
        """Take nothing new, wait until all that was accepted is finished; False when time ran out (blocking)."""
        with self._changed:
            self._is_draining = True
            self._changed.notify_all()
        return self.wait_idle(timeout_s)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing runs or waits; new requests are still taken, unless it drains."""
        with self._changed:
            return self._changed.wait_for(self._is_idle, timeout_s)

    def _is_idle(self) -> bool:
        return not self.queued and not self.running

    def _stop(self) -> None:
        """End the thread after what it has at hand."""
        with self._changed:
            self._is_draining = self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()


class Outbox:
    """Calls to make in event loops; each loop is woken once for all of its own."""

    def __init__(self) -> None:
        self._calls: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}

    def put(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        """Let a call wait."""
        self._calls.setdefault(loop, []).append(call)

    def send(self) -> None:
        """Make them all."""
        calls, self._calls = self._calls, {}
        for loop, some in calls.items():
            try:
                loop.call_soon_threadsafe(_make, some)
            except RuntimeError:  # the loop is closed: nobody waits any more
                log.debug("news for a closed event loop")


def _make(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()
