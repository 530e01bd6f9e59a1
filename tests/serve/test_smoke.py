"""The smoke test of a served model: the model's own answers over HTTP, and what it says when they are not."""

import json
import runpy
import subprocess
import sys

import pytest
import runs

from yunque.errors import CheckFailed, InputError

SCRIPT = runs.ROOT / "serve" / "smoke.py"


@pytest.fixture
def options(exported, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{number} w9 w12"}) + "\n" for number in range(10, 14)))
    folder = str(exported("t5_gated").folder)
    return ["--model_name_or_path", folder, "--prompts", str(prompts), "--output_dir", str(tmp_path / "out")]


def test_a_served_folder_answers_as_the_model_itself(options, tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 answers as the model's own" in done.stdout
    found = json.loads((tmp_path / "out" / "smoke.json").read_text())
    assert len(set(found["answers"])) > 1
    assert found["exit_code"] == 0


def test_other_answers_fail_and_bad_input_is_named(options, tmp_path, monkeypatch):
    main = runpy.run_path(str(SCRIPT))["main"]
    monkeypatch.setitem(main.__globals__, "_alone", lambda folder, prompts, tokens: ["another answer"] * len(prompts))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    with pytest.raises(CheckFailed, match="4 of 4 answers differ"):
        main()
    (tmp_path / "prompts.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(InputError, match="field 'prompt'"):
        main()
