"""A light client of any OpenAI-compatible server: h11 over asyncio, with the time of every piece of an answer."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11

from yunque.errors import InputError

_READ_BYTES = 65536
_MAX_EVENT_BYTES = 1 << 20


@dataclass
class Outcome:
    """One request: seconds are of ``time.perf_counter``; ``scheduled_s`` is when it should have been sent."""

    scheduled_s: float
    sent_s: float = 0.0
    end_s: float = 0.0
    pieces_s: list[float] = field(default_factory=list)
    """When each piece of text came."""
    tokens: int = 0
    prompt_tokens: int = 0
    text: str = ""
    rejected: str = ""
    """Why the server did not take it: its status and code, such as ``429 queue_full``."""
    failed: str = ""
    """Why it broke after it was taken, or was never answered."""
    prompt: str = ""

    @property
    def ok(self) -> bool:
        """Whether the whole answer came."""
        return not (self.rejected or self.failed)


class Client:
    """Requests to one server, each over a connection of its own, as users far apart would send them."""

    def __init__(self, url: str, *, key: str = "", timeout_s: float = 300.0) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"--url {url}: not an address of a server; give http://HOST:PORT")
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.base = parts.path.rstrip("/").removesuffix("/v1")
        self.timeout_s = timeout_s
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = [("host", parts.netloc.rpartition("@")[2]), ("connection", "close")]
        if key:
            self._headers.append(("authorization", f"Bearer {key}"))

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET.

        Raises:
            OSError: no connection; TimeoutError is one too.
        """
        async with asyncio.timeout(self.timeout_s), self._send("GET", path, b"") as (answer, parts):
            return answer.status_code, b"".join([part async for part in parts])

    async def complete(self, path: str, body: Mapping[str, Any], outcome: Outcome) -> None:
        """Stream one answer into ``outcome``; what goes wrong is noted there, never raised."""
        outcome.sent_s = time.perf_counter()
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + self.timeout_s):
                await self._stream(path, body, outcome)
        except TimeoutError:
            outcome.failed = "timeout of the client"
        except ConnectionRefusedError:
            outcome.failed = "connection refused"
        except (OSError, EOFError) as error:
            outcome.failed = f"connection lost: {type(error).__name__}"
        except (h11.ProtocolError, ValueError, KeyError) as error:
            outcome.failed = f"not an answer: {type(error).__name__}"
        outcome.end_s = time.perf_counter()

    async def _stream(self, path: str, body: Mapping[str, Any], outcome: Outcome) -> None:
        data = json.dumps(body, separators=(",", ":")).encode()
        async with self._send("POST", path, data) as (answer, parts):
            if answer.status_code != 200:
                outcome.rejected = _refusal(answer.status_code, b"".join([part async for part in parts]))
                return
            ended = False
            async for event in _events(parts):
                now = time.perf_counter()
                if event == b"[DONE]":
                    ended = True
                    continue
                _note(json.loads(event), now, outcome)
            if not ended and not outcome.failed:
                outcome.failed = "the stream ended early"
        if not outcome.tokens:
            outcome.tokens = len(outcome.pieces_s)

    @asynccontextmanager
    async def _send(
        self, method: str, path: str, body: bytes
    ) -> AsyncIterator[tuple[h11.Response, AsyncIterator[bytes]]]:
        reader, writer = await asyncio.open_connection(self.host, self.port, ssl=self._tls)
        try:
            connection = h11.Connection(h11.CLIENT)
            headers = [*self._headers, ("content-length", str(len(body)))]
            if body:
                headers.append(("content-type", "application/json"))
            request = h11.Request(method=method, target=self.base + path, headers=headers)
            sent = [connection.send(request), connection.send(h11.Data(data=body)), connection.send(h11.EndOfMessage())]
            writer.write(b"".join(part or b"" for part in sent))
            answer = await _next_event(connection, reader)
            while isinstance(answer, h11.InformationalResponse):
                answer = await _next_event(connection, reader)
            yield answer, _body(connection, reader)
        finally:
            writer.transport.abort()  # nothing is left to be sent


async def _next_event(connection: h11.Connection, reader: asyncio.StreamReader) -> Any:
    while (event := connection.next_event()) is h11.NEED_DATA:
        data = await reader.read(_READ_BYTES)
        connection.receive_data(data)
        if not data and connection.their_state is h11.SEND_RESPONSE:
            raise EOFError
    if isinstance(event, h11.ConnectionClosed):
        raise EOFError
    return event


async def _body(connection: h11.Connection, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while not isinstance(event := await _next_event(connection, reader), h11.EndOfMessage):
        yield bytes(event.data)


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each server-sent event."""
    left = b""
    async for part in parts:
        left += part.replace(b"\r\n", b"\n")
        if len(left) > _MAX_EVENT_BYTES:
            raise ValueError("an event without end")
        *blocks, left = left.split(b"\n\n")
        for block in blocks:
            data = [line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:")]
            if data:
                yield b"\n".join(data)


def _note(event: Mapping[str, Any], now: float, outcome: Outcome) -> None:
    if "error" in event:
        outcome.failed = f"error in the stream: {event['error'].get('code') or event['error'].get('type')}"
        return
    if usage := event.get("usage"):
        outcome.tokens, outcome.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
    for choice in event.get("choices") or ():
        text = choice.get("text") or (choice.get("delta") or {}).get("content")
        if text:
            outcome.pieces_s.append(now)
            outcome.text += text


def _refusal(status: int, body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        code = error.get("code") or error.get("type")
    except (ValueError, KeyError, TypeError, AttributeError):
        code = None
    return f"{status} {code}" if code else str(status)
