"""Constitutional data end to end: on tiny models, and on an endpoint that answers, fails, hangs and kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from chat_server import ChatServer, chat_server

from yunque.data.arguments import DataArguments, PreferenceArguments
from yunque.data.loading import load_splits
from yunque.data.preferences import load_preferences

ROOT = Path(__file__).parents[2]
CONSTITUTION = ROOT / "recipes" / "constitutions" / "english.yaml"
PROMPTS = ROOT / "recipes" / "constitutions" / "red_team_english.jsonl"
DATA = ("sft.jsonl", "preferences.jsonl")
STEPS = ("answers", "candidates", "critiques", "judgements", "revisions")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models whose tokenizer knows the letters A and B."""
    root = tmp_path_factory.mktemp("models")
    for family in ("llama", "t5"):
        tiny.FAMILIES[family]().save_pretrained(root / family)
        tiny.tokenizer(("A", "B")).save_pretrained(root / family)
    return {family: root / family for family in ("llama", "t5")}


@pytest.fixture
def options(tmp_path: Path, models: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    def build(**changed: Any) -> dict[str, Any]:
        chosen = {
            "model_name_or_path": models["llama"],
            "constitution": CONSTITUTION,
            "dataset_name": PROMPTS,
            "max_prompts": 6,
            "max_new_tokens": 6,
            "batch_size": 4,
            "output_dir": tmp_path / "out",
        } | changed
        return {name: value for name, value in chosen.items() if value is not None}

    return build


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with chat_server() as running:
        running.reply = reply
        yield running


def reply(prompt: str) -> str:
    """A judge that likes short answers, and a writer that says what it was asked."""
    if prompt.endswith("Answer:"):
        first, second = (prompt.partition(f"Answer {letter}: ")[2].partition("\n")[0] for letter in "AB")
        return "A" if len(first) < len(second) else "B"
    return f"about {len(prompt)}"


@pytest.fixture
def remote(options: Callable[..., dict[str, Any]], server: ChatServer) -> Callable[..., dict[str, Any]]:
    def build(**changed: Any) -> dict[str, Any]:
        chosen = {
            "model_name_or_path": "served",
            "generator_url": server.url,
            "batch_size": 1,
            "retry_wait_s": 0.01,
            "max_retries": 2,
            "request_timeout_s": 5,
        }
        return options(**(chosen | changed))

    return build


def files(folder: Path) -> dict[str, str]:
    paths = [folder / name for name in DATA] + [folder / "steps" / f"{name}.jsonl" for name in STEPS]
    return {path.name: path.read_text(encoding="utf-8") for path in paths if path.exists()}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_as_a_subprocess_it_leaves_data_that_the_other_recipes_read(run_recipe, options):
    asked = options(num_revisions=2, min_judge_margin=0)
    done = run_recipe("constitutional", asked, cold=True)
    assert done.returncode == 0, done.stderr
    folder = asked["output_dir"]
    manifest = json.loads((folder / "yunque.json").read_text())
    metrics = manifest["metrics"]
    assert manifest["stage"] == "constitutional"
    assert manifest["parents"][0]["path"] == str(asked["model_name_or_path"])
    assert metrics["prompts"] == metrics["answers"] == 6
    assert metrics["pairs"] + metrics["abstained"] + metrics["pairs_equal"] + metrics["pairs_empty"] == 6
    assert f"{metrics['pairs']:,} pairs" in done.stdout
    assert {"sft.jsonl", "constitution.yaml"} <= manifest["files"].keys()
    assert len(rows(folder / "steps" / "critiques.jsonl")) == 12
    sft = DataArguments(
        dataset_name=str(folder / "sft.jsonl"), text_column="instruction", target_column="output", test_size=0.3
    )
    loaded = load_splits(sft, seed=0)
    assert len(loaded.train) + len(loaded.test) == metrics["sft_rows"] > 0
    pairs = load_preferences(PreferenceArguments(dataset_name=str(folder / "preferences.jsonl"), test_size=0.3), 0)
    assert len(pairs.train) + len(pairs.test) == metrics["pairs"] > 1


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_run_cut_off_in_a_line_goes_on_to_the_same_files(called, options, models, tmp_path, family):
    run = called("constitutional", options(model_name_or_path=models[family]))
    whole = files(run.folder)
    assert len(whole) == 7 or family == "t5"
    broken = tmp_path / "broken"
    shutil.copytree(run.folder, broken)
    for name in (*DATA, "yunque.json"):
        (broken / name).unlink(missing_ok=True)
    for name, cut in (("critiques", 100), ("candidates", 30), ("judgements", 1)):
        path = broken / "steps" / f"{name}.jsonl"
        path.write_bytes(path.read_bytes()[:-cut])
    (broken / "steps" / "revisions.jsonl").unlink()
    called("constitutional", options(model_name_or_path=models[family], output_dir=broken, resume=True, batch_size=3))
    assert files(broken) == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_killed_in_the_middle_it_resumes_to_the_same_files(
    start_recipe, called, remote, server, tmp_path, number, code
):
    whole = files(called("constitutional", remote(output_dir=tmp_path / "whole")).folder)
    total = len(server.requests)
    assert total == 6 * 3 + 12 + len(rows(tmp_path / "whole" / "steps" / "judgements.jsonl")) * 4
    server.requests.clear()
    process = start_recipe("constitutional", remote(), cold=True)  # whose last request is the one that kills it

    def deadly(prompt: str) -> str:
        if len(server.requests) == 15:
            os.kill(process.pid, number)
        return reply(prompt)

    server.reply = deadly
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    if code == 75:
        assert "--resume" in errors.splitlines()[-1]
    # the signal reaches the process a moment later than the answer, where others share its processor
    assert 15 <= len(server.requests) < total
    server.reply = reply
    run = called("constitutional", remote(resume=True))
    assert files(run.folder) == whole
    # requests that were sent and not yet written down when it died are asked again
    assert total <= len(server.requests) <= total + 3


def test_an_edited_line_is_respected_and_what_follows_redone(called, remote, server):
    run = called("constitutional", remote())
    path = run.folder / "steps" / "critiques.jsonl"
    lines = rows(path)
    lines[2]["critique"] = "It mocks people; say so kindly. (edited)"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = rows(run.folder / "sft.jsonl")
    server.requests.clear()
    called("constitutional", remote(resume=True))
    assert len(server.requests) == 1
    assert "(edited)" in server.requests[0]["messages"][0]["content"]
    after = rows(run.folder / "sft.jsonl")
    assert [place for place in range(6) if before[place] != after[place]] == [2]
    assert "(edited)" in path.read_text()


@pytest.mark.parametrize(
    ("trouble", "words"),
    [("500", "HTTP 500"), ("hang", "no answer in 0.2 s"), ("garbage", "not json")],
)
def test_an_endpoint_that_fails_stops_with_one_line_and_the_next_run_resumes(
    call_recipe, called, remote, server, trouble, words
):
    def failing(prompt: str) -> str:
        if len(server.requests) == 8:
            server.always = trouble
        return reply(prompt)

    server.reply = failing
    done = call_recipe("constitutional", remote(request_timeout_s=0.2))
    assert done.returncode == 75
    line = done.stderr.replace("\r", "\n").splitlines()[-1]
    assert line.startswith("stopped: generator_url: ")
    assert words in line
    assert "failed 3 times" in line
    assert len(server.requests) == 8 + 3
    server.always = None
    server.reply = reply
    server.requests.clear()
    again = call_recipe("constitutional", remote())
    assert again.returncode == 2
    assert "unfinished run; continue it with --resume" in again.stderr
    run = called("constitutional", remote(resume=True))
    assert not any(body["messages"][0]["content"] == rows(PROMPTS)[0]["prompt"] for body in server.requests[:10])
    assert run.manifest["metrics"]["answers"] == 6


def test_troubles_that_pass_leave_no_trace(called, remote, server, tmp_path):
    whole = files(called("constitutional", remote(output_dir=tmp_path / "whole")).folder)
    server.troubles = ["500", "garbage", "429", "cut"]
    run = called("constitutional", remote(max_retries=4))
    assert files(run.folder) == whole
    assert "sk-secret" not in (run.folder / "yunque.json").read_text()
    assert run.manifest["parents"] == [{"path": f"{server.url}#served", "manifest_sha256": None}]


def test_a_wrong_key_is_bad_input(call_recipe, remote, server):
    server.always = "401"
    done = call_recipe("constitutional", remote())
    assert done.returncode == 2
    assert "OPENAI_API_KEY, which is set" in done.stderr
    assert "sk-secret" not in done.stderr


def test_a_judge_that_always_says_a_leaves_no_pairs_and_no_empty_file(called, remote, server):
    server.reply = lambda prompt: "A" if prompt.endswith("Answer:") else f"about {len(server.requests)}"
    run = called("constitutional", remote())
    assert run.manifest["metrics"]["share_abstained"] == 1.0
    assert not (run.folder / "preferences.jsonl").exists()


def test_one_part_alone(called, options):
    run = called("constitutional", options(parts="revisions", temperature=0))
    assert (run.folder / "sft.jsonl").exists()
    assert not (run.folder / "steps" / "candidates.jsonl").exists()


def test_starting_over_forgets_the_steps(called, options):
    run = called("constitutional", options(parts="revisions"))
    path = run.folder / "steps" / "answers.jsonl"
    before = path.read_text()
    path.write_text(before.replace('"answer": "', '"answer": "edited ', 1))
    called("constitutional", options(parts="revisions", overwrite_output_dir=True))
    assert path.read_text() == before


BAD = [
    ({"constitution": None}, "constitution: give a YAML file"),
    ({"constitution": "none.yaml"}, "constitution: none.yaml cannot be read"),
    ({"constitution": "empty.yaml"}, "has no principles"),
    ({"dataset_name": None}, "dataset_name: give"),
    ({"prompt_column": "text"}, "prompt_column: no column 'text'"),
    ({"model_name_or_path": None}, "model_name_or_path: give"),
    ({"model_name_or_path": "./none"}, "model_name_or_path: no such model folder"),
    ({"judge_model_name_or_path": "./none"}, "judge_model_name_or_path: no such model folder"),
    ({"temperature": 0}, "temperature: 0 gives two equal answers"),
    ({"generator_url": "http://127.0.0.1:9/v1", "top_k": 5}, "top_k, min_new_tokens"),
    ({"generator_url": "nowhere"}, "generator_url: 'nowhere' is not a base URL"),
    ({"parts": "critiques"}, "parts: critiques"),
    ({"num_revisions": 9}, "num_revisions: 9 rounds"),
    ({"max_new_tokens": 4000}, "max_new_tokens"),
    ({"judges": 2}, "unknown argument --judges"),
]


@pytest.mark.parametrize(("changed", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input_is_one_line_and_writes_nothing(call_recipe, options, tmp_path, monkeypatch, changed, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").write_text("principles: []\n")
    done = call_recipe("constitutional", options(**changed))
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_not_overwritten_unasked(called, call_recipe, options):
    run = called("constitutional", options(parts="revisions"))
    before = files(run.folder)
    done = call_recipe("constitutional", options(parts="revisions"))
    assert done.returncode == 2
    assert "holds a finished run" in done.stderr
    assert files(run.folder) == before
