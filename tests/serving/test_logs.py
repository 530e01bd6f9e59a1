"""The server's log: what nobody reads stops no answer, and what is lost is counted."""

import fcntl
import json
import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from exported import exported, prompts  # noqa: F401
from served import Server

from yunque.serving import logs

PIPE_BYTES = 4096


@pytest.fixture
def pipe():
    """Both ends of a pipe that holds a page; the test closes them."""
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return ends


def logger_of(handler):
    handler.setFormatter(logs.JsonFormatter(show_messages=False))
    logger = logging.Logger("of the test")
    logger.addHandler(handler)
    return logger


def test_a_server_whose_log_nobody_reads_answers_and_ends(exported, tmp_path):  # noqa: F811
    with Server(tmp_path, f"m={exported('llama').folder}", "--port", 0, "--threads", 1) as server:
        fcntl.fcntl(server.process.stderr.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        server.reading.clear()
        with server.client() as client:
            client.timeout = 20
            for _ in range(100):
                answer = client.post("/generate", json={"prompt": "w3 w4", "max_new_tokens": 2})
                assert answer.status_code == 200
        server.send(signal.SIGTERM)
        assert server.process.wait(20) == 0
        server.reading.set()
    assert 0 < len(server.events("request")) < 100  # what the pipe held


def test_what_does_not_fit_is_dropped_and_counted(pipe, monkeypatch):
    monkeypatch.setattr(logs, "_FLUSH_S", 60)  # until all is written, however slow the machine
    reader, writer = pipe
    handler = logs.BackgroundHandler(writer, most=8)
    logger = logger_of(handler)
    for number in range(200):
        logger.info("line", extra={"fields": {"number": number, "filling": "x" * 100}})
    with ThreadPoolExecutor(1) as pool, open(reader) as file:
        reading = pool.submit(lambda: [json.loads(line) for line in file])
        handler.flush()
        logger.info("last")
        handler.flush()
        os.close(writer)
        *lines, last = reading.result()
    assert last["event"] == "last"
    # The writing thread decides by its pace where lines are lost, and whether more than once.
    kept = 0
    for line, following in zip(lines, [*lines[1:], {"number": 200}], strict=True):
        if line["event"] == "log_dropped":
            assert (line["lines"], line["level"]) == (following["number"] - kept, "warning")
        else:
            assert line["number"] >= kept
            kept += 1
    assert kept >= 8
    assert lines[-1]["event"] == "log_dropped"


def test_a_log_that_cannot_be_written_is_counted_too(pipe):
    reader, writer = pipe
    os.close(reader)
    handler = logs.BackgroundHandler(writer, most=8)
    for _ in range(2):
        logger_of(handler).info("line")
        handler.flush()
    os.close(writer)
    assert handler.dropped == 3  # and the line that told of the first
