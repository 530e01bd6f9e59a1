"""OpenAI's routes: completions, chats and models."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from yunque.serving import exchange, schemas
from yunque.serving.chat import ChatRefused
from yunque.serving.generation import (
    Choice,
    Job,
    Running,
    check_amounts,
    check_prompts,
    deadline_s,
    encode,
    finite,
    sampled,
    told,
)
from yunque.serving.models import Served, UnknownModel
from yunque.serving.problems import Problem
from yunque.serving.requests import Event, TokenLogprob, TopLogprob
from yunque.serving.service import Service
from yunque.serving.sse import event

_COMPLETION_TOKENS = 16  # OpenAI's default


async def completions(request: Request) -> Response:
    """Continue texts."""
    service, wanted = await exchange.read(request, schemas.CompletionRequest)
    served = service.model(wanted.model, generates=True)
    prompts = await _prompts(served, wanted.prompt)
    told(request).texts["prompts"] = wanted.prompt
    tokens = wanted.max_tokens or _COMPLETION_TOKENS
    check_amounts(service.settings, tokens, len(prompts) * (wanted.n or 1), "max_tokens")
    check_prompts(served, prompts, service.settings, "prompt")
    running = _job(request, served, prompts, wanted, tokens, wanted.logprobs).submit()
    form = _Completions(running.job, wanted)
    return await exchange.answer(request, running, form.stream if wanted.stream else None, form.whole)


async def chat_completions(request: Request) -> Response:
    """Continue a conversation."""
    service, wanted = await exchange.read(request, schemas.ChatRequest)
    served = service.model(wanted.model, generates=True)
    if wanted.top_logprobs and not wanted.logprobs:
        raise Problem(400, "top_logprobs: needs logprobs: true", param="top_logprobs", code="invalid_value")
    chat = service.chat_format(served)
    if chat is None:
        raise Problem(400, f"model: {served.name} has no chat template; use /v1/completions", param="model")
    if chat.broken is not None:
        ways = "use /v1/completions, or serve with --chat_template plain"
        raise Problem(400, f"model: {served.name} takes no chats, {chat.broken}; {ways}", param="model")
    try:
        prompt = chat.render(wanted.messages)
    except ChatRefused as error:
        raise Problem(400, f"messages: {error}", param="messages", code="invalid_value") from error
    told(request).texts["prompts"] = prompt
    prompts = await encode(served, [prompt], special_tokens=chat.adds_special_tokens)
    asked = wanted.max_completion_tokens or wanted.max_tokens
    tokens = asked or min(service.settings.default_chat_tokens, service.settings.max_new_tokens)
    param = "max_completion_tokens" if wanted.max_completion_tokens else "max_tokens"
    check_amounts(service.settings, tokens, wanted.n or 1, param)
    check_prompts(served, prompts, service.settings, "messages")
    top = (wanted.top_logprobs or 0) if wanted.logprobs else None
    running = _job(request, served, prompts, wanted, tokens, top).submit()
    form = _Chats(running.job, wanted)
    return await exchange.answer(request, running, form.stream if wanted.stream else None, form.whole)


async def models(request: Request) -> Response:
    """List the served models."""
    service: Service = request.app.state.service
    service.check_ready()
    served = [service.registry.get(name) for name in service.registry.names]
    return JSONResponse(schemas.ModelList(data=[_model(each) for each in served]).model_dump())


async def model(request: Request) -> Response:
    """Tell of one served model."""
    service: Service = request.app.state.service
    service.check_ready()
    try:
        served = service.registry.get(request.path_params["model"])
    except UnknownModel as error:
        raise Problem(404, str(error), param="model", code="model_not_found") from error
    return exchange.json(_model(served).model_dump(), served)


def _model(served: Served) -> schemas.Model:
    return schemas.Model.model_validate(
        {
            "id": served.name,
            "created": served.created,
            "kind": served.kind,
            "manifest_sha256": served.manifest_sha256,
        }
    )


async def _prompts(served: Served, prompt: Any) -> list[list[int]]:
    """Token ids of a request's prompt, whichever of its four forms it has."""
    if isinstance(prompt, str):
        return await encode(served, [prompt])
    if isinstance(prompt[0], str):
        return await encode(served, prompt)
    return [prompt] if isinstance(prompt[0], int) else list(prompt)


