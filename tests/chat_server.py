"""An OpenAI-compatible endpoint on this machine that answers, fails and hangs as a test tells it to."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG_S = 2.0
CODES = {"500": 500, "429": 429, "401": 401, "404": 404, "redirect": 302}
GARBAGE = {
    "garbage": b"<html>not json</html>",
    "list": b"[]",
    "no choices": b'{"choices": []}',
    "number": b'{"choices": [{"message": {"content": 3}, "text": 3}]}',
}


class ChatServer(ThreadingHTTPServer):
    """Keeps what it was asked; ``troubles`` are used up one per request, ``always`` stays."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.troubles: list[str] = []
        self.always: str | None = None
        self.reply: Callable[[str], str | None] = lambda prompt: f"reply {len(prompt)}"
        self.lock = threading.Lock()

    def trouble(self) -> str | None:
        with self.lock:
            return self.always or (self.troubles.pop(0) if self.troubles else None)


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.headers.append(dict(self.headers))
            self.server.paths.append(self.path)
        trouble = self.server.trouble()
        if trouble == "hang":
            time.sleep(HANG_S)
            return
        if trouble == "cut":  # promises more bytes than it sends
            self._send(200, b'{"choices"', length=1000)
        elif trouble in CODES:
            self._send(CODES[trouble], b'{"error": "so it goes"}')
        elif trouble in GARBAGE:
            self._send(200, GARBAGE[trouble])
        else:
            prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
            text = self.server.reply(prompt)
            choice = {"message": {"role": "assistant", "content": text}, "text": text}
            self._send(200, json.dumps({"choices": [choice]}).encode())

    def _send(self, code: int, content: bytes, length: int | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(length or len(content)))
        if code == 302:
            self.send_header("Location", "http://127.0.0.1:9/stolen")
        if code == 429:
            self.send_header("Retry-After", "0.2")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
