"""A real server with tiny models, without torch, used by the clients that applications use."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from exported import exported, prompts  # noqa: F401
from langchain_openai import ChatOpenAI, OpenAI
from served import ROOT, Server

KEY = "the-key-of-the-server-tests"
PROMPT = "w3 w4 w5"


@pytest.fixture(scope="module")
def folders(exported):  # noqa: F811
    return {"llama": exported("llama_grouped"), "t5": exported("t5_untied"), "judge": exported("roberta")}


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("server")
    (root / "keys").write_text(f"# for the tests\n{KEY}\n")
    models = [f"{name}={each.folder}" for name, each in folders.items()]
    with Server(
        root, *models, "--port", 0, "--api_key_file", root / "keys", "--threads", 1, "--max_queued", 64,
        "--body_timeout_s", 0.5, "--header_timeout_s", 0.5, "--write_timeout_s", 1, "--timeout_s", 30,
    ) as server:  # fmt: skip
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def expected(folders):
    """A function to the runtime's own greedy answer."""
    return lambda name, prompt, tokens: folders[name].runtime.generate([prompt], max_new_tokens=tokens)[0]


# --- OpenAI's client --------------------------------------------------------------------------------------------------


def test_models(client, folders):
    models = {model.id: model for model in client.models.list()}
    assert list(models) == list(folders)
    for name, each in folders.items():
        assert models[name].kind == each.runtime.spec.kind
    assert client.models.retrieve("t5") == models["t5"]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_greedy_completions_are_the_runtime_s(client, expected, name):
    answer = expected(name, PROMPT, 12)
    whole = client.completions.create(model=name, prompt=PROMPT, max_tokens=12, temperature=0, logprobs=2)
    assert whole.choices[0].text == answer.text
    assert whole.usage.completion_tokens == len(answer.tokens)
    assert whole.choices[0].finish_reason == ("length" if answer.finish_reason == "length" else "stop")
    logprobs = whole.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(answer.tokens)
    assert all(max(top.values()) == pytest.approx(chosen) for top, chosen in zip(
        logprobs.top_logprobs, logprobs.token_logprobs, strict=True))  # fmt: skip
    stream = client.completions.create(
        model=name, prompt=PROMPT, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *parts, last = list(stream)
    assert "".join(part.choices[0].text for part in parts) == answer.text
    assert len(parts) > 3
    assert last.usage == whole.usage
    assert {part.system_fingerprint for part in parts} == {whole.system_fingerprint}


def test_prompts_of_all_forms(client, expected):
    texts = ["w3 w4 w5", "w9"]
    by_text = client.completions.create(model="llama", prompt=texts, max_tokens=6, temperature=0, n=2)
    assert [choice.text for choice in by_text.choices] == [
        expected("llama", text, 6).text for text in texts for _ in range(2)
    ]
    by_ids = client.completions.create(model="llama", prompt=[[3, 4, 5], [9]], max_tokens=6, temperature=0)
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in by_text.choices[::2]]
    one = client.completions.create(model="llama", prompt=[3, 4, 5], max_tokens=6, temperature=0)
    assert one.choices[0].text == by_ids.choices[0].text


def test_chats_stop_and_stream(client, expected):
    turn = [{"role": "user", "content": PROMPT}]
    answer = expected("t5", PROMPT, 10)
    whole = client.chat.completions.create(
        model="t5", messages=turn, max_completion_tokens=10, temperature=0, logprobs=True, top_logprobs=1
    )
    assert whole.choices[0].message.content == answer.text
    content = whole.choices[0].logprobs.content
    assert len(content) == len(answer.tokens)
    assert all(each.top_logprobs[0].token == each.token for each in content)
    stop = answer.text.split()[3]
    with client.chat.completions.create(
        model="t5", messages=turn, max_tokens=10, temperature=0, stop=[stop], stream=True
    ) as stream:
        parts = [part.choices[0] for part in stream]
    assert parts[0].delta.role == "assistant"
    assert "".join(part.delta.content or "" for part in parts) == answer.text[: answer.text.index(stop)]
    assert parts[-1].finish_reason == "stop"


def test_samples_follow_their_seed(client):
    def sample(**options):
        answer = client.completions.create(model="llama", prompt=PROMPT, max_tokens=20, **options)
        return [choice.text for choice in answer.choices]

    three = sample(seed=5, n=3, temperature=1.5)
    assert len(set(three)) == 3
    assert sample(seed=5, n=3, temperature=1.5) == three
    assert sample(seed=6, n=1, temperature=1.5)[0] != three[0]
    assert sample() != sample()  # no seed: a new one every time


def test_errors_are_the_client_s_own(client, server):
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt-4o", prompt=PROMPT)
    assert (error.value.param, error.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="llama", prompt=PROMPT, frequency_penalty=1)
    assert error.value.param == "frequency_penalty"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            model="llama", messages=[{"role": "user", "content": PROMPT}],
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )  # fmt: skip
    assert error.value.param == "tools"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="not-the-key-of-this-server").models.list()


def test_timeouts_of_the_client_and_of_the_server(client, server):
    long = {"prompt": PROMPT, "min_new_tokens": 1000, "max_new_tokens": 1000, "model": "llama"}
    before = len(server.events("request"))
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.02).post("/../generate", body=long, cast_to=object)
    server.wait_for("request", count=before + 1)
    late = client.with_options(max_retries=3)  # it is not tried again
    before = len(server.events("request"))
    with pytest.raises(openai.InternalServerError) as error:
        late.post("/../generate", body={**long, "timeout": 0.02}, cast_to=object)
    assert (error.value.status_code, error.value.code) == (504, "deadline_exceeded")
    server.wait_for("request", count=before + 1)  # the log may come after the answer
    assert len([each for each in server.events("request")[before:] if each["status"] == 504]) == 1


