"""From a request's prompts to texts: into the engine, through the guard, out as events or whole."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from yunque.errors import InputError
from yunque.runtime import GenerationOptions
from yunque.runtime.batch import new_tokens
from yunque.serving import problems
from yunque.serving.engine import Engine
from yunque.serving.guard import Guard
from yunque.serving.metrics import EngineMetrics
from yunque.serving.models import Served
from yunque.serving.problems import Problem
from yunque.serving.requests import Draining, EngineFailed, Event, QueueFull, Refused, Request, Stream, TokenLogprob
from yunque.serving.schemas import Safety, Usage
from yunque.serving.settings import ServerSettings

_LONG_TEXT_CHARS = 20_000
_LEAST_LOGPROB = -9999.0
_COLDEST = 1e-3
"""Below this temperature sampling is greedy search, and float32 has no room for the logits."""

Result = TypeVar("Result")


@dataclass
class Told:
    """What a request's log line tells."""

    request_id: str
    client: str
    fields: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, Any] = field(default_factory=dict)  # only logged when asked for


def told(request: HttpRequest) -> Told:
    """What the front keeps of this request."""
    kept = request.scope["yunque"]
    assert isinstance(kept, Told)
    return kept


@dataclass
class Choice:
    """One text in the making."""

    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: Any = None
    score: float | None = None

    def add(self, event: Event) -> None:
        """Take over an event."""
        self.text += event.text
        self.tokens += len(event.tokens)
        self.logprobs += event.logprobs or ()
        self.finish_reason = event.finish_reason
        self.score = event.score


@dataclass(frozen=True)
class Job:
    """Prompts (token ids), each wanted ``n`` times."""

    served: Served
    prompts: list[list[int]]
    options: GenerationOptions
    n: int
    deadline_s: float
    guard: Guard | None
    told: Told

    @property
    def prompt_tokens(self) -> int:
        """All prompts' tokens."""
        return sum(map(len, self.prompts))

    def usage(self, choices: Sequence[Choice]) -> Usage:
        """Token counts of a finished request; they go into its log line too."""
        made = sum(choice.tokens for choice in choices)
        self.told.fields |= {"prompt_tokens": self.prompt_tokens, "completion_tokens": made}
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=made, total_tokens=self.prompt_tokens + made)

    def safety(self, score: float | None) -> Safety | None:
        """The guard's word on a text."""
        if score is None or self.guard is None:
            return None
        return Safety(score=score, flagged=score >= self.guard.settings.threshold)

    def submit(self) -> Running:
        """Queue all prompts, or none.

        Raises:
            Problem: 400, 429 or 503.
        """
        engine = self.served.engine
        assert isinstance(engine, Engine)
        streams: list[Stream] = []
        self.told.fields |= {"model": self.served.name, "manifest_sha256": self.served.manifest_sha256[:16]}
        try:
            for prompt in self.prompts:
                request = Request(
                    prompt=prompt,
                    options=self.options,
                    deadline_s=self.deadline_s,
                    request_id=self.told.request_id,
                    client=self.told.client,
                    n=self.n,
                )
                streams.append(engine.submit(request))
        except (Refused, InputError) as error:
            for stream in streams:
                stream.cancel()
            raise refusal(error) from error
        return Running(self, streams, engine.metrics)


def refusal(error: Refused | InputError) -> Problem:
    """An engine's refusal as clients see it."""
    if isinstance(error, QueueFull):
        return problems.queue_full(error.retry_after_s)
    if isinstance(error, Draining):
        return problems.draining()
    if isinstance(error, EngineFailed):
        return Problem(503, "the model fails at every request", code="model_failed", headers={"Retry-After": "30"})
    param = str(error).partition(":")[0]
    return Problem(400, str(error), param=param if param.isidentifier() else None, code="invalid_value")


@dataclass(frozen=True)
class Running:
    """A job's streams; use as a context, which gives up what is unfinished."""

    job: Job
    streams: list[Stream]
    metrics: EngineMetrics

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *reason: object) -> None:
        for stream in self.streams:
            stream.cancel()

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """Events with the number of their choice: those of the first prompt first, then those of the second.

        Raises:
            Problem: 504 past the deadline; 503 when the server stops at once; 500.
        """
        guard = self.job.guard
        sources = [guard.watch(stream, self.metrics) if guard else stream for stream in self.streams]
        async with contextlib.aclosing(_merged(sources)) as merged:
            async for number, event in merged:
                if event.finish_reason == "deadline":
                    raise problems.deadline()
                if event.finish_reason == "cancelled":
                    raise problems.draining()
                if event.finish_reason == "error":
                    raise Problem(500, "the model failed on this request", code="model_error")
                yield number * self.job.n + event.index, event

    async def choices(self) -> list[Choice]:
        """All texts, finished."""
        choices = [Choice() for _ in range(len(self.streams) * self.job.n)]
        async with contextlib.aclosing(self.events()) as events:
            async for number, event in events:
                choices[number].add(event)
        self.job.told.texts["answers"] = [choice.text for choice in choices]
        return choices


