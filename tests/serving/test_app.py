"""The application over engines of numbered words (fake_served): limits, keys, errors, rude clients."""

import contextlib
import gzip
import http.client
import json
import logging
import os
import socket
import time

import httpx
import pytest
from fake_served import WORD, exchange, serving
from openai.types.chat import ChatCompletionMessage

from yunque.serving import logs, problems
from yunque.serving.requests import Draining, QueueFull

SAYS_X = {"role": "user", "content": "x"}
KEY, ADMIN = "a-key-for-the-tests-of-the-app", "an-admin-key-for-the-same-tests"
HELLO = {"model": "fake", "prompt": "a b c", "max_tokens": 3}


@pytest.fixture(scope="module")
def one_server():
    with pytest.MonkeyPatch.context() as monkeypatch, serving(
        monkeypatch, header_timeout_s=0.3, body_timeout_s=0.4, write_timeout_s=0.5, max_body_bytes=200_000,
        max_new_tokens=100_000, timeout_s=5, keep_alive_s=1,
    ) as served:  # fmt: skip
        yield served


@pytest.fixture
def open_server(one_server):
    """One server without keys for all tests, as it was at its start."""
    service, _ = one_server
    settings = service.settings
    yield one_server
    service.settings, service.draining = settings, False
    service.registry.engine.reset()


@pytest.fixture
def service(open_server):
    return open_server[0]


@pytest.fixture
def engine(service):
    return service.registry.engine


@pytest.fixture
def client(open_server):
    with httpx.Client(base_url="http://{}:{}".format(*open_server[1]), timeout=5) as client:
        yield client


def ask(client, path="/v1/completions", **changed):
    return client.post(path, json={**HELLO, **changed})


def events(response):
    """The data of a stream's events."""
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


def until(condition, limit_s=3.0):
    """Wait until a condition holds; says whether it did."""
    end = time.monotonic() + limit_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


# --- answers ----------------------------------------------------------------------------------------------------------


def test_every_answer_names_the_manifest_and_the_request(client):
    answer = client.post("/v1/completions", json=HELLO, headers={"X-Request-Id": "mine-1"})
    assert answer.json()["system_fingerprint"] == answer.headers["x-yunque-manifest"] == "ab" * 32
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["id"] == "cmpl-mine-1"
    assert answer.json()["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert client.get("/v1/models/judge").headers["x-yunque-manifest"] == "cd" * 32


def test_line_ends_of_a_text_do_not_end_its_event(client):
    *parts, usage, done = events(
        ask(client, stream=True, n=2, prompt=["a", "b"], stream_options={"include_usage": True})
    )
    assert done == "[DONE]"
    texts = {}
    for part in parts:
        (choice,) = part["choices"]
        assert part["usage"] is None
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == dict.fromkeys(range(4), WORD * 3)
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14}


def test_seed_and_temperature_reach_the_engine(client, engine):
    ask(client, temperature=0, seed=-1)
    ask(client, temperature=0.5, top_p=0)
    ask(client)
    greedy, sampled, default = (request.options for request in engine.submitted)
    assert not greedy.do_sample
    assert greedy.seed == 2**63 - 1
    assert (sampled.do_sample, sampled.temperature) == (True, 0.5)
    assert 0 < sampled.top_p < 0.001
    assert default.do_sample  # OpenAI's default temperature is 1
    assert default.seed != sampled.seed


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "changed", "status", "param"),
    [
        ("/v1/completions", {"max_tokens": 10**9}, 400, "max_tokens"),
        ("/v1/completions", {"n": 33}, 400, "n"),
        ("/v1/completions", {"prompt": "x " * 2049}, 400, "prompt"),
        ("/v1/completions", {"prompt": "   "}, 400, "prompt"),
        ("/v1/completions", {"prompt": [64]}, 400, "prompt"),
        ("/v1/completions", {"model": "../../etc/passwd"}, 404, "model"),
        ("/v1/completions", {"model": "judge"}, 404, "model"),
        ("/v1/completions", {"timeout": 0}, 400, "timeout"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x " * 2049}]}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [SAYS_X], "top_logprobs": 2}, 400, "top_logprobs"),
        ("/generate", {"max_new_tokens": 3, "min_new_tokens": 4}, 400, "min_new_tokens"),
        ("/generate", {"model": "judge"}, 404, "model"),
        ("/classify", {"text": "x", "model": "fake"}, 404, "model"),
        ("/classify", {"text": ["x"] * 257}, 400, "text"),
        ("/v1/nothing", {}, 404, None),
    ],
)  # fmt: skip
def test_refusals_name_the_field_and_reach_no_engine(client, engine, path, changed, status, param):
    shared = {"/v1/completions": HELLO, "/v1/chat/completions": {"model": "fake"}, "/generate": {"prompt": "x"}}
    answer = client.post(path, json={**shared.get(path, {}), **changed})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert not engine.submitted


