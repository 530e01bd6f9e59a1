"""Errors as clients see them: OpenAI's form for all of them."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import JSONResponse

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class Problem(Exception):
    """An answer that is an error: its status, what is wrong, the field at fault and a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The answer's JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status, self.headers)


async def answer_problem(request: Request, error: Exception) -> JSONResponse:
    """Answer a ``Problem`` that a handler raised."""
    assert isinstance(error, Problem)
    return error.response()


def draining() -> Problem:
    """The server is going down."""
    return Problem(503, "the server is stopping; try another one", code="draining", headers={"Retry-After": "2"})


def queue_full(retry_after_s: float) -> Problem:
    """Too much is waiting already."""
    seconds = max(1, round(retry_after_s))
    return Problem(
        429,
        f"too many requests are waiting; try again in {seconds} s",
        code="queue_full",
        headers={"Retry-After": str(seconds)},
    )


def deadline() -> Problem:
    """The time for an answer is over; trying again would only add to the load."""
    return Problem(
        504, "timeout: the answer was not finished in time", param="timeout", code="deadline_exceeded",
        headers={"x-should-retry": "false"},
    )  # fmt: skip
