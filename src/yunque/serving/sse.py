"""Server-sent events: text that is made while it is sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from yunque.serving.generation import ClientGone, Running
from yunque.serving.problems import Problem

DONE = b"data: [DONE]\n\n"


def event(content: dict[str, Any]) -> bytes:
    """One event; only ASCII, so that no line end of any kind in a text ends the event."""
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Sends events as they come; when the client goes away, or is cut off, the request is given up at once.

    A client that does not read stops the sending: at most the transport's buffer and the tokens that the request may
    have are held for it, until the connection's write limit ends it.
    """

    media_type = "text/event-stream"

    def __init__(self, running: Running, events: AsyncGenerator[bytes, None], headers: dict[str, str]) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._running = running
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events.

        Raises:
            ClientGone: the client went away first.
        """
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_gone(receive))
        try:
            with self._running:
                await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not sending.done():
                    raise ClientGone
                sending.result()
        finally:
            sending.cancel()
            leaving.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        last = DONE
        async with contextlib.aclosing(self._events) as events:
            try:
                async for chunk in events:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except Problem as problem:  # the status has been sent: an event tells it
                self._running.job.told.fields["problem"] = problem.status
                last = event(problem.body)
        await send({"type": "http.response.body", "body": last, "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
