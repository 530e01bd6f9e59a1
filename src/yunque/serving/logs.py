"""Logs of one JSON object per line, without anything a client wrote unless asked for."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import traceback
from collections import deque
from typing import Any

LOGGER = logging.getLogger("yunque.serving")

_STANDARD_ERROR = 2
_MOST_LINES = 10_000
_FLUSH_S = 2.0


class JsonFormatter(logging.Formatter):
    """A record as JSON: what ``extra={"fields": ...}`` gives, and where an exception came from."""

    def __init__(self, *, show_messages: bool) -> None:
        super().__init__()
        self._show_messages = show_messages

    def format(self, record: logging.LogRecord) -> str:
        """One line, in which newlines of the content are escaped."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage().strip(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info and (error := record.exc_info[1]) is not None:
            # The message of an exception may quote a prompt; its place in the code does not.
            line["exception"] = type(error).__name__
            if self._show_messages:
                line["message"] = str(error)
            frames = traceback.extract_tb(error.__traceback__)
            line["frames"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-8:]]
        return json.dumps(line, ensure_ascii=False, default=str)


class BackgroundHandler(logging.Handler):
    """Writes lines to a file descriptor in a thread of its own, so that a log which nobody reads stops no answer.

    Lines that come while ``most`` wait, or that cannot be written, are lost; the next line that is not, is preceded by
    how many were lost since the start.
    """

    def __init__(self, descriptor: int, most: int = _MOST_LINES) -> None:
        super().__init__()
        self.dropped = 0
        self._told = 0
        self._descriptor = descriptor
        self._most = most
        self._lines: deque[str] = deque()  # the first is being written
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Let a line wait, or drop it."""
        line = self.format(record)
        with self._changed:
            if len(self._lines) >= self._most:
                self.dropped += 1
                return
            if self.dropped > self._told:
                self._told = self.dropped
                self._lines.append(self.format(self._lost()))
            self._lines.append(line)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all is written, but not for ever."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines, _FLUSH_S)

    def _lost(self) -> logging.LogRecord:
        fields = {"lines": self.dropped}
        return logging.makeLogRecord({"levelname": "WARNING", "msg": "log_dropped", "fields": fields})

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                data = f"{self._lines[0]}\n".encode(errors="backslashreplace")
            is_written = self._write(data)
            with self._changed:
                self.dropped += not is_written
                self._lines.popleft()
                self._changed.notify_all()

    def _write(self, data: bytes) -> bool:
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:  # its reader is gone, or the disk is full
            return False
        return True


def configure(*, show_messages: bool) -> None:
    """Send the server's and Uvicorn's records to standard error as JSON lines."""
    handler = BackgroundHandler(_STANDARD_ERROR)
    handler.setFormatter(JsonFormatter(show_messages=show_messages))
    for logger, level in ((LOGGER, logging.INFO), (logging.getLogger("uvicorn"), logging.WARNING)):
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


def flush() -> None:
    """Wait until all that was logged is written, but not for ever."""
    for handler in LOGGER.handlers:
        handler.flush()


def event(name: str, **fields: Any) -> None:
    """Log that something happened."""
    LOGGER.info(name, extra={"fields": fields})
