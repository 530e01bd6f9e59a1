"""100,000 requests with one or several things wrong, beside a client whose answers must not change.

Schemathesis makes a dozen cases a second out of the document (tests/serving/test_server.py runs some hundred of them);
these are made by changing requests that are right, thousands a second, from one seed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import string

import pytest
from served import Server

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "100000"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
CONNECTIONS = 16
RIGHT = {200, 204, 400, 404, 405, 413, 414, 415, 422, 431}
NEIGHBOUR = {"model": "t5", "prompt": "w3 w4 w5", "max_tokens": 8, "temperature": 0}

VALID = [
    ("/v1/completions", {"model": "llama", "prompt": "w3 w4", "max_tokens": 2, "temperature": 0.5, "seed": 1, "n": 2,
                         "top_p": 0.9, "stop": ["w9"], "logprobs": 2, "stream": False, "user": "me"}),
    ("/v1/completions", {"model": "t5", "prompt": ["w3", "w5 w6"], "max_tokens": 2, "stream": True,
                         "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"model": "llama", "prompt": [3, 4, 5], "max_tokens": 1, "timeout": 5}),
    ("/v1/chat/completions", {"model": "llama", "messages": [{"role": "user", "content": "w3 w4"}], "max_tokens": 2}),
    ("/generate", {"model": "t5", "prompts": ["w3"], "max_new_tokens": 2}),
    ("/classify", {"model": "judge", "texts": ["w3 w4", "w5"]}),
]  # fmt: skip
JUNK = [
    *(None, True, False, 0, -1, 1, 10**9, 10**30, -(2**63), 2**64, 0.5, 1e308, -1e-308, "", " ", "0", "null"),
    *("\x00", "\ud800", "é" * 300, "w3 " * 3000, "../../etc/passwd", "{{7*7}}", "data: x\n\n", "\r\nX-Evil: 1"),
    *([], [[]], [None], [-1], [10**9], ["w3"] * 100, {}, {"a": {"b": {"c": []}}}, [[1, 2], [3]], [1.5], [True]),
]
STRANGE_PATHS = ("/", "/v1/none", "/v1/models/" + "a" * 200, "/%2e%2e/%2e%2e/etc/passwd", "/metrics", "/health")
LITERALS = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"[" * 2000, b'{"a":' * 500, b"\xff\xfe", b"'x'", b"")


def places(value, path=()):
    """Paths of all nodes of a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def changed(rng, value, path):
    """A copy of ``value`` in which the node at ``path`` is junk, gone, doubled or has a stranger beside it."""
    copy = json.loads(json.dumps(value))
    if not path:
        return rng.choice(JUNK)
    *above, last = path
    parent = copy
    for key in above:
        parent = parent[key]
    kind = rng.randrange(5)
    if kind == 0 and isinstance(parent, dict):
        del parent[last]
    elif kind == 1 and isinstance(parent, dict):
        parent["".join(rng.choices(string.printable, k=rng.randrange(1, 20)))] = rng.choice(JUNK)
    elif kind == 2 and isinstance(parent, list):
        parent.extend([parent[last]] * rng.randrange(1, 40))
    else:
        parent[last] = rng.choice(JUNK)
    return copy


def request(rng):
    """Bytes of one HTTP request that asks to keep the connection."""
    path, body = rng.choice(VALID)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        body = changed(rng, body, rng.choice([*places(body)]))
    data = json.dumps(body).encode()
    if rng.random() < 0.15:  # no longer JSON, or not what JSON allows
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(LITERALS) + data[at + rng.randrange(4) :]
    if rng.random() < 0.05:
        path = rng.choice(STRANGE_PATHS)
    method = rng.choice(("POST",) * 20 + ("GET", "PUT", "DELETE", "OPTIONS"))
    headers = ["Host: localhost", f"Content-Length: {len(data)}"]
    headers.append(rng.choice(("Content-Type: application/json",) * 9 + ("Content-Type: text/plain",)))
    if rng.random() < 0.05:
        headers.append(f"X-Request-Id: {''.join(rng.choices(string.ascii_letters + '/<>; ', k=rng.randrange(1, 90)))}")
    return f"{method} {path} HTTP/1.1\r\n".encode() + "\r\n".join(headers).encode() + b"\r\n\r\n" + data


async def answer(reader):
    """Status of an answer that is read to its end, and whether the connection goes on."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    status = int(head.split(" ", 2)[1])
    if "transfer-encoding: chunked" in head:
        while (size := int(await reader.readline(), 16)) > 0:
            await reader.readexactly(size + 2)
        await reader.readline()
    elif "content-length:" in head:
        await reader.readexactly(int(head.split("content-length:")[1].split("\r\n")[0]))
    return status, "connection: close" not in head


async def connection(address, numbers, statuses):
    """Send the requests of these numbers one after another; count statuses, keep what is a server's fault."""
    reader = writer = None
    for number in numbers:
        if writer is None:
            reader, writer = await asyncio.open_connection(*address)
        data = request(random.Random(f"{SEED}-{number}"))
        try:
            writer.write(data)
            status, goes_on = await asyncio.wait_for(answer(reader), 60)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            status, goes_on = type(error).__name__, False
        statuses.setdefault(status, []).append(number)
        if not goes_on:
            writer.close()
            writer = None


async def neighbour(address, done):
    """Answers to one greedy request, again and again."""
    body = json.dumps(NEIGHBOUR).encode()
    found = []
    while not done.is_set():
        reader, writer = await asyncio.open_connection(*address)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        content = (await reader.read()).partition(b"\r\n\r\n")[2]
        found.append(json.loads(content)["choices"][0]["text"])
        writer.close()
        await asyncio.sleep(0.2)
    return found


async def storm(address, count):
    statuses, done = {}, asyncio.Event()
    beside = asyncio.create_task(neighbour(address, done))
    await asyncio.gather(
        *(connection(address, range(first, count, CONNECTIONS), statuses) for first in range(CONNECTIONS))
    )
    done.set()
    return statuses, await beside


def check(exported, tmp_path, count):
    folders = {"llama": exported("llama_grouped"), "t5": exported("t5_untied"), "judge": exported("roberta")}
    alone = folders["t5"].runtime.generate([NEIGHBOUR["prompt"]], max_new_tokens=NEIGHBOUR["max_tokens"])[0].text
    models = [f"{name}={each.folder}" for name, each in folders.items()]
    with Server(tmp_path, *models, "--port", 0, "--threads", 1, "--max_queued", 512, "--max_new_tokens", 16) as server:
        statuses, answers = asyncio.run(storm(server.address, count))
        assert server.process.poll() is None
        metrics = server.client().get("/metrics").text
        server.send(15)
        assert server.end() == 0
    faults = {status: numbers[:5] for status, numbers in statuses.items() if status not in RIGHT}
    assert not faults, faults  # numbers of requests: request(random.Random(f"{SEED}-{number}"))
    assert {200, 400, 404, 405} <= statuses.keys()
    assert set(answers) == {alone}
    left = [line for line in metrics.splitlines() if line.startswith(("yunque_running", "yunque_queued"))]
    assert left
    assert all(line.endswith(" 0.0") for line in left), left


def test_wrong_requests_are_the_client_s_fault(exported, tmp_path):
    check(exported, tmp_path, 300)


@pytest.mark.slow
def test_a_hundred_thousand_wrong_requests(exported, tmp_path):
    check(exported, tmp_path, REQUESTS)
