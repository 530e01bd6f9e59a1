import asyncio
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from standin import Script, serving

from yunque.errors import InputError
from yunque.serving.load.client import Client, Outcome
from yunque.serving.load.soak import Sample, checks, memory_growth, metric
from yunque.serving.load.summary import Objectives, Percentiles, summarize
from yunque.serving.load.traffic import (
    Window,
    Workload,
    closed_loop,
    make_prompts,
    open_loop,
    poisson_times,
    read_prompts,
)

ROOT = Path(__file__).parents[2]
METRICS = 'yunque_running{model="a"} 0.0\nyunque_running{model="b"} 0.0\nyunque_queued{model="a"} 0.0\n'


def workload(**values):
    return Workload(
        **({"model": "fp32", "prompts": ["p"], "warmup_s": 0.0, "duration_s": 0.5, "max_tokens": 8} | values)
    )


def ask(script, **values):
    """One request's outcome."""
    outcome = Outcome(0.0)
    with serving(script) as url:
        asyncio.run(Client(url, **values).complete(*workload().path_and_body("p"), outcome))
    return outcome


def answered(scheduled, first, last, pieces=3, tokens=None):
    return Outcome(scheduled, scheduled, last, np.linspace(first, last, pieces).tolist(), tokens or pieces)


def test_arrivals_are_those_of_a_poisson_process():
    times = np.array(poisson_times(50.0, 400.0, seed=1))
    assert times.tolist() == poisson_times(50.0, 400.0, seed=1)
    assert abs(len(times) / 400 - 50) < 3 * np.sqrt(50 / 400)
    gaps = np.diff(times)
    assert np.mean(gaps > 1 / 50) == pytest.approx(np.exp(-1), abs=0.02)
    counts = np.histogram(times, np.arange(401))[0]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.25)


def test_an_answer_s_pieces_tokens_and_text_are_noted():
    outcome = ask(Script(step_s=0.05))
    assert outcome.ok
    assert (outcome.text, outcome.tokens, outcome.prompt_tokens) == ("one two three", 3, 3)
    assert np.diff(outcome.pieces_s).min() > 0.03
    assert outcome.sent_s < outcome.pieces_s[0] < outcome.pieces_s[-1] <= outcome.end_s


@pytest.mark.parametrize(
    ("script", "rejected", "failed"),
    [
        (Script(refusal=(429, "full")), "429 invalid_request_error", ""),
        (Script(key="right"), "401 invalid_request_error", ""),
        (Script(break_after=2), "", "not an answer: RemoteProtocolError"),
    ],
)
def test_refusals_and_failures_are_told_apart(script, rejected, failed):
    outcome = ask(script)
    assert not outcome.ok
    assert (outcome.rejected, outcome.failed) == (rejected, failed)


def test_the_key_is_sent_a_timeout_and_a_closed_port_are_failures():
    assert ask(Script(key="right"), key="right").ok
    assert ask(Script(step_s=5.0), timeout_s=0.2).failed == "timeout of the client"
    outcome = Outcome(0.0)
    asyncio.run(Client("http://127.0.0.1:9").complete("/v1/completions", {}, outcome))
    assert outcome.failed == "connection refused"


def test_a_server_that_stalls_is_charged_for_all_who_waited():
    # One slot of 0.2 s and 10 requests a second: who comes later waits longer, from the moment it should have been sent
    script = Script(step_s=0.2, slots=1, answers={"fp32": ["x"]})
    with serving(script) as url:
        outcomes, window = asyncio.run(open_loop(Client(url), workload(duration_s=1.0), 10.0))
    schedule = [each.scheduled_s - (window.end_s - 1.0) for each in outcomes]
    assert schedule == pytest.approx(poisson_times(10.0, 1.0, seed=0), abs=1e-6)
    assert max(script.started_s) - min(script.started_s) < 1.1  # sent when due, not when the server had time
    found = summarize("", outcomes, window, Objectives(first_token_s=0.3))
    assert found.completed == len(outcomes)
    assert found.first_token.max > 0.2 * len(outcomes) - 1.0
    assert 0 < found.good_share < 0.6
    assert found.client_lag.p50 < 0.05


def test_clients_of_a_closed_loop_wait_for_their_answers():
    script = Script(step_s=0.02, slots=2)
    with serving(script) as url:
        found = {}
        for clients in (1, 2, 4):
            outcomes, window = asyncio.run(closed_loop(Client(url), workload(duration_s=0.6), clients))
            found[clients] = summarize("", outcomes, window, Objectives())
    assert found[2].tokens_s > 1.5 * found[1].tokens_s
    assert found[4].tokens_s < 1.3 * found[2].tokens_s  # two slots
    assert found[4].end_to_end.p50 > 1.5 * found[2].end_to_end.p50


