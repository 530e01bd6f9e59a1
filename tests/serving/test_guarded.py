"""What stands before and behind the models of a real server: Host headers, other sites' pages, the guard."""

import json
import statistics

import pytest
from exported import exported, prompts  # noqa: F401
from served import Server

KEY = "the-key-of-the-guard-tests"
PAGE = "https://pages.example"
TOKENS = 8
ROUTES = {
    "/v1/completions": lambda prompt: {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0},
    "/v1/chat/completions": lambda prompt: {
        "messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS, "temperature": 0,
    },
    "/generate": lambda prompt: {"prompt": prompt, "max_new_tokens": TOKENS},
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(exported, prompts):  # noqa: F811
    """The model's texts and how bad the guard's classifier finds them, by prompt."""
    made, judge = exported("llama_grouped").runtime, exported("roberta").runtime
    texts = {prompt: made.generate([prompt], max_new_tokens=TOKENS)[0].text for prompt in prompts[:6]}
    return {prompt: (text, judge.classify([text])[0]["hate"]) for prompt, text in texts.items()}


@pytest.fixture(scope="module")
def threshold(answers):
    """Between the scores: some answers are bad."""
    scores = sorted(score for _, score in answers.values())
    assert scores[3] - scores[2] > 1e-4
    return statistics.median(scores)


@pytest.fixture
def serve(exported, threshold, tmp_path):  # noqa: F811
    """A function from an action to a server whose guard takes it."""

    def start(action, *options, **more):
        return Server(
            tmp_path, f"m={exported('llama_grouped').folder}", "--port", 0, "--threads", 1,
            "--guard_folder", exported("roberta").folder, "--guard_action", action, "--guard_threshold", threshold,
            *options, **more,
        )  # fmt: skip

    return start


def choices_of(answer):
    """The one choice or answer of each of a whole answer's or a stream's parts."""
    if answer.headers["content-type"].startswith("application/json"):
        parts = [answer.json()]
    else:
        *blocks, last, end = answer.text.split("\n\n")
        assert (last, end) == ("data: [DONE]", "")
        parts = [json.loads(block.removeprefix("data: ")) for block in blocks]
    found = []
    for part in parts:
        found += part.get("choices") or part.get("answers") or ([part] if "finish_reason" in part else [])
    return found


def text_of(choice):
    return choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or ""


def ask_all(server, answers):
    """Text, finish reason and safety of every answer: by route, whole and streamed."""
    with server.client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        for route, body in ROUTES.items():
            for stream in (False, True):
                for prompt in answers:
                    answer = client.post(route, json={**body(prompt), "model": "m", "stream": stream})
                    assert answer.status_code == 200, answer.text
                    choices = choices_of(answer)
                    assert stream or len(choices) == 1
                    text = "".join(map(text_of, choices))
                    assert all("safety" not in choice for choice in choices[:-1])
                    yield prompt, answer.text, text, choices[-1]["finish_reason"], choices[-1].get("safety")


def counted(server):
    """How many answers the guard let pass, flagged and blocked."""
    with server.client() as client:
        lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("yunque_guarded_total{")]
    return {line.split('action="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}


def test_flag_tells_the_score_and_changes_no_text(serve, answers, threshold):
    with serve("flag") as server:
        for prompt, _, text, reason, safety in ask_all(server, answers):
            expected, score = answers[prompt]
            assert (text, reason) == (expected, "length")
            assert safety == {"score": pytest.approx(score, abs=1e-5), "flagged": score >= threshold}
        assert counted(server) == {"passed": 18.0, "flagged": 18.0}
        with server.client() as client:
            assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["m", "guard"]
            label = client.post("/classify", json={"model": "guard", "text": "w3 w4"}).json()["results"][0]
            assert set(label["probabilities"]) == {"nothate", "hate"}


def test_block_shows_nothing_of_a_bad_answer(serve, answers, threshold):
    with serve("block") as server:
        for prompt, sent, text, reason, safety in ask_all(server, answers):
            expected, score = answers[prompt]
            if score < threshold:
                assert (text, reason) == (expected, "length")
            else:
                assert (text, reason) == ("", "content_filter")
                assert not any(word in sent for word in expected.split())
            assert safety == {"score": pytest.approx(score, abs=1e-5), "flagged": score >= threshold}
        assert counted(server) == {"passed": 18.0, "blocked": 18.0}


def test_pass_only_counts(serve, answers):
    with serve("pass") as server:
        for prompt, _, text, reason, safety in ask_all(server, answers):
            assert (text, reason, safety) == (answers[prompt][0], "length", None)
        assert counted(server) == {"passed": 18.0, "flagged": 18.0}


def test_hosts_and_other_sites_pages(serve):
    options = ("--allowed_hosts", "models.example", "*.inside.example", "127.0.0.1", "--cors_origins", PAGE)
    with serve("pass", *options, environment={"YUNQUE_API_KEYS": KEY}) as server, server.client() as client:
        for host, status in {
            "models.example": 401, "models.example:8000": 401, "MODELS.example": 401, "a.inside.example": 401,
            "127.0.0.1:1": 401, "[::1]:8000": 400, "inside.example": 400, "evil.example": 400,
            "models.example.evil": 400,
        }.items():  # fmt: skip
            answer = client.get("/v1/models", headers={"Host": host})
            assert answer.status_code == status, host
            assert answer.json()["error"]["code"] == {400: "invalid_host", 401: "invalid_api_key"}[status]
        body = {"model": "m", "prompt": "w3", "max_tokens": 2}
        headers = {"Authorization": f"Bearer {KEY}", "Origin": PAGE}
        asked = {
            "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type",
        }  # fmt: skip
        preflight = client.options("/v1/completions", headers={"Origin": PAGE, **asked})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == PAGE
        assert {"authorization", "content-type"} <= set(
            preflight.headers["access-control-allow-headers"].lower().split(", ")
        )
        answer = client.post("/v1/completions", json=body, headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
        refused = client.post("/v1/completions", json=body, headers={"Origin": PAGE})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)  # pages read errors
        for origin in ("https://evil.example", "null", f"{PAGE}.evil"):
            assert client.options("/v1/completions", headers={"Origin": origin, **asked}).status_code == 400
            answer = client.post("/v1/completions", json=body, headers=headers | {"Origin": origin})
            assert "access-control-allow-origin" not in answer.headers
