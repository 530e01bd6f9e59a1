"""The engine of one generating model: a worker thread that steps a batch which requests join and leave."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from yunque.errors import InputError
from yunque.runtime.batch import Batch, Step, new_tokens
from yunque.runtime.models import CausalModel, Seq2SeqModel
from yunque.serving.engine_settings import EngineSettings
from yunque.serving.fair_queue import FairQueue
from yunque.serving.metrics import EngineMetrics
from yunque.serving.requests import (
    Draining,
    EngineFailed,
    Event,
    FinishReason,
    QueueFull,
    Request,
    Stream,
)
from yunque.serving.row_text import RowText
from yunque.serving.warm_up import Capacity, measure

_MOST_FAILURES = 5  # one after the other, then the engine gives up
_SIMILAR = 2  # prompts read together: the longest is at most so many times the shortest
_RATE_S = 2.0  # over which rates are measured

log = logging.getLogger("yunque.serving")


class Engine:
    """Makes texts for many requests at once. ``submit`` from an event loop; everything else from any thread.

    Greedy texts are to the last bit those of ``model.generate`` for the prompt alone, whatever runs beside them, for
    float32 and int8 graphs (see ``yunque.runtime.rows.LANES``); 8- and 4-bit blocks differ in the last bits.
    """

    def __init__(self, model: Seq2SeqModel | CausalModel, settings: EngineSettings, metrics: EngineMetrics) -> None:
        self.model = model
        self.settings = settings
        self.metrics = metrics
        self.capacity: Capacity | None = None
        self._changed = threading.Condition()
        self._queue: FairQueue[RowText] = FairQueue()
        self._rows: dict[int, RowText] = {}  # in the batch, by number
        self._numbers = itertools.count()
        self._batch: Batch | None = None
        self._thread: threading.Thread | None = None
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Event]]] = {}
        self._is_draining = self._is_closed = False
        self._failed = ""
        self._failures = 0
        self._rates = _Rates()

    @property
    def running(self) -> int:
        """Texts in the batch."""
        return len(self._rows)

    @property
    def queued(self) -> int:
        """Texts that wait."""
        return len(self._queue)

    @property
    def healthy(self) -> bool:
        """Whether it works: started, and not given up after failing time and again."""
        return self._thread is not None and self._thread.is_alive() and not self._failed

    def start(self) -> None:
        """Measure, warm up and begin to work; returns when ready.

        Raises:
            InputError: not even one text fits the memory budget.
        """
        self.capacity = measure(self.model, self.settings)
        self.metrics.max_rows.set(self.capacity.max_rows)
        self.metrics.budget_bytes.set(self.capacity.cache_bytes)
        self._renew()
        self._thread = threading.Thread(target=self._work, name=f"engine-{self.metrics.model}", daemon=True)
        self._thread.start()

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Queue a request; its events come in the calling event loop.

        Raises:
            QueueFull: too many texts wait; holds the seconds after which to try again.
            Draining: ``drain`` or ``close`` was called.
            EngineFailed: the model fails at every request.
            InputError: a prompt or options that the model cannot serve.
        """
        limit = self._check(request)
        stream = Stream(request)
        now = time.perf_counter()
        seconds = request.deadline_s or self.settings.deadline_s
        deadline = now + seconds if seconds else math.inf
        rows = [
            RowText(stream, index, self._row_options(request, index), limit, now, deadline, self.model)
            for index in range(request.n)
        ]
        with self._changed:
            if self._is_draining or self._is_closed:
                self.metrics.refused(Draining.reason)
                raise Draining()
            if self._failed:
                self.metrics.refused(EngineFailed.reason)
                raise EngineFailed(self._failed)
            if len(self._queue) + request.n > self.settings.max_queued:
                self.metrics.refused(QueueFull.reason)
                raise QueueFull(self._rates.seconds_for(len(self._queue) + request.n))
            for row in rows:
                self._queue.push(request.client, row)
            self.metrics.queued.set(len(self._queue))
            self._changed.notify_all()
        return stream

    def _check(self, request: Request) -> int:
        """The number of new tokens that the request may get."""
        assert self.capacity is not None, "start() first"
        prompt, options = request.prompt, request.options
        limit = new_tokens(self.model.spec, prompt, options)
        if options.num_beams > 1:
            raise InputError("num_beams: the server makes one text at a time of each; leave it out")
        if not 1 <= request.n <= self.settings.max_queued:
            raise InputError(f"n: {request.n} is not possible; give 1 to {self.settings.max_queued}")
        if min(prompt) < 0 or max(prompt) >= self.model.spec.vocab_size:
            raise InputError(f"prompt: token ids go from 0 to {self.model.spec.vocab_size - 1}")
        needed = self.model.new_rows().bytes_for(1, len(prompt) + limit, len(prompt))
        if needed > self.capacity.cache_bytes:
            raise InputError(
                f"max_tokens: a prompt of {len(prompt)} tokens with {limit} new ones takes {needed} bytes of cache, "
                f"and there are {self.capacity.cache_bytes}; ask for fewer"
            )
        return limit

    def _row_options(self, request: Request, index: int) -> Any:
        # Stop strings are found in the text as it is shown, by RowText.
        seed = (request.options.seed + index) % (1 << 64)
        return replace(request.options, stop=(), seed=seed)

    # --- the end ------------------------------------------------------------------------------------------------------

    def drain(self, timeout_s: float) -> bool:
        """Take nothing new, wait until all that was accepted is finished; False when time ran out (blocking)."""
        with self._changed:
            self._is_draining = True
            return self._changed.wait_for(self._is_idle, timeout_s)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing runs or waits, while new requests are taken."""
        with self._changed:
            return self._changed.wait_for(self._is_idle, timeout_s)

    def _is_idle(self) -> bool:
        return not self._queue and not self._rows

    def close(self) -> None:
        """Stop at once: what is unfinished ends with ``cancelled``."""
        with self._changed:
            self._is_draining = self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._end_all("cancelled")
        self._batch = None

    # --- the worker ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._is_idle() or self._is_closed)
                if self._is_closed:
                    return
            try:
                self._round()
                self._failures = 0
            except Exception as error:
                self._recover(error)
            self._send()
            with self._changed:
                self.metrics.queued.set(len(self._queue))
                self.metrics.running.set(len(self._rows))
                self._changed.notify_all()

    def _round(self) -> None:
        """One token for every running text, after those that leave and those that join."""
        assert self._batch is not None
        self._leave()
        self._join()
        if not self._rows:
            return
        begin = time.perf_counter()
        step = self._batch.step()
        now = time.perf_counter()
        self.metrics.step_s.observe(now - begin)
        self.metrics.batch_size.observe(len(step.requests))
        self._hand_out(step, now)
        if not self._rows:
            self._renew_if_grown()

    def _recover(self, error: Exception) -> None:
        """Fail what ran, begin again with an empty batch; give up after failing time and again."""
        log.exception("engine of %s failed", self.metrics.model)
        self.metrics.restarts.inc()
        self._failures += 1
        message = f"the model failed: {type(error).__name__}"
        for number in list(self._rows):
            self._end(self._rows.pop(number), "error", message)
        self._renew()
        if self._failures >= _MOST_FAILURES:
            self._failed = message
            self._end_all("error", message)

    def _renew(self) -> None:
        assert self.capacity is not None
        self._batch = self.model.new_batch()
        self._batch.rows.most = self.capacity.max_rows
        self.metrics.cache_bytes.set(0)

    def _renew_if_grown(self) -> None:
        """Free the caches of an empty batch that are larger than half of what is allowed."""
        assert self._batch is not None
        assert self.capacity is not None
        rows = self._batch.rows
        if rows.bytes_for(*rows.capacity) > self.capacity.cache_bytes / 2:
            self._renew()

    # --- leaving ------------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        """Drop what was given up or is too late, waiting or running."""
        now = time.perf_counter()
        with self._changed:
            for row in self._queue.remove(lambda row: row.is_over(now)):
                self._end(row, row.why_over)
        gone = [number for number, row in self._rows.items() if row.is_over(now)]
        for number in gone:
            self._end(self._rows[number], self._rows[number].why_over)
        self._remove(gone)

    def _remove(self, numbers: list[int]) -> None:
        if not numbers:
            return
        assert self._batch is not None
        for number in numbers:
            del self._rows[number]
        self._batch.remove(numbers)

    def _end(self, row: RowText, reason: FinishReason, error: str | None = None) -> None:
        """The last event of a text."""
        self._post(row.stream, row.last_event(reason, error))
        self._count_end(row, reason)

    def _end_all(self, reason: FinishReason, error: str | None = None) -> None:
        with self._changed:
            rows = [*self._rows.values(), *self._queue.remove(lambda row: True)]
            self._rows.clear()
        for row in rows:
            self._end(row, reason, error)
        self._send()

    def _count_end(self, row: RowText, reason: FinishReason) -> None:
        now = time.perf_counter()
        self.metrics.finished(reason)
        self.metrics.request_s.observe(now - row.arrived)
        self._rates.ended(now)

    # --- joining ------------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Read prompts of those whose turn it is, as many tokens as the running texts may wait for."""
        assert self.capacity is not None
        assert self._batch is not None
        left = self.capacity.prefill_tokens
        while True:
            free = self.capacity.max_rows - len(self._rows)
            if free <= 0 or left <= 0:
                return
            with self._changed:
                goes_with = self._goes_with(left, first=left == self.capacity.prefill_tokens)
                group = self._queue.take(free, goes_with)
            if not group:
                return
            left -= len(group) * max(len(row.prompt) for row in group)
            self._read(group)

    def _goes_with(self, tokens: int, *, first: bool) -> Callable[[list[RowText], RowText], bool]:
        """Whether an item may be read together with a group: similar length, few enough tokens, and it fits.

        The first of a round goes however long it is: otherwise it would never.
        """

        def goes_with(group: list[RowText], row: RowText) -> bool:
            lengths = [len(other.prompt) for other in (*group, row)]
            if group and max(lengths) > _SIMILAR * max(min(lengths), 16):
                return False
            if len(lengths) * max(lengths) > tokens and (group or not first):
                return False
            return self._fits([*group, row])

        return goes_with

    def _fits(self, joining: list[RowText]) -> bool:
        """Whether the buffers hold these too; shrinks buffers that are larger than their rows need."""
        assert self.capacity is not None
        assert self._batch is not None
        rows, most = self._batch.rows, self.capacity.cache_bytes
        room = max(row.room for row in joining)
        source = max(len(row.prompt) for row in joining)
        if rows.bytes_for(*rows.sizes_after(rows.count + len(joining), room, source)) <= most:
            return True
        running = self._rows.values()
        room = max([room, *(row.room for row in running)])
        source = max([source, *(len(row.prompt) for row in running)])
        if rows.bytes_for(rows.count + len(joining), room, source) > most:
            return False
        rows.fit(room, source)
        # The capacity grows to twice the rows again: only as far as there is room.
        rows.most = max(rows.count + len(joining), min(self.capacity.max_rows, most // rows.bytes_for(1, room, source)))
        return rows.bytes_for(*rows.sizes_after(rows.count + len(joining), room, source)) <= most

    def _read(self, group: list[RowText]) -> None:
        """Let a group join; when that fails, each by itself, so that only those fail that cannot."""
        assert self._batch is not None
        now = time.perf_counter()
        numbers = [next(self._numbers) for _ in group]
        try:
            self._batch.add(numbers, [row.prompt for row in group], [row.options for row in group])
        except Exception as error:
            if len(group) > 1:
                for row in group:
                    self._read([row])
                return
            log.exception("a prompt could not be read")
            self._end(group[0], "error", f"the model failed at the prompt: {type(error).__name__}")
            return
        for number, row in zip(numbers, group, strict=True):
            self._rows[number] = row
            self.metrics.queue_s.observe(now - row.arrived)
            self.metrics.prompt_tokens.inc(len(row.prompt))
        self.metrics.cache_bytes.set(self._batch.rows.bytes_for(*self._batch.rows.capacity))

    # --- handing out --------------------------------------------------------------------------------------------------

    def _hand_out(self, step: Step, now: float) -> None:
        ended: list[int] = []
        left: list[int] = []
        for place, number in enumerate(step.requests.tolist()):
            row = self._rows[number]
            try:
                event = row.take(step, place)
            except Exception as error:
                log.exception("a token could not be decoded")
                event = row.last_event("error", f"the text could not be decoded: {type(error).__name__}")
            self._post(row.stream, event)
            if row.last is None:
                self.metrics.first_token_s.observe(now - row.arrived)
            else:
                self.metrics.inter_token_s.observe(now - row.last)
            row.last = now
            if event.finish_reason is not None:
                self._count_end(row, event.finish_reason)
                (ended if step.reasons[place] else left).append(number)
        for number in ended:
            del self._rows[number]
        self._remove(left)
        self.metrics.new_tokens.inc(len(step.requests))
        rate = self._rates.made(len(step.requests), now)
        if rate is not None:
            self.metrics.tokens_per_s.set(rate)

    def _post(self, stream: Stream, event: Event) -> None:
        self._outbox.setdefault(stream.loop, []).append((stream, event))

    def _send(self) -> None:
        """Wake every event loop once with all its events."""
        outbox, self._outbox = self._outbox, {}
        for loop, events in outbox.items():
            try:
                loop.call_soon_threadsafe(_deliver, events)
            except RuntimeError:  # the loop is closed: nobody waits any more
                log.debug("events for a closed event loop")


def _deliver(events: list[tuple[Stream, Event]]) -> None:
    for stream, event in events:
        stream.deliver(event)


class _Rates:
    """Tokens and finished texts a second, over the last seconds with work."""

    def __init__(self) -> None:
        self._since = 0.0
        self._last = 0.0
        self._tokens = self._ends = 0
        self._ends_s = 0.0

    def made(self, tokens: int, now: float) -> float | None:
        """Count tokens; the rate, when a while has passed."""
        if now - self._last > 1:  # there was nothing to do
            self._since, self._tokens, self._ends = now, 0, 0
        self._last = now
        self._tokens += tokens
        passed = now - self._since
        if passed < _RATE_S:
            return None
        rate, self._ends_s = self._tokens / passed, self._ends / passed
        self._since, self._tokens, self._ends = now, 0, 0
        return rate

    def ended(self, now: float) -> None:
        """Count a text that ended."""
        self._ends += 1
        passed = now - self._since
        if not self._ends_s and 0.1 < passed < 1e5:
            self._ends_s = self._ends / passed

    def seconds_for(self, texts: int) -> int:
        """About how long so many texts take, 1 to 60 s; 1 where nothing was measured."""
        return min(60, max(1, math.ceil(texts / self._ends_s))) if self._ends_s else 1
