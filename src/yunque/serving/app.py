"""The ASGI application."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yunque.serving import logs, openapi, problems
from yunque.serving.generation import ClientGone, Told
from yunque.serving.page import page_routes
from yunque.serving.problems import Problem
from yunque.serving.routes import OPERATIONS, Access
from yunque.serving.security import check_host, request_id
from yunque.serving.service import Service
from yunque.serving.settings import ServerSettings

_CLIENT_GONE = 499  # nginx's word for it, in the log


def create_app(settings: ServerSettings) -> Starlette:
    """The application, whose models are loaded once it is started; ``app.state.service`` is its ``Service``.

    Raises:
        InputError: a key file that cannot be used.
    """
    service = Service(settings)
    operations = [each for each in OPERATIONS if each.access != "admin" or service.admin_keys]
    access: dict[str, Access] = {each.path: each.access for each in operations}
    routes = [Route(each.path, each.handler, methods=[each.method]) for each in operations]
    routes.append(Route("/openapi.json", _openapi, methods=["GET"]))
    pages = page_routes() if settings.playground else []
    access |= dict.fromkeys(("/openapi.json", *(page.path for page in pages)), "open")
    middleware = [Middleware(_Front, service=service, routes=[*routes, *pages], access=access)]
    if settings.cors_origins:
        # Outermost: a preflight request carries no key.
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
        middleware.insert(0, cors)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start_loading()
        yield
        service.registry.close()

    app = Starlette(
        routes=[*routes, *pages],
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={Problem: problems.answer_problem, HTTPException: _answer_http_exception},
    )
    app.state.service = service
    app.router.redirect_slashes = False
    return app


async def _openapi(request: Request) -> JSONResponse:
    """The OpenAPI document."""
    state = request.app.state
    state.service.check_ready()
    if not hasattr(state, "document"):
        state.document = openapi.document(state.service)
    return JSONResponse(state.document)


async def _answer_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Unknown routes and methods in the form of all errors."""
    assert isinstance(error, HTTPException)
    words = {404: "there is no such route", 405: "this route does not take this method"}
    message = words.get(error.status_code, error.detail)
    return Problem(error.status_code, message, code="invalid_route", headers=error.headers).response()


class _Front:
    """What every request meets first: its id, the keys, the end of the server; and what is told of it at the end."""

    def __init__(self, app: ASGIApp, service: Service, routes: list[Route], access: dict[str, Access]) -> None:
        self._app = app
        self._service = service
        self._routes = routes
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = scope["headers"]
        route = next((each.path for each in self._routes if each.matches(scope)[0] != Match.NONE), None)
        told = scope["yunque"] = Told(request_id(headers), _client(scope))
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = [(b"x-request-id", told.request_id.encode()), (b"x-content-type-options", b"nosniff")]
                if status >= 400 and any(name == b"expect" for name, _ in headers):
                    added.append((b"connection", b"close"))  # the client may send its body now, or may not
                message["headers"] = [*message.get("headers", []), *added]
            elif "first_byte_s" not in told.fields:
                told.fields["first_byte_s"] = round(time.perf_counter() - began, 6)
            await send(message)

        try:
            self._admit(route, headers)
            self._service.active += 1
            try:
                await self._app(scope, receive, sending)
            finally:
                self._service.active -= 1
        except Problem as refused:
            await refused.response()(scope, receive, sending)
        except ClientGone:
            status = _CLIENT_GONE
        except Exception:
            logs.LOGGER.exception("failed", extra={"fields": {"request_id": told.request_id}})
            if status == 0:
                problem = Problem(500, "the server failed on this request", code="internal_error")
                await problem.response()(scope, receive, sending)
            else:
                raise
        finally:
            self._tell(scope["method"], route, status or _CLIENT_GONE, time.perf_counter() - began, told)

    def _admit(self, route: str | None, headers: list[tuple[bytes, bytes]]) -> None:
        """Let a request pass, before its body is read.

        Raises:
            Problem: 400, 401, 431, 503.
        """
        access = self._access.get(route, "key") if route else "key"  # what is not known to be open needs a key
        service = self._service
        if sum(len(name) + len(value) for name, value in headers) > service.settings.max_header_bytes:
            raise Problem(431, "the headers are too large", code="headers_too_large")
        check_host(headers, service.settings.allowed_hosts)
        given = [value for name, value in headers if name == b"authorization"]
        if access == "admin":
            service.admin_keys.check(given)
        elif service.api_keys and (access == "key" or (access == "metrics" and service.settings.protect_metrics)):
            service.api_keys.check(given)
        if service.draining and access in ("key", "admin"):
            raise problems.draining()

    def _tell(self, method: str, route: str | None, status: int, seconds: float, told: Told) -> None:
        self._service.responses.labels(route or "none", status).inc()
        if route in ("/health", "/ready", "/metrics") and status < 400:
            return
        fields: dict[str, Any] = {
            "request_id": told.request_id,
            "method": method if method in ("GET", "POST", "HEAD") else "other",
            "route": route or "none",
            "status": status,
            "seconds": round(seconds, 6),
            **told.fields,
        }
        if self._service.settings.log_requests:
            fields |= told.texts
        logs.event("request", **fields)


def _client(scope: Scope) -> str:
    """Whom the fair queue takes turns over: a key's holder, or an address."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            return hashlib.blake2b(value, digest_size=8).hexdigest()
    return str(scope["client"][0]) if scope.get("client") else ""
