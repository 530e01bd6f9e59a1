"""The application over engines that write numbered words, in a thread of the test's process.

Only for what a real engine cannot be made to do on demand: texts without end, full queues, failures; and to see
whether a request reached the engine at all. What needs a model is tested on real ones in test_server.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import uvicorn

from yunque.serving import app as application
from yunque.serving import service
from yunque.serving.classifier_engine import ClassifierEngine
from yunque.serving.engine import Engine
from yunque.serving.metrics import EngineMetrics
from yunque.serving.models import Served, UnknownModel
from yunque.serving.protocol import Patience, patient_protocol
from yunque.serving.requests import Event, QueueFull, Stream
from yunque.serving.settings import validate

WORD = "wörd\n "  # a line end, which must not end a server-sent event


class FakeStream(Stream):
    def cancel(self):
        if not self.task.done():
            self.engine.cancelled.append(self.request)
            self.task.cancel()


class FakeEngine(Engine):
    """Writes ``WORD`` every ``step_s``; ``submitted`` and ``cancelled`` are what it saw."""

    def __init__(self, metrics):
        self.metrics = EngineMetrics(metrics, "fake")
        self.reset()

    def reset(self):
        self.submitted, self.cancelled, self.steps = [], [], 0
        self.refusal, self.failure, self.step_s = None, None, 0.0

    def submit(self, request):
        if self.refusal:
            raise self.refusal
        self.submitted.append(request)
        stream = FakeStream(request)
        stream.engine, stream.task = self, asyncio.get_running_loop().create_task(self.write(stream, request))
        return stream

    async def write(self, stream, request):
        began = time.monotonic()
        for number in range(last := request.options.max_new_tokens):
            await asyncio.sleep(self.step_s)
            self.steps += 1
            reason = "length" if number + 1 == last else None
            if time.monotonic() - began > request.deadline_s:
                reason = "deadline"
            for index in range(request.n):
                stream.deliver(Event(WORD, (number % 64,), None, self.failure or reason, index))
            if reason or self.failure:
                return


class FakeClassifier(ClassifierEngine):
    def __init__(self):
        self.classified = []

    async def classify(self, texts, *, client="", deadline_s=None):
        self.classified += texts
        return [{"nothate": 0.75, "hate": 0.25}] * len(texts)


class FakeRegistry:
    """A generator "fake" and a classifier "judge"."""

    def __init__(self, folders, metrics, *settings):
        tokenizer = SimpleNamespace(
            encode=lambda texts, special_tokens=True: [[3] * len(text.split()) for text in texts]
        )
        spec = SimpleNamespace(kind="causal", vocab_size=64, max_positions=2048)
        model = SimpleNamespace(tokenizer=tokenizer, spec=spec)
        judge = SimpleNamespace(tokenizer=tokenizer, spec=SimpleNamespace(kind="classifier", vocab_size=64))
        self.engine, self.classifier = FakeEngine(metrics), FakeClassifier()
        self.served = {
            "fake": Served("fake", Path("nowhere"), "ab" * 32, 1, model, self.engine),
            "judge": Served("judge", Path("nowhere"), "cd" * 32, 1, judge, self.classifier),
        }
        self.ready, self.swaps = False, []

    names = ("fake", "judge")

    def load(self):
        self.ready = True

    def get(self, name):
        if name not in self.served:
            raise UnknownModel(name, list(self.served))
        return self.served[name]

    def swap(self, name, folder):
        self.swaps.append((name, folder))
        return self.served[name]

    def close(self):
        pass


@contextlib.contextmanager
def serving(monkeypatch, **settings):
    """The application's service and its address, with connections as patient as a test is."""
    monkeypatch.setattr(service, "Registry", FakeRegistry)
    chosen = validate({"models": {"fake": "nowhere", "judge": "nowhere"}, **settings})
    app = application.create_app(chosen)
    patience = Patience(chosen.header_timeout_s, chosen.body_timeout_s, chosen.write_timeout_s)
    config = uvicorn.Config(
        app, http=patient_protocol(patience), ws="none", log_config=None, access_log=False, port=0,
        h11_max_incomplete_event_size=chosen.max_header_bytes, timeout_graceful_shutdown=1,
        timeout_keep_alive=chosen.keep_alive_s,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not (server.started and app.state.service.registry.ready):
        time.sleep(0.005)
    # A small buffer of the system: a client that does not read is felt after kilobytes, not megabytes.
    server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    try:
        yield app.state.service, server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join(10)


def exchange(address, data, *, timeout_s=5.0):
    """Everything the server sends in answer to raw bytes, until it closes or is silent for ``timeout_s``."""
    with socket.create_connection(address, timeout=timeout_s) as connection:
        if data:
            connection.sendall(data)
        received = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while chunk := connection.recv(65536):
                received += chunk
        return received


__all__ = ["WORD", "FakeEngine", "QueueFull", "exchange", "serving"]