# --- LangChain --------------------------------------------------------------------------------------------------------


def test_langchain(server, expected):
    common = {"base_url": f"{server.url}/v1", "api_key": KEY, "model": "llama", "temperature": 0, "max_retries": 0}
    text = expected("llama", PROMPT, 8).text
    chat = ChatOpenAI(**common, max_tokens=8)
    answer = chat.invoke(PROMPT)
    assert answer.content == text
    assert answer.usage_metadata["output_tokens"] == answer.response_metadata["token_usage"]["completion_tokens"]
    assert "".join(part.content for part in chat.stream([("human", PROMPT)])) == text
    assert [each.content for each in chat.batch([PROMPT, PROMPT])] == [text, text]
    assert chat.bind(stop=[text.split()[2]]).invoke(PROMPT).content == text[: text.index(text.split()[2])]
    completion = OpenAI(**common, max_tokens=8)
    assert completion.invoke(PROMPT) == text
    assert "".join(completion.stream(PROMPT)) == text
    assert completion.generate([PROMPT, "w9"]).generations[1][0].text == expected("llama", "w9", 8).text


# --- the plain routes -------------------------------------------------------------------------------------------------


def test_generate_and_classify(server, folders, expected):
    with server.client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        answer = client.post("/generate", json={"prompt": [PROMPT, "w9"], "max_new_tokens": 7, "logprobs": True})
        assert answer.json()["model"] == "llama"  # the first that writes text
        for number, prompt in enumerate((PROMPT, "w9")):
            own = expected("llama", prompt, 7)
            told = answer.json()["answers"][number]
            assert (told["text"], told["tokens"], len(told["logprobs"])) == (own.text, len(own.tokens), len(own.tokens))
        labels = client.post("/classify", json={"text": [PROMPT, "w40"]}).json()["results"]
        own = folders["judge"].runtime.classify([PROMPT, "w40"])
        assert [each["probabilities"] for each in labels] == [pytest.approx(each, abs=1e-5) for each in own]
        metrics = client.get("/metrics").text
        assert 'yunque_new_tokens_total{model="llama"}' in metrics
        assert 'yunque_http_responses_total{route="/classify",status="200"}' in metrics


# --- rude clients and their neighbours --------------------------------------------------------------------------------


def test_rude_clients_change_no_neighbour_s_answer(server, client, expected):
    rude = threading.Event()

    def be_rude():
        body = json.dumps({"prompt": PROMPT, "min_new_tokens": 900, "max_new_tokens": 900, "stream": True}).encode()
        begin = (
            f"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        )
        while not rude.is_set():
            for data in (
                begin.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(body), body),  # hangs up on its answer
                begin.encode() + b"Content-Length: 1000\r\n\r\n" + b" " * 10,
                begin.encode() + b"Content-Length: 3\r\n\r\n{\xff}",
                b"\x00" * 3000,
            ):
                with socket.create_connection(server.address) as connection:
                    connection.sendall(data)
                    connection.settimeout(0.02)
                    with contextlib.suppress(OSError):
                        connection.recv(100)

    answer = expected("llama", PROMPT, 30).text

    def ask(_):
        return client.completions.create(model="llama", prompt=PROMPT, max_tokens=30, temperature=0).choices[0].text

    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(be_rude) for _ in range(2)]
        answers = list(pool.map(ask, range(24)))
        rude.set()
        for each in clients:
            each.result()
    assert answers == [answer] * 24
    assert not [each for each in server.events("request") if each["status"] == 500]
    assert not server.events("failed")
    assert {each["status"] for each in server.events("request")} >= {200, 499}


def test_fuzzed_requests_meet_their_document(server, tmp_path):
    fuzz(server, tmp_path, "--max-examples", "4", "--phases", "fuzzing")


def fuzz(server, folder, *options):
    """Schemathesis over the server's own document."""
    (folder / "schemathesis.toml").write_text(
        '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", 504]\n'  # they ask for 0.001 s, too
        # A text without any token, as one of spaces is for some tokenizers, is 400.
        '[checks.positive_data_acceptance]\nexpected-statuses = ["2xx", 400, 404, 429, 504]\n'
    )
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml"]
    done = subprocess.run(
        [*command, "run", f"{server.url}/openapi.json", "-H", f"Authorization: Bearer {KEY}", "--seed", "1",
         "--exclude-checks", "ignored_auth", "--generation-database", "none", *options],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    assert not server.events("failed")
    assert server.process.poll() is None
    return done.stdout


# --- what a user gets wrong -------------------------------------------------------------------------------------------


def test_user_errors_are_one_line(server, folders, tmp_path):
    import shutil

    altered = tmp_path / "altered"
    shutil.copytree(folders["llama"].folder, altered)
    weights = max(altered.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    taken = str(server.address[1])
    for options, words in (
        (["nowhere"], "no such folder"),
        ([str(folders["llama"].folder), "--port", taken], f"cannot listen on 127.0.0.1:{taken}"),
        ([str(altered), "--port", "0"], "sha256"),
        ([str(folders["llama"].source), "--port", "0"], "runtime.json"),
    ):
        command = [sys.executable, "-m", "yunque", "serve", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 2, done.stderr
        lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert words in lines[0]