def test_full_queue_and_drain(client, service, engine):
    engine.refusal = QueueFull(7)
    answer = ask(client)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert answer.json()["error"]["code"] == "queue_full"
    engine.refusal = Draining()
    assert ask(client, stream=True).status_code == 503
    engine.refusal = None
    service.draining = True
    answer = ask(client)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
    assert answer.headers["retry-after"] == "2"
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200
    assert not engine.submitted


def test_a_full_queue_takes_back_the_prompts_before(client, engine, monkeypatch):
    engine.step_s, submit = 5.0, engine.submit

    def second_is_refused(request):
        if engine.submitted:
            raise QueueFull(1)
        return submit(request)

    monkeypatch.setattr(engine, "submit", second_is_refused)
    assert ask(client, prompt=["a", "b"]).status_code == 429
    assert engine.cancelled == engine.submitted


@pytest.mark.parametrize(("failure", "status"), [("error", 500), ("cancelled", 503), ("deadline", 504)])
def test_failures_of_the_engine(client, engine, failure, status):
    engine.failure = failure
    answer = ask(client)
    assert answer.status_code == status
    *_, last = events(ask(client, stream=True))
    assert last == answer.json()  # the stream's last event tells it, and no [DONE] follows
    assert (status == 504) == (answer.headers.get("x-should-retry") == "false")


@pytest.mark.parametrize("how", ["field", "header", "server"])
def test_deadlines(client, engine, service, how):
    engine.step_s = 0.01
    service.settings = service.settings.model_copy(update={"timeout_s": 0.1 if how == "server" else 5.0})
    given = {"timeout": 0.1} if how == "field" else {}
    headers = {"X-Request-Timeout": "0.1"} if how == "header" else {}
    answer = client.post("/v1/completions", json={**HELLO, "max_tokens": 1000, **given}, headers=headers)
    assert answer.status_code == 504
    assert engine.submitted[0].deadline_s == 0.1
    refused = client.post("/v1/completions", json=HELLO, headers={"X-Request-Timeout": "nan"})
    assert refused.status_code == 400


# --- keys -------------------------------------------------------------------------------------------------------------

PROTECTED = [
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/generate"), ("POST", "/classify"),
    ("GET", "/v1/models"), ("GET", "/v1/models/fake"), ("GET", "/metrics"), ("POST", "/admin/swap"), ("GET", "/none"),
    ("POST", "//v1/completions"), ("POST", "/v1/../v1/completions"), ("POST", "/health/../v1/completions"),
    ("POST", "/%76%31/completions"), ("POST", "/V1/completions"), ("POST", "/v1/completions/"),
]  # fmt: skip


@pytest.fixture
def closed_server(monkeypatch):
    monkeypatch.setenv("YUNQUE_API_KEYS", f"{KEY},another-{KEY}")
    monkeypatch.setenv("YUNQUE_ADMIN_KEYS", ADMIN)
    with serving(monkeypatch, protect_metrics=True, folders={"next": "/somewhere"}) as served:
        yield served


