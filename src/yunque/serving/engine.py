"""The engine of one generating model: a worker thread that steps a batch which requests join and leave."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from yunque.errors import InputError
from yunque.runtime.batch import Batch, Step, new_tokens, sizes
from yunque.runtime.models import CausalModel, Seq2SeqModel
from yunque.runtime.pieces import PromptReader
from yunque.serving.cache_memory import CacheMemory
from yunque.serving.engine_settings import EngineSettings
from yunque.serving.fair_queue import FairQueue
from yunque.serving.metrics import EngineMetrics
from yunque.serving.rates import Rates
from yunque.serving.requests import EngineFailed, Event, FinishReason, Refused, Request, Stream
from yunque.serving.row_text import RowText
from yunque.serving.warm_up import Capacity, measure
from yunque.serving.worker import Outbox, Worker

_MOST_FAILURES = 5  # one after the other, then the engine gives up
_SIMILAR = 2  # prompts read together: the longest is at most so many times the shortest

log = logging.getLogger("yunque.serving")


class Engine(Worker[RowText]):
    """Makes texts for many requests at once. ``submit`` from an event loop; everything else from any thread.

    Greedy texts are to the last bit those of ``model.generate`` for the prompt alone, whatever runs beside them, for
    float32 and int8 graphs (see ``yunque.runtime.rows.LANES``); 8- and 4-bit blocks differ in the last bits.

    What a new text waits for is bounded: one step of the running texts, then prompts of about
    ``capacity.prefill_tokens`` tokens, its own among them; its first token leaves before the next step. Longer prompts
    of decoder-only models are read in pieces, between the steps of the others.
    """

    def __init__(self, model: Seq2SeqModel | CausalModel, settings: EngineSettings, metrics: EngineMetrics) -> None:
        super().__init__(metrics, settings.max_queued)
        self.model = model
        self.settings = settings
        self.capacity: Capacity | None = None
        self._long: FairQueue[RowText] = FairQueue()  # wait to be read in pieces
        self._reading: list[RowText] = []  # texts of the one prompt that is being read so; their places are kept
        self._reader: PromptReader | None = None
        self._joining: list[RowText] = []  # prompts that are being read at once
        self._rows: dict[int, RowText] = {}  # in the batch, by number
        self._numbers = itertools.count()
        self._batch: Batch | None = None
        self._memory: CacheMemory | None = None
        self._outbox = Outbox()
        self._failed = ""
        self._failures = 0
        self._rates = Rates()

    @property
    def running(self) -> int:
        """Texts in the batch, or about to join it."""
        return len(self._rows) + len(self._joining) + len(self._reading)

    @property
    def queued(self) -> int:
        """Texts that wait."""
        return len(self._queue) + len(self._long)

    @property
    def healthy(self) -> bool:
        """Whether it works: started, and not given up after failing time and again."""
        return super().healthy and not self._failed

    def start(self) -> None:
        """Measure, warm up and begin to work; returns when ready.

        Raises:
            InputError: not even one text fits the memory budget.
        """
        self.capacity = measure(self.model, self.settings)
        self.metrics.max_rows.set(self.capacity.max_rows)
        self.metrics.budget_bytes.set(self.capacity.cache_bytes)
        self._renew()
        self._begin()

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
        self._push(self._long if self._is_long(request.prompt) else self._queue, request.client, rows)
        return stream

    def _refusal(self, queued: int) -> Refused | None:
        return EngineFailed(self._failed) if self._failed else super()._refusal(queued)

    def _seconds_for(self, texts: int) -> int:
        return self._rates.seconds_for(texts)

    def _is_long(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt is read in pieces."""
        assert self.capacity is not None
        return self.model.spec.kind == "causal" and len(prompt) > self.capacity.prefill_tokens

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
        rows = self.model.new_rows()
        needed = rows.bytes_for(1, *sizes(self.model.spec, prompt, limit))
        if self._is_long(prompt):
            needed += rows.bytes_for(1, len(prompt), 0)
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

    def close(self) -> None:
        """Stop at once: what is unfinished ends with ``cancelled``."""
        self._stop()
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
            self._outbox.send()
            with self._changed:
                self.metrics.queued.set(self.queued)
                self.metrics.running.set(self.running)
                self._changed.notify_all()

    def _round(self) -> None:
        """One token for every running text, after those that leave and those that join."""
        assert self._batch is not None
        assert self._memory is not None
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
        self._memory.take()
        self.metrics.cache_bytes.set(self._memory.bytes)
        if not self._rows:
            self._renew_if_grown()

    def _recover(self, error: Exception) -> None:
        """Fail what ran, begin again with an empty batch; give up after failing time and again."""
        log.exception("engine of %s failed", self.metrics.model)
        self.metrics.restarts.inc()
        self._failures += 1
        message = f"the model failed: {type(error).__name__}"
        failed = [*self._rows.values(), *self._joining]
        self._rows.clear()
        self._forget(self._joining)
        for row in failed:
            self._end(row, "error", message)
        self._renew()
        if self._failures >= _MOST_FAILURES:
            self._failed = message
            self._end_all("error", message)

    def _renew(self) -> None:
        assert self.capacity is not None
        self._batch = self.model.new_batch()
        self._batch.rows.most = self.capacity.max_rows
        self._memory = CacheMemory(self._batch.rows, self._memory.most_at_once if self._memory else 0)
        self.metrics.cache_bytes.set(0)

    def _renew_if_grown(self) -> None:
        """Free the caches of an empty batch that take more than half of what is allowed."""
        assert self._memory is not None
        assert self.capacity is not None
        if self._memory.bytes > self.capacity.cache_bytes / 2:
            self._renew()

    # --- leaving ------------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        """Drop what was given up or is too late, waiting or running."""
        now = time.perf_counter()
        with self._changed:
            late = [row for queue in (self._queue, self._long) for row in queue.remove(lambda row: row.is_over(now))]
        late += [row for row in self._reading if row.is_over(now)]
        self._forget(late)
        for row in late:
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
            waiting = [row for queue in (self._queue, self._long) for row in queue.remove(lambda row: True)]
            rows = [*self._rows.values(), *self._reading, *waiting]
            self._rows.clear()
            self._forget(self._reading)
        for row in rows:
            self._end(row, reason, error)
        self._outbox.send()

    def _count_end(self, row: RowText, reason: FinishReason) -> None:
        now = time.perf_counter()
        self.metrics.finished(reason)
        self.metrics.request_s.observe(now - row.arrived)
        self._rates.ended(now)

    # --- joining ------------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Read prompts of those whose turn it is, about as many tokens as the running texts may wait for.

        A long prompt that does not fit yet holds all others back: otherwise it would wait for ever.
        """
        assert self.capacity is not None
        if self._long and not self._reading and not self._begin_reading():
            return
        left = most = self.capacity.prefill_tokens
        while left > 0 and self._take(left, first=left == most):
            left -= _tokens(self._joining)
            self._read(self._joining)
        if self._reader is not None:
            self._read_piece(self._reader, max(left, most // 2))

    def _take(self, tokens: int, *, first: bool) -> bool:
        """Let those that are read next leave the queue; whether there are any."""
        with self._changed:
            self._joining = self._queue.take(self._free(), self._goes_with(tokens, first=first))
        return bool(self._joining)

    def _free(self) -> int:
        assert self.capacity is not None
        return max(0, self.capacity.max_rows - self.running)

    def _goes_with(self, tokens: int, *, first: bool) -> Callable[[list[RowText], RowText], bool]:
        """Whether an item may be read together with a group: similar length, few enough tokens, and it fits.

        The first of a round goes however long it is: otherwise it would never.
        """

        def goes_with(group: list[RowText], row: RowText) -> bool:
            lengths = [len(other.prompt) for other in (*group, row)]
            if group and max(lengths) > _SIMILAR * max(min(lengths), 16):
                return False
            if _tokens([*group, row]) > tokens and (group or not first):
                return False
            return self._fits([*group, row])

        return goes_with

    def _fits(self, joining: Sequence[RowText]) -> bool:
        """Whether the buffers hold these too, beside those being read; shrinks buffers larger than their rows need."""
        assert self.capacity is not None
        assert self._batch is not None
        rows, joining = self._batch.rows, [*joining, *self._reading]
        in_pieces = max((len(row.prompt) for row in joining if self._is_long(row.prompt)), default=0)
        most = self.capacity.cache_bytes - (rows.bytes_for(1, in_pieces, 0) if in_pieces else 0)
        room = max(row.room for row in joining)
        source = max(row.source for row in joining)
        if rows.bytes_for(*rows.sizes_after(rows.count + len(joining), room, source)) <= most:
            return True
        running = self._rows.values()
        room = max([room, *(row.room for row in running)])
        source = max([source, *(row.source for row in running)])
        if rows.bytes_for(rows.count + len(joining), room, source) > most:
            return False
        rows.most = min(self.capacity.max_rows, most // rows.bytes_for(1, room, source))
        rows.fit(room, source)
        return True

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
            else:
                self._end_unread(group, error)
            return
        self._joined(numbers, group, now)

    def _begin_reading(self) -> bool:
        """Keep places for the texts of the next long prompt; whether there are."""
        with self._changed:
            self._reading = self._long.take(
                self._free(),
                lambda group, row: all(other.stream is row.stream for other in group) and self._fits([*group, row]),
            )
        if self._reading:
            rows, prompt = self.model.new_rows(), self._reading[0].prompt
            self._reader = PromptReader(rows, prompt, self.model.spec.max_positions)
        return bool(self._reading)

    def _read_piece(self, reader: PromptReader, tokens: int) -> None:
        """Read on in the long prompt; its texts join when it is read."""
        assert self._batch is not None
        group, numbers = list(self._reading), [next(self._numbers) for _ in self._reading]
        try:
            if reader.left:
                reader.read(tokens)
            if reader.left or not self._fits([]):
                return
            now = time.perf_counter()
            self._batch.join(numbers, reader, [row.options for row in group])
        except Exception as error:
            self._end_unread(group, error)
            return
        self._joined(numbers, group, now)

    def _forget(self, group: Sequence[RowText]) -> None:
        """Texts that are not about to join any more."""
        self._joining = [row for row in self._joining if row not in group]
        self._reading = [row for row in self._reading if row not in group]
        if not self._reading:
            self._reader = None

    def _end_unread(self, group: list[RowText], error: Exception) -> None:
        log.exception("a prompt could not be read")
        self._forget(group)
        for row in group:
            self._end(row, "error", f"the model failed at the prompt: {type(error).__name__}")

    def _joined(self, numbers: list[int], group: list[RowText], now: float) -> None:
        """Count those that have joined, and hand out their first tokens."""
        assert self._batch is not None
        for number, row in zip(numbers, group, strict=True):
            self._rows[number] = row
            self.metrics.queue_s.observe(now - row.arrived)
            self.metrics.prompt_tokens.inc(len(row.prompt))
        self._forget(group)
        self._hand_out(self._batch.step(), time.perf_counter())
        self._outbox.send()

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
        self._outbox.put(stream.loop, partial(stream.deliver, event))


def _tokens(group: Sequence[RowText]) -> int:
    """Tokens to be read for a group, with padding; texts of one request share their prompt."""
    return len({row.stream for row in group}) * max(len(row.prompt) for row in group)
