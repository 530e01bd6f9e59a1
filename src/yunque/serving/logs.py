"""Logs of one JSON object per line, without anything a client wrote unless asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any

LOGGER = logging.getLogger("yunque.serving")


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


def configure(*, show_messages: bool) -> None:
    """Send the server's and Uvicorn's records to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(show_messages=show_messages))
    for logger, level in ((LOGGER, logging.INFO), (logging.getLogger("uvicorn"), logging.WARNING)):
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


def event(name: str, **fields: Any) -> None:
    """Log that something happened."""
    LOGGER.info(name, extra={"fields": fields})
