"""The server as a user starts it: a process of serve/server.py in which torch and transformers cannot be imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
FORBIDDEN = ("torch", "transformers")


class Server:
    """A server process, its address and its log; a context that ends it."""

    def __init__(self, blocked: Path, *options, environment=None, wait=True):
        for name in FORBIDDEN:
            (blocked / f"{name}.py").write_text("raise ImportError('blocked by the test')\n")
        path = os.pathsep.join([str(blocked), str(ROOT / "src")])
        self.process = subprocess.Popen(
            [sys.executable, "serve/server.py", *map(str, options)],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | (environment or {}),
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.began, self.log, self.url, self.ready_s, self.ready_ticks = time.monotonic(), [], None, None, None
        self.reading = threading.Event()  # cleared: the log is read no further
        self.reading.set()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        if wait:
            self.wait_for("ready")
            self.ready_s = time.monotonic() - self.began
            with open(f"/proc/{self.process.pid}/stat") as file:
                self.ready_ticks = sum(map(int, file.read().rsplit(")")[-1].split()[11:13]))

    def _read(self):
        for line in self.process.stderr:
            self.reading.wait()
            entry = json.loads(line) if line.startswith("{") else {"event": "text", "text": line.strip()}
            if entry["event"] == "listening":
                self.url = entry["url"]
            self.log.append(entry)

    def events(self, name):
        """The log's entries of one event."""
        return [entry for entry in list(self.log) if entry["event"] == name]

    def wait_for(self, name, *, count=1, limit_s=60):
        """Wait until an event is in the log, so many times."""
        end = time.monotonic() + limit_s
        while len(self.events(name)) < count:
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"no {name}: {self.log[-5:]}")
            time.sleep(0.01)
        return self.events(name)[-1]

    def client(self, **options):
        """A plain HTTP client."""
        return httpx.Client(base_url=self.url, timeout=60, **options)

    @property
    def address(self):
        """Host and port."""
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def send(self, number):
        """Send a signal."""
        self.process.send_signal(number)

    def end(self, limit_s=30):
        """Wait for the end; the exit code."""
        code = self.process.wait(limit_s)
        self.reader.join(5)
        return code

    def __enter__(self):
        return self

    def __exit__(self, *reason):
        if self.process.poll() is None:
            self.send(signal.SIGKILL)
        self.reading.set()
        self.end()