def test_only_the_window_counts_and_goodput_needs_every_objective():
    outcomes = [
        answered(-1.0, 0.5, 1.5),  # scheduled in the warm-up; its last two pieces are measured
        answered(1.0, 1.1, 1.3, tokens=6),  # good; each piece stands for two tokens
        answered(2.0, 2.6, 2.8),  # late first token
        answered(3.0, 3.1, 5.1),  # slow pieces
        Outcome(4.0, 4.0, 4.1, rejected="429 full"),
        Outcome(5.0, 5.0, 5.1, failed="timeout of the client"),
        answered(9.0, 9.1, 11.0),  # ends after the window
    ]
    found = summarize(
        "x", outcomes, Window(1.0, 10.0), Objectives(first_token_s=0.5, inter_token_s=0.5, end_to_end_s=9)
    )
    assert (found.requests, found.completed) == (6, 4)
    assert found.rejected == {"429 full": 1}
    assert found.failed == {"timeout of the client": 1}
    assert found.goodput == pytest.approx(1 / 9)
    assert found.good_share == pytest.approx(1 / 6)
    assert found.tokens_s == pytest.approx((2 + 6 + 3 + 3 + 1) / 9)
    assert found.first_token.max == pytest.approx(0.6)
    assert json.loads(json.dumps(found.as_json()))["load"] == "x"
    assert Percentiles.of([]).count == 0


def test_memory_growth_and_leaks_fail_a_soak():
    window = Window(0.0, 100.0)

    def samples(end):
        return [Sample(float(second), 1e9 if second < 50 else 1e9 * end, 1, 0) for second in range(-20, 100)]

    assert memory_growth(samples(1.01), window) == pytest.approx(0.01)
    assert memory_growth([], window) is None
    done, empty = [answered(1.0, 2.0, 3.0)], Sample(0.0, 1e9, 0.0, 0.0)

    def broken(outcomes, growth, after):
        return [check.name.split()[0] for check in checks(outcomes, growth, after, 0.02) if not check.passed]

    assert broken(done, 0.01, empty) == []
    assert broken(done, 0.03, empty) == ["memory"]
    assert broken(done, None, empty) == ["memory"]  # what was not measured has not been shown
    assert broken(done, 0.0, Sample(0.0, 1e9, 1.0, 0.0)) == ["no"]
    assert broken(done, 0.0, Sample(0.0, 1e9, None, None)) == ["no"]
    assert broken([*done, Outcome(1.0, rejected="429")], 0.0, empty) == ["no"]
    assert broken([], 0.0, empty) == ["no"]
    assert metric(METRICS.replace("0.0", "2.0"), "yunque_running") == 4.0
    assert metric("", "yunque_running") is None


def test_prompts_of_files_and_made_ones(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n\n{"prompt": "y z"}\n')
    (tmp_path / "a.txt").write_text("x\ny z\n")
    assert read_prompts(tmp_path / "a.jsonl") == read_prompts(tmp_path / "a.txt") == ["x", "y z"]
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    for name in ("b.jsonl", "none.txt"):
        with pytest.raises(InputError, match="--prompts"):
            read_prompts(tmp_path / name)
    made = make_prompts(20, 12, seed=3)
    assert len({*made}) == 20
    assert {len(each.split()) for each in made} == {12}


def loadtest(*arguments):
    command = [sys.executable, "serve/loadtest.py", "--warmup", "0.2", "--duration", "0.6", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_script_reports_and_its_soak_fails_where_a_slot_stays_taken(tmp_path):
    script = Script(models=[{"id": "judge", "kind": "classifier"}, {"id": "fp32"}], step_s=0.005, metrics=METRICS)
    with serving(script) as url:
        done = loadtest("--url", url, "--rates", "10,40", "--output_dir", tmp_path / "rates")
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / "rates" / "load.json").read_text())
        assert [each["load"] for each in report["loads"]] == ["rate 10", "rate 40"]
        assert report["loads"][1]["completed"] > report["loads"][0]["completed"] > 0
        page = (tmp_path / "rates" / "load.html").read_text()
        assert page.count("<svg") == 5
        assert "http://" not in page.replace(url, "")
        assert {asked["model"] for asked in script.asked} == {"fp32"}
        script.metrics = METRICS.replace('{model="b"} 0.0', '{model="b"} 1.0')
        soak = ("--soak", 0.02, "--capacity", 40, "--settle", 0.3, "--server_pid", 1)
        done = loadtest("--url", url, *soak)
        assert done.returncode == 1, done.stderr
        assert "no leaked slots" in done.stderr
        assert "- passed: no error" in done.stdout
    done = loadtest("--url", url, "--rates", "1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
