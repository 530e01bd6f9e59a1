"""A stand-in for the server: answers of a script, streamed as OpenAI's API does, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route


@dataclass
class Script:
    """What the stand-in does; ``asked`` and ``left`` are what it saw."""

    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "fp32"}])
    answers: dict[str, list[str]] = field(default_factory=dict)
    key: str = ""
    step_s: float = 0.0
    slots: int = 1000
    break_after: int | None = None
    refusal: tuple[int, str] | None = None
    metrics: str = ""
    toxicity: dict[str, float] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    started_s: list[float] = field(default_factory=list)
    left: int = 0
    free: asyncio.Semaphore | None = None


def _error(status: int, message: str, **headers: str) -> JSONResponse:
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return JSONResponse(body, status, headers)


def app(script: Script, mounts: list[Mount]) -> Starlette:
    def refused(request: Request) -> Response | None:
        if script.key and request.headers.get("authorization") != f"Bearer {script.key}":
            return _error(401, "no such key")
        if script.refusal:
            return _error(*script.refusal, **{"Retry-After": "3"})
        return None

    async def models(request: Request) -> Response:
        return refused(request) or JSONResponse({"object": "list", "data": script.models})

    async def completions(request: Request) -> Response:
        if (answer := refused(request)) is not None:
            return answer
        asked = await request.json()
        script.asked.append(asked)
        script.started_s.append(time.perf_counter())
        return StreamingResponse(_stream(script, asked), media_type="text/event-stream")

    async def classify(request: Request) -> Response:
        asked = await request.json()
        script.asked.append(asked)
        found = [script.toxicity.get(text, 0.01) for text in asked["text"]]
        results = [
            {"label": "hate" if each > 0.5 else "nothate", "probabilities": {"nothate": 1 - each, "hate": each}}
            for each in found
        ]
        return JSONResponse({"model": asked["model"], "results": results})

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(script.metrics)

    routes = [
        Route("/v1/models", models),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/classify", classify, methods=["POST"]),
        Route("/metrics", metrics),
    ]
    return Starlette(routes=[*routes, *mounts])


async def _stream(script: Script, asked: dict[str, Any]) -> Any:
    script.free = script.free or asyncio.Semaphore(script.slots)
    pieces = script.answers.get(asked.get("model", ""), ["one ", "two ", "three"])
    done = False
    try:
        async with script.free:
            for number, piece in enumerate(pieces):
                await asyncio.sleep(script.step_s)
                if number == script.break_after:
                    raise RuntimeError("the stand-in breaks off")
                reason = "stop" if number == len(pieces) - 1 else None
                yield _event({"choices": [{"index": 0, "text": piece, "finish_reason": reason}]})
        if asked.get("stream_options", {}).get("include_usage"):
            yield _event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(pieces)}})
        yield "data: [DONE]\n\n"
        done = True
    finally:
        script.left += not done


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


@contextlib.contextmanager
def serving(script: Script, *mounts: Mount) -> Iterator[str]:
    """The stand-in's address while it runs."""
    config = uvicorn.Config(app(script, list(mounts)), port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