async def _merged(sources: Sequence[AsyncIterator[Event]]) -> AsyncGenerator[tuple[int, Event], None]:
    """Events of several streams as they come, with the stream's number."""
    if len(sources) == 1:
        async for event in sources[0]:
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue(len(sources))

    async def read(number: int, source: AsyncIterator[Event]) -> None:
        try:
            async for event in source:
                await queue.put((number, event))
        except Exception as error:
            await queue.put((number, error))
        else:
            await queue.put((number, None))

    readers = [asyncio.create_task(read(number, source)) for number, source in enumerate(sources)]
    try:
        unfinished = len(readers)
        while unfinished:
            number, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                unfinished -= 1
            else:
                yield number, item
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def while_connected(request: HttpRequest, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled when the client goes away.

    Raises:
        ClientGone: it did.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- requests to jobs -------------------------------------------------------------------------------------------------


async def encode(served: Served, texts: Sequence[str], *, special_tokens: bool = True) -> list[list[int]]:
    """Token ids of ``texts``; long ones are cut into tokens beside the event loop."""
    tokenizer = served.model.tokenizer
    if sum(map(len, texts)) > _LONG_TEXT_CHARS:
        return await asyncio.to_thread(tokenizer.encode, texts, special_tokens=special_tokens)
    return tokenizer.encode(texts, special_tokens=special_tokens)


def check_prompts(served: Served, prompts: Sequence[Sequence[int]], settings: ServerSettings, param: str) -> None:
    """Check the prompts' lengths and tokens.

    Raises:
        Problem: 400, empty, too long, or a token that the model does not have.
    """
    for prompt in prompts:
        if not prompt:
            raise Problem(400, f"{param}: holds no token; give some text", param=param, code="invalid_value")
        if len(prompt) > settings.max_prompt_tokens:
            raise Problem(
                400, f"{param}: has {len(prompt)} tokens, this server takes {settings.max_prompt_tokens} at most",
                param=param, code="context_length_exceeded",
            )  # fmt: skip
        try:
            new_tokens(served.model.spec, prompt, GenerationOptions())
        except InputError as error:
            message = f"{param}{str(error).removeprefix('prompt')}"
            raise Problem(400, message, param=param, code="context_length_exceeded") from error
        if max(prompt) >= served.model.spec.vocab_size:
            raise Problem(400, f"{param}: the model has no token {max(prompt)}", param=param, code="invalid_value")


def check_amounts(settings: ServerSettings, tokens: int, choices: int, param: str) -> None:
    """Check how much text is asked for.

    Raises:
        Problem: 400, more than the server allows.
    """
    if tokens > settings.max_new_tokens:
        raise Problem(
            400, f"{param}: {tokens} is more than this server's {settings.max_new_tokens} at most",
            param=param, code="invalid_value",
        )  # fmt: skip
    if choices > settings.max_choices:
        raise Problem(
            400, f"n: prompts times n are {choices}, this server makes {settings.max_choices} at most",
            param="n", code="invalid_value",
        )  # fmt: skip


def deadline_s(request: HttpRequest, wanted_s: float | None, settings: ServerSettings) -> float:
    """Seconds for this request: of its ``timeout``, its ``X-Request-Timeout`` header or the server.

    Raises:
        Problem: 400, the header is no positive number.
    """
    text = request.headers.get("x-request-timeout")
    times = [settings.timeout_s, *([] if wanted_s is None else [wanted_s])]
    if text is not None:
        try:
            times.append(float(text))
        except ValueError:
            times.append(math.nan)
    if not all(time > 0 for time in times):
        raise Problem(400, "X-Request-Timeout: give seconds above 0", param="timeout", code="invalid_value")
    return min(times)


def sampled(temperature: float, top_p: float, seed: int | None, **options: Any) -> GenerationOptions:
    """OpenAI's parameters as the runtime's: a low temperature is greedy search, no seed is a random one.

    Raises:
        Problem: 400, a value that does not go.
    """
    try:
        return GenerationOptions(
            do_sample=temperature >= _COLDEST,
            temperature=max(temperature, _COLDEST),
            top_p=max(top_p, 1e-4),
            seed=secrets.randbits(63) if seed is None else seed % (1 << 63),
            **options,
        )
    except InputError as error:
        raise refusal(error) from error


def finite(logprob: float) -> float:
    """A log-probability that JSON has a number for."""
    return max(float(logprob), _LEAST_LOGPROB) if logprob == logprob else _LEAST_LOGPROB
