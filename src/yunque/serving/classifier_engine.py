"""The engine of one classifier: texts that arrive within a few milliseconds are scored together."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from yunque.errors import InputError
from yunque.runtime.models import Classifier
from yunque.serving.engine_settings import ClassifierSettings
from yunque.serving.metrics import EngineMetrics
from yunque.serving.requests import DeadlinePassed, Draining, EngineFailed
from yunque.serving.worker import Outbox, Worker

_SIMILAR_TOKENS = 32  # texts are scored with others whose length is in the same step of so many tokens, or near it

log = logging.getLogger("yunque.serving")


@dataclass(eq=False)
class _Text:
    tokens: list[int]
    future: asyncio.Future[dict[str, float]]
    loop: asyncio.AbstractEventLoop
    arrived: float
    deadline: float
    given_up: bool = False


class ClassifierEngine(Worker[_Text]):
    """Scores texts of many requests at once; ``start`` and ``close`` as ``Engine``'s."""

    def __init__(self, model: Classifier, settings: ClassifierSettings, metrics: EngineMetrics) -> None:
        super().__init__(metrics, settings.max_queued)
        self.model = model
        self.settings = settings
        self._running = 0
        self._text_s = 0.0  # of one text, lately

    @property
    def running(self) -> int:
        """Texts being scored."""
        return self._running

    def start(self) -> None:
        """Warm up, one text and the largest batch, and begin to work."""
        for count in (1, self.settings.max_batch):
            self.model.classify([[3] * 16] * count)
        self.metrics.max_rows.set(self.settings.max_batch)
        self._begin()

    async def classify(
        self, texts: Sequence[str], *, client: str = "", deadline_s: float | None = None
    ) -> list[dict[str, float]]:
        """The probability of every label, for each text; texts that are too long are cut.

        Raises:
            QueueFull: too many texts wait.
            Draining: ``drain`` or ``close`` was called.
            DeadlinePassed: not done in time.
            EngineFailed: the model failed at a text.
            InputError: more texts than may ever wait.
        """
        if len(texts) > self.settings.max_queued:
            raise InputError(f"texts: are {len(texts)}; give {self.settings.max_queued} at most")
        loop, now = asyncio.get_running_loop(), time.perf_counter()
        seconds = deadline_s or self.settings.deadline_s
        waiting = [
            _Text(tokens, loop.create_future(), loop, now, now + seconds if seconds else math.inf)
            for tokens in self._encoded(texts)
        ]
        self._push(self._queue, client, waiting)
        try:
            return list(await asyncio.gather(*(text.future for text in waiting)))
        finally:
            for text in waiting:  # when this task was cancelled, or one of the texts failed
                text.given_up = True

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        return self.model.tokenizer.encode_truncated(list(texts), self.model.spec.max_positions or 1 << 30)

    def _seconds_for(self, texts: int) -> int:
        return min(60, max(1, math.ceil(texts * self._text_s)))

    def close(self) -> None:
        """Stop after the batch at hand; what waits ends with ``Draining``."""
        self._stop()
        with self._changed:
            left = self._queue.remove(lambda text: True)
        _settle([(text, Draining()) for text in left])

    # --- the worker ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            batch = self._collect()
            if batch is None:
                return
            results: list[tuple[_Text, dict[str, float] | Exception]] = []
            if batch:
                begin = time.perf_counter()
                results = self._score(batch)
                now = time.perf_counter()
                self._text_s = (now - begin) / len(batch)
                self.metrics.step_s.observe(now - begin)
                self.metrics.batch_size.observe(len(batch))
                for text, result in results:
                    self.metrics.request_s.observe(now - text.arrived)
                    self.metrics.finished("error" if isinstance(result, Exception) else "scored")
            _settle(results)
            with self._changed:
                self._running = 0
                self.metrics.queued.set(len(self._queue))
                self.metrics.running.set(0)
                self._changed.notify_all()

    def _collect(self) -> list[_Text] | None:
        """The texts to score next; waits a moment for more than one. None when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closed)
            if not self._is_closed and len(self._queue) < self.settings.max_batch:
                self._changed.wait_for(
                    lambda: len(self._queue) >= self.settings.max_batch or self._is_draining, self.settings.max_wait_s
                )
            if self._is_closed:
                return None
            now = time.perf_counter()
            late = self._queue.remove(lambda text: text.given_up or now >= text.deadline)
            batch = self._queue.take(self.settings.max_batch, self._goes_with)
            self._running = len(batch)
            self.metrics.queued.set(len(self._queue))
            self.metrics.running.set(len(batch))
            for text in batch:
                self.metrics.queue_s.observe(now - text.arrived)
        for text in late:
            self.metrics.finished("cancelled" if text.given_up else "deadline")
        _settle([(text, DeadlinePassed("not scored in time")) for text in late])
        return batch

    def _goes_with(self, batch: list[_Text], text: _Text) -> bool:
        lengths = [len(other.tokens) for other in (*batch, text)]
        if not batch:
            return True
        if max(lengths) > 2 * max(min(lengths), _SIMILAR_TOKENS):
            return False
        return max(lengths) * len(lengths) <= self.settings.max_tokens

    def _score(self, batch: list[_Text]) -> list[tuple[_Text, dict[str, float] | Exception]]:
        """Scores of all texts; when that fails, of each by itself, so that only those fail that cannot."""
        try:
            scores = self.model.classify([text.tokens for text in batch], batch_size=len(batch))
        except Exception as error:
            if len(batch) > 1:
                return [result for text in batch for result in self._score([text])]
            log.exception("a text could not be scored")
            self.metrics.restarts.inc()
            return [(batch[0], EngineFailed(f"the model failed: {type(error).__name__}"))]
        return list(zip(batch, scores, strict=True))


def _settle(results: list[tuple[_Text, dict[str, float] | Exception]]) -> None:
    """Put results where they are waited for."""
    outbox = Outbox()
    for text, result in results:
        outbox.put(text.loop, partial(_settle_here, text, result))
    outbox.send()


def _settle_here(text: _Text, result: dict[str, float] | Exception) -> None:
    if text.future.done():
        return
    if isinstance(result, Exception):
        text.future.set_exception(result)
    else:
        text.future.set_result(result)
