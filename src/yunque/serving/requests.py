"""What goes into an engine and what comes out of it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Literal

from yunque.runtime.options import GenerationOptions

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error", "content_filter"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request: ``n`` texts from the same prompt, each a row of the batch.

    Text i is sampled with seed ``options.seed`` + i. ``client`` is the key that the fair queue takes turns over.
    """

    prompt: list[int]
    options: GenerationOptions
    deadline_s: float | None = None  # from submission; None: the engine's
    request_id: str = ""
    client: str = ""
    n: int = 1


@dataclass(frozen=True)
class TopLogprob:
    """One of the most probable tokens at a place."""

    token: int
    bytes: bytes
    logprob: float

    @property
    def text(self) -> str:
        r"""The token by itself; one of bytes that are no characters by themselves as OpenAI's ``bytes:\xf0\x9f``."""
        try:
            return self.bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes)


@dataclass(frozen=True)
class TokenLogprob(TopLogprob):
    """A chosen token with its log-probability under the model, and ``options.top_logprobs`` alternatives."""

    top: tuple[TopLogprob, ...] = ()
    offset: int = 0  # characters of the text before it


@dataclass(frozen=True)
class Event:
    """News of one text: ``text`` may be empty while tokens are held back.

    ``text`` never holds a stop string, nor the possible beginning of one, nor part of a character. The last event of
    every text, and only that, has a ``finish_reason``.
    """

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per token, when the options ask for them
    finish_reason: FinishReason | None = None
    index: int = 0  # which of the request's n texts
    error: str | None = None  # of finish reason "error"
    score: float | None = None  # of the guard, in the last event


class Refused(Exception):
    """The engine takes no request now; ``reason`` is the metric's label."""

    reason = "refused"


class QueueFull(Refused):
    """Too many wait already; about when a place will be free."""

    reason = "queue_full"

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"too many requests are waiting; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Draining(Refused):
    """The engine finishes what it has and takes nothing new."""

    reason = "draining"

    def __init__(self, message: str = "the server is shutting down") -> None:
        super().__init__(message)


class EngineFailed(Refused):
    """The model fails at every request."""

    reason = "failed"


class DeadlinePassed(Exception):
    """A request was not done in time."""


class Stream:
    """The events of one request, in the event loop that submitted it; ends after the last text's last event."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        self.cancelled = False
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._unfinished = request.n

    def deliver(self, event: Event) -> None:
        """Put an event in; in the loop's thread only."""
        self._events.append(event)
        self._arrived.set()

    def cancel(self) -> None:
        """Give the request up (from any thread): its rows leave at the next step; what is unfinished ends so."""
        self.cancelled = True

    def __aiter__(self) -> Stream:
        """The stream is its own iterator."""
        return self

    async def __anext__(self) -> Event:
        """The next event."""
        while not self._events:
            if not self._unfinished:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        self._unfinished -= event.finish_reason is not None
        return event
