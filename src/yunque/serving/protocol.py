"""HTTP connections that time slow clients, where Uvicorn times idle ones alone, and that close without a reset."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from yunque.serving.problems import Problem


@dataclass(frozen=True)
class Patience:
    """Seconds that a client may take."""

    headers_s: float
    body_s: float
    write_s: float  # for a client that does not read what is sent to it


def patient_protocol(patience: Patience) -> type[H11Protocol]:
    """Uvicorn's protocol class with the time limits of ``patience``."""
    return type("PatientProtocol", (_Protocol,), {"patience": patience})


class _Transport:
    """A transport whose ``close`` lets a client that still sends read the answer.

    A socket closed with bytes unread resets the connection, and the client's system drops the answer. So only the
    sending side is closed; what comes is thrown away until the client closes its own, or the time for a body is over.
    """

    def __init__(self, transport: asyncio.Transport, protocol: _Protocol) -> None:
        self._inner = transport
        self._protocol = protocol
        self.lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def is_closing(self) -> bool:
        """Whether nothing can be sent any more."""
        return self.lingers or self._inner.is_closing()

    def close(self) -> None:
        """Close, at once when called again."""
        if self.is_closing() or not self._protocol.client_sends:
            self._inner.close()
            return
        self.lingers = True
        self._protocol.loop.call_later(self._protocol.patience.body_s, self._inner.close)
        try:
            self._inner.write_eof()
        except OSError:  # the client is gone
            self._inner.close()
        else:
            self._inner.resume_reading()


class _Protocol(H11Protocol):
    patience: Patience
    transport: _Transport  # type: ignore[assignment]
    _reading: asyncio.TimerHandle | None = None
    _awaited: Any = None  # what of a request is being waited for: h11.IDLE its head, h11.SEND_BODY its body
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        self._await(h11.IDLE)

    def connection_lost(self, exc: Exception | None) -> None:
        self._await(None)
        self._stop_writing_timer()
        super().connection_lost(exc)

    @property
    def client_sends(self) -> bool:
        """Whether more of a request may be on its way."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def data_received(self, data: bytes) -> None:
        if not self.transport.lingers:
            super().data_received(data)
            self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        state = self.conn.their_state
        if state is h11.IDLE:  # between requests Uvicorn's keep-alive limit holds until the first byte
            self._await(h11.IDLE if self.conn.trailing_data[0] else None)
        else:
            self._await(h11.SEND_BODY if state is h11.SEND_BODY else None)

    def _await(self, awaited: Any) -> None:
        if awaited is self._awaited:
            return
        self._awaited = awaited
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        if awaited is not None:
            limit = self.patience.headers_s if awaited is h11.IDLE else self.patience.body_s
            self._reading = self.loop.call_later(limit, self._give_up_reading)

    def _give_up_reading(self) -> None:
        if self._awaited is h11.IDLE and not self.conn.trailing_data[0]:
            self.transport.close()  # never said a word
        else:
            self._refuse(Problem(408, "the request did not arrive in time", code="request_timeout"))
            self.transport.close()  # its time is over

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self.patience.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_writing_timer()
        super().resume_writing()

    def _stop_writing_timer(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def send_400_response(self, msg: str) -> None:
        error = sys.exc_info()[1]  # called while h11's error is handled
        status = getattr(error, "error_status_hint", 400)
        hints = {431: "the headers are too large", 501: "this Transfer-Encoding is not supported"}
        self._refuse(Problem(status, hints.get(status, "not a valid HTTP request"), code="invalid_http"))

    def _refuse(self, problem: Problem) -> None:
        """Answer without the application and close; close alone where an answer has begun."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(problem.body).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (
                h11.Response(status_code=problem.status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
