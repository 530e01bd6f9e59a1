"""The server's process: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn

from yunque.errors import CheckFailed, InputError
from yunque.serving import logs
from yunque.serving.app import create_app
from yunque.serving.protocol import Patience, patient_protocol
from yunque.serving.service import Service
from yunque.serving.settings import ServerSettings, parse_settings

_FLUSH_S = 5
"""Time for the last bytes of finished answers to leave."""


def main(argv: Sequence[str], prog: str) -> None:
    """Serve what ``argv`` says until a signal; SIGHUP reads the same settings again.

    Raises:
        InputError: settings, a model folder or a port that cannot be used.
        CheckFailed: running requests were cut off at the end.
    """
    run(parse_settings(argv, prog), lambda: parse_settings(argv, prog))


def run(settings: ServerSettings, read_again: Callable[[], ServerSettings] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; a second one does not wait for running requests.

    Raises:
        InputError: a model folder or a port that cannot be used.
        CheckFailed: running requests were cut off at the end.
    """
    for name, folder in settings.models.items():
        if not folder.is_dir():
            raise InputError(f"{name}: {folder}: no such folder")
    logs.configure(show_messages=settings.log_requests)
    app = create_app(settings)
    service: Service = app.state.service
    listener = _listen(settings.host, settings.port)
    if not service.api_keys and not settings.host.startswith("127.") and settings.host not in ("localhost", "::1"):
        logs.LOGGER.warning("open to the network without an API key; give --api_key_file")
    config = uvicorn.Config(
        app,
        http=patient_protocol(Patience(settings.header_timeout_s, settings.body_timeout_s, settings.write_timeout_s)),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=_FLUSH_S,
        h11_max_incomplete_event_size=settings.max_header_bytes,
    )
    server = _Server(config, service, read_again)
    host, port = listener.getsockname()[:2]
    logs.event("listening", url=f"http://{f'[{host}]' if ':' in host else host}:{port}", models=list(settings.models))
    server.run(sockets=[listener])
    logs.flush()  # so that an error is a line of its own
    if service.failure is not None:
        raise service.failure
    if server.cut_off:
        raise CheckFailed(f"stopped with {server.cut_off} requests cut off; raise --drain_timeout_s to let them finish")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise InputError(f"port: cannot listen on {host}:{port}: {error.strerror}; take another --port") from error
    return listener


class _Server(uvicorn.Server):
    """Uvicorn that goes on answering (with 503) while running requests finish."""

    def __init__(
        self, config: uvicorn.Config, service: Service, read_again: Callable[[], ServerSettings] | None
    ) -> None:
        super().__init__(config)
        self.cut_off = 0
        self._service = service
        self._read_again = read_again
        self._ending: asyncio.Task[None] | None = None
        self._reloading: asyncio.Task[None] | None = None
        service.on_failure = self._stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        if self._read_again is not None:
            loop.add_signal_handler(signal.SIGHUP, self._reload)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal before the start is over."""
        self._stop()

    def _stop(self) -> None:
        self.should_exit = True

    def _end(self) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self._drain())
        else:
            logs.event("hurrying")
            self._hurry()

    async def _drain(self) -> None:
        """Let what was accepted finish, then stop."""
        service, limit_s = self._service, self._service.settings.drain_timeout_s
        service.draining = True  # from here on all new requests get 503, before they reach an engine
        logs.event("draining", timeout_s=limit_s, active=service.active)
        end = time.monotonic() + limit_s
        while service.active and time.monotonic() < end and not self.should_exit:
            await asyncio.sleep(0.02)
        self._hurry()

    def _hurry(self) -> None:
        self.cut_off = self.cut_off or self._service.active
        self._stop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.cut_off:
            await asyncio.to_thread(self._service.registry.close)  # running requests end, and are told so
        await super().shutdown(sockets)
        logs.event("stopped", cut_off=self.cut_off)

    def _reload(self) -> None:
        if self._reloading is None or self._reloading.done():
            self._reloading = asyncio.create_task(self._read_settings())

    async def _read_settings(self) -> None:
        assert self._read_again is not None
        try:
            await asyncio.to_thread(self._service.reload, self._read_again())
        except Exception as error:
            reason = str(error) if isinstance(error, InputError) else type(error).__name__
            logs.event("reload_failed", reason=reason)
        else:
            logs.event("reloaded")
