import pytest
from chat_server import chat_server

from yunque.errors import InputError, Stopped
from yunque.models.arguments import GenerationArguments
from yunque.rl.endpoint import Endpoint, read_letter
from yunque.rl.feedback_arguments import WriterArguments
from yunque.rl.writing import Request

OPTIONS = GenerationArguments(max_new_tokens=5, temperature=0.7, top_p=0.9)
REQUESTS = [Request("a" * length, length) for length in range(1, 6)]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server():
    with chat_server() as running:
        yield running


@pytest.fixture
def endpoint(server):
    def build(stopped=lambda: False, url=None, **changed):
        settings = {"max_retries": 2, "retry_wait_s": 0.02, "request_timeout_s": 5.0, "batch_size": 2} | changed
        args = WriterArguments(model_name_or_path="m", generator_url=server.url, **settings)
        return Endpoint(args, "generator_url", url or server.url, "m", "OPENAI_API_KEY", stopped)

    return build


def texts(endpoint, requests=REQUESTS):
    return dict(endpoint.write(requests, OPTIONS))


def test_chat_sends_the_prompt_and_the_sampling_settings(server, endpoint):
    assert texts(endpoint()) == {place: f"reply {place + 1}" for place in range(5)}
    assert set(server.paths) == {"/v1/chat/completions"}
    asked = next(body for body in server.requests if body["messages"][0]["content"] == "aaa")
    assert asked == {
        "model": "m",
        "max_tokens": 5,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 3,
        "messages": [{"role": "user", "content": "aaa"}],
    }


def test_completions_style_sends_plain_prompts(server, endpoint):
    assert texts(endpoint(endpoint_style="completions"), REQUESTS[:1]) == {0: "reply 1"}
    assert server.paths == ["/v1/completions"]
    assert server.requests[0]["prompt"] == "a"


def test_key_comes_from_the_environment_and_goes_into_the_header_only(server, endpoint, monkeypatch):
    texts(endpoint(), REQUESTS[:1])
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    keyed = endpoint()
    texts(keyed, REQUESTS[:1])
    assert [headers.get("Authorization") for headers in server.headers] == [None, "Bearer sk-secret"]
    assert "sk-secret" not in keyed.identity + keyed.source + str(server.requests)


@pytest.mark.parametrize("trouble", ["500", "429", "cut", "garbage", "list", "no choices", "number"])
def test_what_may_pass_is_tried_again(server, endpoint, trouble):
    server.troubles = [trouble, trouble]
    assert texts(endpoint(), REQUESTS[:1]) == {0: "reply 1"}
    assert len(server.requests) == 3


def test_a_time_out_is_tried_again(server, endpoint):
    server.troubles = ["hang"]
    assert texts(endpoint(request_timeout_s=0.2), REQUESTS[:1]) == {0: "reply 1"}


@pytest.mark.parametrize(
    ("trouble", "words"),
    [("500", "HTTP 500"), ("hang", "no answer in 0.5 s"), ("garbage", "not json"), ("429", "HTTP 429")],
)
def test_what_does_not_pass_stops_the_run_with_one_line(server, endpoint, trouble, words):
    server.always = trouble
    with pytest.raises(Stopped, match=words) as error:
        texts(endpoint(max_retries=1, request_timeout_s=0.5), REQUESTS[:1])
    assert "generator_url" in str(error.value)
    assert "failed 2 times" in str(error.value)
    assert "--resume" in str(error.value)
    assert len(server.requests) == 2


def test_nobody_listening_stops_the_run(endpoint):
    with pytest.raises(Stopped, match="refused"):
        texts(endpoint(url="http://127.0.0.1:9/v1"), REQUESTS[:1])


@pytest.mark.parametrize(
    ("trouble", "words"), [("401", "OPENAI_API_KEY, which is not set"), ("404", "refuses model 'm'")]
)
def test_a_refusal_is_bad_input_and_not_tried_again(server, endpoint, trouble, words):
    server.always = trouble
    with pytest.raises(InputError, match=words):
        texts(endpoint(), REQUESTS[:1])
    assert len(server.requests) == 1


def test_a_redirect_is_not_followed_with_the_key(server, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server.always = "redirect"
    with pytest.raises(InputError, match="HTTP 302"):
        texts(endpoint(), REQUESTS[:1])


def test_one_failure_keeps_the_others(server, endpoint):
    def reply(prompt):
        if prompt == "aa":
            server.troubles = ["401"]
        return prompt

    server.reply = reply
    answers = endpoint(batch_size=1).write(REQUESTS, OPTIONS)
    assert [next(answers), next(answers)] == [(0, "a"), (1, "aa")]
    with pytest.raises(InputError):
        next(answers)
    assert len(server.requests) == 3  # those behind the failure are not sent


def test_a_signal_ends_the_waiting(server, endpoint):
    server.always = "500"
    asked = []

    def stopped():
        asked.append(1)
        return len(asked) > 2

    with pytest.raises(Stopped, match="--resume"):
        texts(endpoint(stopped, retry_wait_s=30.0), REQUESTS[:1])


def test_an_answer_without_text_is_empty(server, endpoint):
    server.reply = lambda prompt: None
    assert texts(endpoint(), REQUESTS[:1]) == {0: ""}


def test_half_a_surrogate_pair_does_not_break_the_files(server, endpoint):
    server.reply = lambda prompt: "x\ud800"
    assert texts(endpoint(), REQUESTS[:1])[0].encode("utf-8") == b"x?"


def test_votes(server, endpoint):
    server.reply = {"one": "A", "two": "(B) since ...", "three": "neither"}.get
    assert endpoint().log_odds(["one", "two", "three"], 8) == [1.0, -1.0, None]
    assert {(body["temperature"], body["max_tokens"]) for body in server.requests} == {(0.0, 8)}


@pytest.mark.parametrize(
    "text",
    [
        "A",
        "A.",
        "(A)",
        " **A**",
        "Answer: A",
        "The better answer is A.",
        "A) it is kinder",
        "A\nB",
        "Respuesta: A",
        "Answer A: kind",
    ],
)
def test_a_choice_of_a(text):
    assert read_letter(text) == 1.0


@pytest.mark.parametrize(
    "text", ["", "A better answer is B", "A or B", "both", "Bad ones", "a", "Neither A nor B", "I prefer neither"]
)
def test_no_choice(text):
    assert read_letter(text) is None