def _job(
    request: Request,
    served: Served,
    prompts: list[list[int]],
    wanted: schemas.Sampling,
    tokens: int,
    top_logprobs: int | None,
) -> Job:
    """The engine's job for a request; ``top_logprobs`` None asks for no log-probabilities."""
    service: Service = request.app.state.service
    stop = wanted.stop or []
    options = sampled(
        1.0 if wanted.temperature is None else wanted.temperature,
        1.0 if wanted.top_p is None else wanted.top_p,
        wanted.seed,
        max_new_tokens=tokens,
        top_k=wanted.top_k or 0,
        repetition_penalty=wanted.repetition_penalty or 1.0,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=top_logprobs is not None,
        top_logprobs=top_logprobs or 0,
    )
    limit_s = deadline_s(request, wanted.timeout, service.settings)
    return Job(served, prompts, options, wanted.n or 1, limit_s, service.guard(), told(request))


# --- forms of the answer ----------------------------------------------------------------------------------------------


class _Form:
    """One answer: the fields that all its parts share, and what a stream sends."""

    prefix: str
    chunk_object: str

    def __init__(self, job: Job, wanted: schemas.Sampling) -> None:
        self.job = job
        self.tells_usage = bool(wanted.stream_options and wanted.stream_options.include_usage)
        self.head = {
            "id": f"{self.prefix}-{job.told.request_id}",
            "created": int(time.time()),
            "model": job.served.name,
            "system_fingerprint": job.served.manifest_sha256,
        }

    async def stream(self, running: Running) -> AsyncGenerator[bytes, None]:
        """The answer's events."""
        choices = [Choice() for _ in range(len(running.streams) * self.job.n)]
        for number in range(len(choices)):
            for first in self.begin(number):
                yield self._event([first])
        async with contextlib.aclosing(running.events()) as events:
            async for number, news in events:
                choices[number].add(news)
                if news.text or news.logprobs or news.finish_reason:
                    yield self._event([self.part(number, news)])
        usage = self.job.usage(choices).model_dump()
        self.job.told.texts["answers"] = [choice.text for choice in choices]
        if self.tells_usage:
            yield self._event([], usage)

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        content = {**self.head, "object": self.chunk_object, "choices": choices}
        return event({**content, "usage": usage} if self.tells_usage else content)

    def begin(self, number: int) -> list[dict[str, Any]]:
        """What comes before a choice's text."""
        return []

    def part(self, number: int, news: Event) -> dict[str, Any]:
        """One event's choice."""
        raise NotImplementedError

    def _safety(self, news: Event | Choice) -> dict[str, Any]:
        safety = self.job.safety(news.score)
        return {"safety": safety.model_dump()} if safety else {}


class _Completions(_Form):
    prefix = "cmpl"
    chunk_object = "text_completion"

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer at once."""
        return {
            **self.head,
            "object": "text_completion",
            "choices": [
                {
                    "index": number,
                    "text": choice.text,
                    "logprobs": self._logprobs(choice.logprobs),
                    "finish_reason": choice.finish_reason,
                    **self._safety(choice),
                }
                for number, choice in enumerate(choices)
            ],
            "usage": self.job.usage(choices).model_dump(),
        }

    def part(self, number: int, news: Event) -> dict[str, Any]:
        return {
            "index": number,
            "text": news.text,
            "logprobs": self._logprobs(news.logprobs or ()),
            "finish_reason": news.finish_reason,
            **self._safety(news),
        }

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """The legacy form."""
        options = self.job.options
        if not options.logprobs:
            return None
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [_by_text(token) for token in tokens] if options.top_logprobs else None,
            "text_offset": [token.offset for token in tokens],
        }


def _by_text(token: TokenLogprob) -> dict[str, float]:
    """The log-probabilities of a place, the chosen token's too; one that reads as another is named by its id."""
    named = {token.text: finite(token.logprob)}
    for each in token.top:
        if each.token != token.token:
            name = f"token_id:{each.token}" if each.text in named else each.text
            named[name] = finite(each.logprob)
    return dict(sorted(named.items(), key=lambda item: -item[1]))


class _Chats(_Form):
    prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer at once."""
        return {
            **self.head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": number,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._logprobs(choice.logprobs),
                    "finish_reason": choice.finish_reason,
                    **self._safety(choice),
                }
                for number, choice in enumerate(choices)
            ],
            "usage": self.job.usage(choices).model_dump(),
        }

    def begin(self, number: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": number, "delta": delta, "logprobs": None, "finish_reason": None}]

    def part(self, number: int, news: Event) -> dict[str, Any]:
        return {
            "index": number,
            "delta": {"content": news.text} if news.text or news.logprobs else {},
            "logprobs": self._logprobs(news.logprobs or ()) if news.logprobs else None,
            "finish_reason": news.finish_reason,
            **self._safety(news),
        }

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.job.options.logprobs:
            return None
        return {"content": [{**_top(token), "top_logprobs": [_top(each) for each in token.top]} for token in tokens]}


def _top(token: TopLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": finite(token.logprob), "bytes": list(token.bytes)}