def test_without_a_key_nothing_reaches_an_engine(closed_server):
    service, address = closed_server
    body = json.dumps(HELLO)
    for method, path in PROTECTED:
        for key in (None, "Bearer ", f"Bearer {KEY}x", f"Basic {KEY}"):
            header = f"Authorization: {key}\r\n" if key else ""
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}"
            data = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            assert exchange(address, data.encode()).startswith(b"HTTP/1.1 401 "), (method, path, key)
    registry = service.registry
    assert not registry.engine.submitted
    assert not registry.classifier.classified
    assert not registry.swaps


def test_a_body_without_a_key_is_not_read(closed_server):
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n"
    assert exchange(closed_server[1], head.encode(), timeout_s=0.5).startswith(b"HTTP/1.1 401 ")


def test_keys_open_what_they_are_for(closed_server):
    service, address = closed_server
    with httpx.Client(base_url="http://{}:{}".format(*address)) as client:
        for key in (KEY, f"another-{KEY}"):
            client.headers["Authorization"] = f"Bearer {key}"
            assert ask(client).status_code == 200
        swap = {"model": "fake", "folder": "next"}
        assert client.post("/admin/swap", json=swap).status_code == 401
        assert service.registry.engine.submitted[0].client != service.registry.engine.submitted[1].client
        client.headers["Authorization"] = f"Bearer {ADMIN}"
        assert ask(client).status_code == 401
        assert client.post("/admin/swap", json=swap).json()["model"] == "fake"
        for wrong in ("/etc", "../next", "nowhere"):
            assert client.post("/admin/swap", json={"model": "fake", "folder": wrong}).status_code == 404
        assert [(name, str(folder)) for name, folder in service.registry.swaps] == [("fake", "/somewhere")]
        del client.headers["Authorization"]
        for path in ("/health", "/ready", "/openapi.json", "/"):
            assert client.get(path).status_code == 200


def test_no_admin_route_without_admin_keys(client):
    assert client.post("/admin/swap", json={"model": "fake"}).status_code == 404


# --- rude clients -----------------------------------------------------------------------------------------------------


