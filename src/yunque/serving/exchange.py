"""What the routes of models share: a request read by its schema, an answer sent whole or as events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from yunque.serving.generation import Choice, Running, while_connected
from yunque.serving.models import Served
from yunque.serving.security import parse, read_body
from yunque.serving.service import Service
from yunque.serving.sse import EventStream

Wanted = TypeVar("Wanted", bound=BaseModel)


async def read(request: Request, kind: type[Wanted]) -> tuple[Service, Wanted]:
    """The service, and what the request's body asks of it.

    Raises:
        Problem: 400, 413, 415, as ``read_body`` and ``parse``.
    """
    service: Service = request.app.state.service
    return service, parse(kind, await read_body(request, service.settings.max_body_bytes))


async def answer(
    request: Request,
    running: Running,
    events: Callable[[Running], AsyncGenerator[bytes, None]] | None,
    whole: Callable[[list[Choice]], dict[str, Any]],
) -> Response:
    """The texts as ``events`` or, where that is None, at once as ``whole`` puts them."""
    served = running.job.served
    if events is not None:
        return EventStream(running, events(running), _manifest(served))
    with running:
        choices = await while_connected(request, running.choices())
    return json(whole(choices), served)


def json(content: dict[str, Any], served: Served) -> JSONResponse:
    """An answer that names the model folder it is of."""
    return JSONResponse(content, headers=_manifest(served))


def _manifest(served: Served) -> dict[str, str]:
    return {"x-yunque-manifest": served.manifest_sha256}
