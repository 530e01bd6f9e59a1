"""The `yunque` command as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import yunque
from yunque import artifacts

COMMAND = Path(sys.executable).with_name("yunque")


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, args)], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def folder(tmp_path):
    def write(staging: Path) -> None:
        (staging / "model.safetensors").write_bytes(b"weights")

    artifacts.save_model_folder(
        tmp_path / "sft", write, stage="finetune", parents=["google/flan-t5-base"], metrics={"rougeL": 0.25}
    )
    artifacts.save_model_folder(
        tmp_path / "ppo", write, stage="ppo", parents=[str(tmp_path / "sft")], prompt_template="Sum:\n{text}"
    )
    return tmp_path / "ppo"


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"yunque {yunque.__version__}\n")


def test_show_prints_the_manifest_and_its_parents(folder):
    done = run("show", folder, "--verify")
    assert done.returncode == 0, done.stderr
    for words in (
        "stage             ppo",
        "base_model        google/flan-t5-base",
        r'prompt_template   "Sum:\n{text}"',
        f"{folder} (ppo)",
        f"{folder.with_name('sft')} (finetune)",
        "google/flan-t5-base (no manifest)",
        artifacts.sha256_bytes(b"weights"),
        "verified",
    ):
        assert words in done.stdout
    assert "0.25" in run("show", folder.with_name("sft")).stdout


def test_show_json_is_the_manifest_with_its_lineage(folder):
    shown = json.loads(run("show", folder, "--json").stdout)
    assert [ancestor["stage"] for ancestor in shown.pop("lineage")] == ["ppo", "finetune", None]
    assert shown == json.loads((folder / artifacts.MANIFEST).read_text())


def test_verify_fails_on_a_changed_file_and_names_it(folder):
    (folder / "model.safetensors").write_bytes(b"weightz")
    assert run("show", folder).returncode == 0
    for options in (["--verify"], ["--verify", "--json"]):
        done = run("show", folder, *options)
        assert done.returncode == 1
        assert "model.safetensors has other content" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert json.loads(done.stdout)["problems"] == ["model.safetensors has other content (sha256 differs)"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["show", "nowhere"], "nowhere: no such folder"),
        (["show", "/"], "yunque.json"),
        (["show"], "folder"),
        (["show", "a", "--jsn"], "--jsn"),
        (["shw"], "shw"),
        ([], "Missing command"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(args, words):
    done = run(*args)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.fixture
def counted(tmp_path):
    """A file of four texts and a tokenizer with one token per word."""
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    texts = ["w5 w6", "w5 w6 w7 w8", "W5  w6", "w9"]
    rows = [{"text": text, "label": f"l{number % 2}"} for number, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_data_stats_counts_tokens(counted):
    options = ["--label", "label", "--limit", 2, "--template", "Say: {text}", "--plot", counted / "plot.png", "--json"]
    done = run("data", "stats", counted / "rows.jsonl", "--tokenizer", counted / "tokenizer", *options)
    assert done.returncode == 0, done.stderr
    split = json.loads(done.stdout)["splits"][0]
    assert (split["rows"], split["fields"]["text"]["tokens"]) == (4, 9)
    assert split["fields"]["text"]["cuts"] == [
        {"limit_tokens": 2, "rows": 1, "share_rows": 0.25, "tokens_lost": 2, "share_tokens": pytest.approx(2 / 9)}
    ]
    assert split["templates"]["Say: {text}"]["tokens"] == 13
    assert split["classes"].keys() == {"l0", "l1"}
    assert (counted / "plot.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["rows.jsonl"], "tokenizer"),
        (["none.jsonl", "--tokenizer", "tokenizer"], "no such file or folder"),
        (["rows.jsonl", "--tokenizer", "tokenizer", "--limit", "0"], "--limit: 0"),
        (["rows.jsonl", "--tokenizer", "tokenizer", "--plot", "none/plot.png"], "--plot: no such folder: none"),
    ],
)
def test_data_stats_bad_usage_is_one_line_and_exit_2(counted, monkeypatch, args, words):
    monkeypatch.chdir(counted)
    done = run("data", "stats", *args)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