def head(length=None, *, path="/v1/completions", more=""):
    length = f"Content-Length: {length}\r\n" if length is not None else ""
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{more}{length}\r\n".encode()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", b"400"),  # a TLS greeting
        (b"GARBAGE\r\n\r\n", b"400"),
        (b"GET / HTTP/x\r\nHost: x\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (head(0, more="Content-Length: 5\r\n"), b"400"),
        (head(-1), b"400"),
        (head("9" * 15), b"413"),
        (head(more="Transfer-Encoding: gzip\r\n"), b"501"),
        (head(more="Transfer-Encoding: chunked\r\n") + b"zz\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 17_000 + b"\r\n\r\n", b"431"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 90_000, b"431"),
        (head(10) + b"{", b"408"),
        (b"POST /v1/comp", b"408"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea", b"200"),
        (head(more="Transfer-Encoding: chunked\r\n") + b"1\r\n{\r\n" * 3, b"408"),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}", b"415"),
        (b"GET /..%2f..%2f..%2fetc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"404"),
        (b"GET /page/../app.py HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"404"),
        (b"GET /health%0d%0aSet-Cookie:x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"404"),
    ],
)  # fmt: skip
def test_what_is_no_proper_request(open_server, data, status):
    answer = exchange(open_server[1], data)
    assert answer.startswith(b"HTTP/1.1 " + status), answer
    assert b"set-cookie" not in answer.lower()
    assert exchange(open_server[1], b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_large_bodies_are_refused_before_they_are_sent_and_while(open_server, engine):
    assert exchange(open_server[1], head(10 << 20)).startswith(b"HTTP/1.1 413")
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    pieces = [head(more="Transfer-Encoding: chunked\r\n"), *[chunk] * 200]
    assert pieces_taken(open_server[1], pieces, 0.02) < 100  # what is thrown away comes for 0.4 s at most
    assert not engine.submitted


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
@pytest.mark.parametrize(
    ("path", "kind", "status"),
    [
        ("/v1/completions", "application/json", 413),
        ("/v1/completions", "text/plain", 415),
        ("/v1/nothing", "application/json", 404),
        ("/health", "application/json", 405),
    ],
)
def test_an_answer_before_the_body_reaches_a_client_that_still_sends(open_server, path, kind, status, connection):
    """`http.client` is the harshest one: it reads no answer after a failed write."""
    assert early_answers(open_server[1], path, {"Content-Type": kind, "Connection": connection}) == [status] * 30


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_an_answer_without_a_key_reaches_a_client_that_still_sends(closed_server, connection):
    headers = {"Content-Type": "application/json", "Connection": connection}
    assert early_answers(closed_server[1], "/v1/completions", headers) == [401] * 30


def early_answers(address, path, headers):
    """Statuses of bodies of 2 MB, each sent on a connection that was used before."""
    statuses = []
    for _ in range(30):
        with contextlib.closing(http.client.HTTPConnection(*address, timeout=5)) as client:
            client.request("GET", "/health")
            client.getresponse().read()
            client.request("POST", path, b" " * 2_000_000, headers)
            statuses.append(client.getresponse().status)
    return statuses


def test_a_client_that_waits_to_send_its_body_is_told_that_the_connection_ends(open_server):
    answer = exchange(open_server[1], head(9 << 20, more="Expect: 100-continue\r\n", path="/nothing"))
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize(
    ("encoding", "content", "status"),
    [
        ("gzip", gzip.compress(json.dumps(HELLO).encode()), 200),
        ("GZIP", gzip.compress(json.dumps(HELLO).encode()[:9]) + gzip.compress(json.dumps(HELLO).encode()[9:]), 200),
        ("identity", json.dumps(HELLO).encode(), 200),
        ("gzip", gzip.compress(b" " * 50_000_000), 413),
        ("gzip", gzip.compress(json.dumps(HELLO).encode())[:30], 400),
        ("gzip", b"\x1f\x8b\x08\x00" + b"\xff" * 60, 400),
        ("gzip", json.dumps(HELLO).encode(), 400),
        ("br", json.dumps(HELLO).encode(), 415),
    ],
)
def test_packed_bodies(client, encoding, content, status):
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    answer = client.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == status, answer.text


def test_what_answers_hold_is_taken_back(client):
    """An answer's message as the openai client dumps it; keys that other servers or their clients add."""
    said = ChatCompletionMessage(role="assistant", content="y").model_dump()
    part = {"type": "text", "text": "z", "cache_control": {"type": "ephemeral"}}
    messages = [SAYS_X, {**said, "reasoning_content": "so"}, {"role": "user", "content": [part]}]
    options = dict.fromkeys(("temperature", "stop", "tools", "stream_options", "reasoning_effort", "verbosity"))
    answer = client.post("/v1/chat/completions", json={"model": "fake", "messages": messages, **options})
    assert answer.status_code == 200, answer.text
    nulls = dict.fromkeys(("do_sample", "temperature", "top_k", "seed", "stop", "logprobs", "stream", "timeout"))
    assert client.post("/generate", json={"prompt": "x", **nulls}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x " * 64}]}, "messages"),
        ("/v1/completions", {"prompt": "x " * 64}, "prompt"),
        ("/generate", {"prompt": ["x", "x " * 99]}, "prompt"),
    ],
)
def test_prompts_beyond_the_model_s_positions(client, service, path, body, param):
    service.registry.served["fake"].model.spec.max_positions = 64
    try:
        error = client.post(path, json={"model": "fake", **body}).json()["error"]
    finally:
        service.registry.served["fake"].model.spec.max_positions = 2048
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    assert error["message"].startswith(f"{param}: has ")


def pieces_taken(address, pieces, pause_s):
    """How many pieces of a request are sent, one after the other, before the server hangs up."""
    with socket.create_connection(address, timeout=5) as connection:
        for number, piece in enumerate(pieces):
            try:
                connection.sendall(piece)
            except ConnectionError:
                return number
            time.sleep(pause_s)
    return len(pieces)


def test_one_byte_at_a_time_is_cut_off(open_server, engine):
    for begin in (head(1000), b"GET /health HTTP/1.1\r\nX: "):
        pieces = [begin, *[b" "] * 200]
        assert pieces_taken(open_server[1], pieces, 0.02) < 60  # 0.4 s and 0.3 s, however steadily bytes come
    assert not engine.submitted


def test_a_connection_that_says_nothing_is_closed(open_server):
    began = time.monotonic()
    assert exchange(open_server[1], b"") == b""
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_place(open_server, engine, stream):
    engine.step_s = 0.01
    body = json.dumps({**HELLO, "max_tokens": 10_000, "stream": stream}).encode()
    with socket.create_connection(open_server[1]) as connection:
        connection.sendall(head(len(body)) + body)
        assert until(lambda: engine.steps > 3)
    assert until(lambda: engine.cancelled == engine.submitted)
    steps = engine.steps
    time.sleep(0.05)
    assert engine.steps <= steps + 1


def test_a_client_that_does_not_read_is_cut_off(open_server, engine):
    engine.step_s = (
        0.0005  # a real engine takes longer still; without end to it the loop would be busy with the backlog
    )
    body = json.dumps({**HELLO, "max_tokens": 100_000, "stream": True}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(open_server[1])
        connection.sendall(head(len(body)) + body)
        assert until(lambda: engine.cancelled == engine.submitted != [], 5)


def test_pipelined_requests_are_answered_in_order(open_server):
    one, two = (json.dumps({**HELLO, "max_tokens": count}).encode() for count in (1, 2))
    last = head(len(two), more="Connection: close\r\n") + two
    answer = exchange(open_server[1], head(len(one)) + one + last)
    assert answer.index(b'"completion_tokens":1') < answer.index(b'"completion_tokens":2')


# --- the log and the page ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [False, True])
def test_texts_are_in_the_log_only_when_asked_for(client, service, engine, monkeypatch, tmp_path, asked):
    file = tmp_path / "log"
    monkeypatch.setattr(logs, "_STANDARD_ERROR", os.open(file, os.O_WRONLY | os.O_CREAT))
    logs.configure(show_messages=asked)
    service.settings = service.settings.model_copy(update={"log_requests": asked})
    ask(client, prompt="secret-prompt")
    ask(client, prompt="secret-prompt", stream=True)
    client.post("/classify", json={"text": "secret-prompt"})
    client.post("/secret-prompt?secret-prompt", json={"model": "secret-prompt", "prompt": 3})
    engine.refusal = RuntimeError("secret-prompt")
    assert ask(client).status_code == 500

    def told():
        written = file.read_text()
        return '"status": 500' in written and '"event": "failed"' in written and written.endswith("\n")

    assert until(told)  # lines come after answers
    logging.getLogger("uvicorn").handlers.clear()
    written = file.read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == [200, 200, 200, 404, 500]
    assert {"request_id", "seconds", "model", "prompt_tokens", "completion_tokens"} <= set(requests[1])
    (failed,) = [line for line in lines if line["event"] == "failed"]
    assert failed["exception"] == "RuntimeError"
    assert ("secret-prompt" in written) == asked


def test_the_page_is_strict_and_cached(client):
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in policy
    assert client.get("/", headers={"If-None-Match": page.headers["etag"]}).status_code == 304
    for name in ("playground.js", "playground.css"):
        assert client.get(f"/{name}").headers["content-type"].startswith("text/")


def test_problems_have_openai_s_form():
    assert problems.draining().body == {
        "error": {
            "message": "the server is stopping; try another one", "type": "server_error", "param": None,
            "code": "draining",
        }
    }  # fmt: skip
