"""The agents of serve/examples: over scripted answers, since a tiny model cannot reason, and over the real server."""

import runpy
import sys

import pytest
from chat_server import chat_server
from exported import exported, prompts  # noqa: F401
from served import ROOT, Server


@pytest.fixture
def run_example(monkeypatch, capsys):
    """Run an example in this process; its exit code and what it printed."""

    def run(name, url, *options):
        path = str(ROOT / "serve" / "examples" / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *options, "--base_url", url])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(path, run_name="__main__")
        return left.value.code, capsys.readouterr().out

    return run


def test_react_reads_what_its_tools_say(run_example):
    with chat_server() as server:

        def reply(prompt):
            if "opened in 1874" not in prompt:
                return "Thought: I need its year.\nAction: look_up[bridge]\n"
            if "156" not in prompt:
                return "Thought: now the difference\nAction: calculate[2030 - 1874]"
            return "Final answer: 156 years"

        server.reply = reply
        code, output = run_example("react", server.url, "How old is the bridge in 2030?", "--model", "m")
    assert code == 0
    assert output.endswith("\n156 years\n")
    assert len(server.requests) == 3
    assert all(request["stop"] == ["Observation:"] for request in server.requests)


@pytest.mark.parametrize(
    ("action", "observation"),
    [
        ("calculate[__import__('os').getpid()]", "not possible: only numbers"),
        ("calculate[1 / 0]", "not possible"),
        ("erase[all]", "no such action; there are: calculate, look_up"),
        ("look_up[castle]", "no note about 'castle'"),
    ],
)
def test_react_survives_what_a_model_makes_up(run_example, action, observation):
    with chat_server() as server:
        server.reply = lambda prompt: f"Action: {action}"
        code, output = run_example("react", server.url, "?", "--model", "m", "--max_steps", "2")
    assert code == 1
    assert output.count(f"Observation: {observation}") == 2


def test_pal_computes_the_first_program_that_computes(run_example):
    programs = iter(["import os\nanswer = 1", "answer = eggs", "eggs = 3 * 12\nanswer = eggs - 5"])
    with chat_server() as server:
        server.reply = lambda prompt: next(programs)
        code, output = run_example("pal", server.url, "3 crates of 12 eggs, 5 break. Left?", "--model", "m")
    assert (code, output.splitlines()[-1]) == (0, "31")
    assert output.count("# not computed") == 2
    assert [request["temperature"] for request in server.requests] == [0, 0.7, 0.7]


def test_examples_come_to_their_end_on_the_real_server(run_example, exported, tmp_path):  # noqa: F811
    options = ("?", "--model", "m", "--max_tokens", "12")
    with Server(tmp_path, f"m={exported('t5_untied').folder}", "--port", 0, "--threads", 1) as server:
        for name, steps in (("react", "--max_steps"), ("pal", "--tries")):
            code, output = run_example(name, f"{server.url}/v1", *options, steps, "2")
            assert (code, output.splitlines()[-1]) == (1, "no answer")
        assert [entry["status"] for entry in server.events("request")] == [200] * 4
