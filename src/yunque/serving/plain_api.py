"""The project's own routes: generate, classify, swap; health, readiness and metrics."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from yunque.errors import InputError
from yunque.runtime import GenerationOptions
from yunque.serving import exchange, problems, schemas
from yunque.serving.classifier_engine import ClassifierEngine
from yunque.serving.generation import (
    Choice,
    Job,
    Running,
    check_amounts,
    check_prompts,
    deadline_s,
    encode,
    finite,
    refusal,
    told,
    while_connected,
)
from yunque.serving.problems import Problem
from yunque.serving.requests import DeadlinePassed, Refused
from yunque.serving.sse import event

_GENERATE_TOKENS = 64


async def generate(request: Request) -> Response:
    """Answer prompts with the runtime's own options."""
    service, wanted = await exchange.read(request, schemas.GenerateRequest)
    served = service.model(wanted.model, generates=True)
    texts = [wanted.prompt] if isinstance(wanted.prompt, str) else wanted.prompt
    told(request).texts["prompts"] = texts
    tokens = wanted.max_new_tokens or min(_GENERATE_TOKENS, service.settings.max_new_tokens)
    check_amounts(service.settings, max(tokens, wanted.min_new_tokens or 0), len(texts), "max_new_tokens")
    prompts = await encode(served, texts)
    check_prompts(served, prompts, service.settings, "prompt")
    others = {"prompt", "model", "stream", "timeout", "max_new_tokens", "stop"}
    given = wanted.model_dump(exclude=others, exclude_none=True)
    try:
        options = GenerationOptions(max_new_tokens=tokens, stop=tuple(wanted.stop or ()), **given)
    except InputError as error:
        raise refusal(error) from error
    limit_s = deadline_s(request, wanted.timeout, service.settings)
    running = Job(served, prompts, options, 1, limit_s, service.guard(), told(request)).submit()
    return await exchange.answer(request, running, _stream if wanted.stream else None, partial(_whole, running.job))


def _whole(job: Job, choices: list[Choice]) -> dict[str, Any]:
    head = {"model": job.served.name, "manifest_sha256": job.served.manifest_sha256}
    answers = [_answer(job, number, choice) for number, choice in enumerate(choices)]
    return {**head, "answers": answers, "usage": job.usage(choices).model_dump()}


def _answer(job: Job, number: int, choice: Choice) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "index": number,
        "text": choice.text,
        "tokens": choice.tokens,
        "finish_reason": choice.finish_reason,
    }
    if job.options.logprobs:
        answer["logprobs"] = [finite(token.logprob) for token in choice.logprobs]
    if (safety := job.safety(choice.score)) is not None:
        answer["safety"] = safety.model_dump()
    return answer


async def _stream(running: Running) -> AsyncGenerator[bytes, None]:
    """Events with an answer's new text; its last one holds the rest of what ``/generate`` tells of it."""
    choices = [Choice() for _ in running.streams]
    async with contextlib.aclosing(running.events()) as events:
        async for number, news in events:
            choices[number].add(news)
            if news.finish_reason:
                yield event({**_answer(running.job, number, choices[number]), "text": news.text})
            elif news.text:
                yield event({"index": number, "text": news.text, "finish_reason": None})
    yield event({"usage": running.job.usage(choices).model_dump()})


async def classify(request: Request) -> Response:
    """Label texts."""
    service, wanted = await exchange.read(request, schemas.ClassifyRequest)
    served = service.model(wanted.model, generates=False)
    texts = [wanted.text] if isinstance(wanted.text, str) else wanted.text
    if len(texts) > service.settings.max_texts:
        raise Problem(
            400, f"text: {len(texts)} texts, this server takes {service.settings.max_texts} at most", param="text"
        )
    # A tokenizer without special tokens makes none of some texts, which no model reads.
    if not (await encode(served, [""]))[0] and not all(await encode(served, texts)):
        raise Problem(400, "text: holds no token; give some text", param="text", code="invalid_value")
    kept = told(request)
    kept.texts["prompts"] = texts
    kept.fields |= {"model": served.name, "texts": len(texts), "manifest_sha256": served.manifest_sha256[:16]}
    limit_s = deadline_s(request, wanted.timeout, service.settings)
    assert isinstance(served.engine, ClassifierEngine)
    try:
        found = await while_connected(request, served.engine.classify(texts, client=kept.client, deadline_s=limit_s))
    except (Refused, InputError) as error:
        raise refusal(error) from error
    except DeadlinePassed as error:
        raise problems.deadline() from error
    results = [{"label": _best(each), "probabilities": each} for each in found]
    content = {"model": served.name, "manifest_sha256": served.manifest_sha256, "results": results}
    return exchange.json(content, served)


def _best(probabilities: dict[str, float]) -> str:
    return max(probabilities, key=lambda label: probabilities[label])


async def swap(request: Request) -> Response:
    """Serve a model from another configured folder, or from its own read again."""
    service, wanted = await exchange.read(request, schemas.SwapRequest)
    service.check_ready()
    served = await asyncio.to_thread(service.swap, wanted.model, wanted.folder)
    content = {"model": served.name, "manifest_sha256": served.manifest_sha256}
    return exchange.json(content, served)


async def health(request: Request) -> Response:
    """Tell that the process answers."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """Tell whether requests are taken."""
    status = request.app.state.service.status
    return JSONResponse({"status": status}, 200 if status == "ready" else 503)


async def metrics(request: Request) -> Response:
    """All instruments in Prometheus' text format."""
    instruments = request.app.state.service.metrics
    return Response(instruments.exposition(), media_type=instruments.content_type)
