"""All routes in one table: the router and the OpenAPI document are made from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from yunque.serving import openai_api, plain_api, schemas

Access = Literal["open", "key", "admin", "metrics"]

_ASKING = (400, 408, 413, 415, 431)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One route: who may use it, what it takes and what it answers, errors (of OpenAI's form) by status."""

    method: Literal["GET", "POST"]
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    access: Access
    takes: type[BaseModel] | None = None
    gives: type[BaseModel] | None = None  # None: plain text
    streams: bool = False
    otherwise: tuple[tuple[int, type[BaseModel]], ...] = ()  # further statuses with bodies of their own
    errors: tuple[int, ...] = ()


OPERATIONS = (
    Operation(
        method="POST", path="/v1/completions", handler=openai_api.completions, access="key",
        takes=schemas.CompletionRequest, gives=schemas.Completion, streams=True,
        errors=(*_ASKING, 401, 404, 429, 500, 503, 504),
    ),
    Operation(
        method="POST", path="/v1/chat/completions", handler=openai_api.chat_completions, access="key",
        takes=schemas.ChatRequest, gives=schemas.ChatCompletion, streams=True,
        errors=(*_ASKING, 401, 404, 429, 500, 503, 504),
    ),
    Operation(
        method="GET", path="/v1/models", handler=openai_api.models, access="key", gives=schemas.ModelList,
        errors=(401, 503),
    ),
    Operation(
        method="GET", path="/v1/models/{model}", handler=openai_api.model, access="key", gives=schemas.Model,
        errors=(401, 404, 503),
    ),
    Operation(
        method="POST", path="/generate", handler=plain_api.generate, access="key", takes=schemas.GenerateRequest,
        gives=schemas.Generated, streams=True, errors=(*_ASKING, 401, 404, 429, 500, 503, 504),
    ),
    Operation(
        method="POST", path="/classify", handler=plain_api.classify, access="key", takes=schemas.ClassifyRequest,
        gives=schemas.Classified, errors=(*_ASKING, 401, 404, 429, 500, 503, 504),
    ),
    Operation(
        method="POST", path="/admin/swap", handler=plain_api.swap, access="admin", takes=schemas.SwapRequest,
        gives=schemas.Swapped, errors=(*_ASKING, 401, 404, 409, 500, 503),
    ),
    Operation(
        method="GET", path="/health", handler=plain_api.health, access="open", gives=schemas.Health,
    ),
    Operation(
        method="GET", path="/ready", handler=plain_api.ready, access="open", gives=schemas.Health,
        otherwise=((503, schemas.Health),),
    ),
    Operation(method="GET", path="/metrics", handler=plain_api.metrics, access="metrics", errors=(401,)),
)  # fmt: skip
