"""Tiny models and dialogues in folders; ways to run a recipe on them: as a subprocess, on ranks, in this process."""

from __future__ import annotations

import json
import os
import random
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import warm
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSeq2SeqLM

ROOT = Path(__file__).parents[1]
RUN_TIMEOUT_S = 300
POLL_S = 0.01
TEMPLATE_WORDS = ("Summarize", "the", "following", "conversation.", "Summary:")

TOPICS = ("shopping", "weather", "shopping", "bank")

TIMING = ("time/", "samples_per_s", "peak_memory_bytes")
"""What two runs of the same seed may differ in."""


@dataclass(frozen=True)
class Assets:
    """Folders of tiny models with their tokenizers, and a data folder of 20 train and 7 test rows."""

    t5: Path
    llama: Path
    adapter: Path  # LoRA on t5, trained
    padless: Path  # llama whose tokenizer names no pad token
    classifier: Path
    data: Path


@dataclass(frozen=True)
class Run:
    """The output folder of a finished run and what the run was asked for."""

    folder: Path
    options: dict[str, Any]

    @property
    def log(self) -> list[dict[str, float]]:
        return self.rows("log.jsonl")

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.log if "loss" in line]

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "yunque.json").read_text())

    @property
    def answers(self) -> list[dict[str, Any]]:
        return self.rows("before_after.jsonl")

    def rows(self, name: str) -> list[dict[str, Any]]:
        return json_lines(self.folder / name)


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a running recipe has written ``path``."""
    limit = time.monotonic() + RUN_TIMEOUT_S
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(POLL_S)


def assert_refused(process: subprocess.CompletedProcess[str], *words: str, alone: bool = False) -> None:
    """Exit code 2 and at the end of stderr, or ``alone`` there, one line that has all of ``words``."""
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    *others, line = process.stderr.splitlines()
    assert line.startswith("error: ")
    assert not (alone and others), process.stderr
    assert [word for word in words if word not in line] == []


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    root = tmp_path_factory.mktemp("assets")
    tokenizer = tiny.tokenizer(TEMPLATE_WORDS)
    for name, build in (("t5", tiny.t5), ("llama", tiny.llama), ("padless", tiny.llama), ("classifier", tiny.roberta)):
        build().save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    tiny.tokenizer(TEMPLATE_WORDS, pad_token=None).save_pretrained(root / "padless")
    _trained_adapter(root / "t5").save_pretrained(root / "adapter")
    tokenizer.save_pretrained(root / "adapter")
    numbers = random.Random(0)
    for split, rows in (("train", 20), ("test", 7)):
        write_dialogues(root / "data" / f"{split}.jsonl", rows, numbers)
    return Assets(**{name: root / name for name in Assets.__annotations__})


def _trained_adapter(base: Path) -> PeftModel:
    """LoRA as a fine-tuning run leaves it: its B matrices are no longer zero."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForSeq2SeqLM.from_pretrained(base),
        LoraConfig(r=4, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"]),
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    return model


def write_dialogues(path: Path, rows: int, numbers: random.Random) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        for row in range(rows):
            words = [f"w{numbers.randrange(8, tiny.VOCABULARY)}" for _ in range(numbers.randrange(5, 15))]
            record = {"id": row, "dialogue": " ".join(words), "summary": " ".join(words[:4]), "topic": TOPICS[row % 4]}
            file.write(json.dumps(record) + "\n")


@pytest.fixture(scope="session")
def ppo_options(assets: Assets) -> Callable[..., dict[str, Any]]:
    """Options of a short PPO run that uses every part of the loop; keywords add or replace, None removes."""

    def options(**changed: Any) -> dict[str, Any]:
        chosen = {
            "model_name_or_path": assets.t5,
            "reward_model_name_or_path": assets.classifier,
            "dataset_name": assets.data,
            "max_steps": 12,
            "save_steps": 3,
            "batch_size": 8,
            "mini_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "ppo_epochs": 2,
            "learning_rate": 1e-3,
            "max_grad_norm": 1.0,
            "max_new_tokens": 8,
            "max_new_tokens_low": 4,
            "mixed_precision": "no",
        } | changed
        return {name: value for name, value in chosen.items() if value is not None}

    return options


def command_line(options: dict[str, Any]) -> list[str]:
    """Options as a user types them; True is a flag without value."""
    return [
        part
        for name, value in options.items()
        for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def script(name: str) -> str:
    """Path of a script from the root: "ppo_detox" is a recipe, "compress/distill" lies where it says."""
    return f"{name}.py" if "/" in name else f"recipes/{name}.py"


@pytest.fixture(scope="session")
def start_recipe() -> Callable[..., subprocess.Popen[str]]:
    """Start a recipe as its own process group: start_recipe("ppo_detox", options, ranks=1, cold=False)."""

    def start(name: str, options: dict[str, Any], *, ranks: int = 1, cold: bool = False) -> subprocess.Popen[str]:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", "launch/ddp.yaml"]
        launcher += ["--num_processes", str(ranks), "--main_process_port", "0", "-m", "yunque.distributed.rehearsal"]
        python = sys.executable if cold else warm.python()
        return subprocess.Popen(
            [python, *(launcher if ranks > 1 else []), script(name), *command_line(options)],
            cwd=ROOT,
            env=os.environ | warm.ON_CPU,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="session")
def run_recipe(start_recipe: Callable[..., Any]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a recipe as a subprocess to its end: run_recipe("ppo_detox", options, ranks=1)."""

    def run(name: str, options: dict[str, Any], **how: Any) -> subprocess.CompletedProcess[str]:
        process = start_recipe(name, options, **how)
        try:
            output, errors = process.communicate(timeout=RUN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    return run


@pytest.fixture
def call_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """Run a recipe in this process, seconds faster than a new one: call_recipe("ppo_detox", options)."""
    for name, value in warm.ON_CPU.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def call(name: str, options: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        path = str(ROOT / script(name))
        monkeypatch.setattr(sys, "argv", [path, *command_line(options)])
        _forget_accelerators()
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            runpy.run_path(path, run_name="__main__")
        return subprocess.CompletedProcess(sys.argv, left.value.code, *capsys.readouterr())

    yield call
    torch.set_num_threads(threads)
    _forget_accelerators()


def _forget_accelerators() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def finished(run_recipe: Callable[..., Any]) -> Callable[..., Run]:
    """Run a recipe as a subprocess that must succeed: finished("ppo_detox", options, ranks=1, cold=False)."""

    def finish(name: str, options: dict[str, Any], **how: Any) -> Run:
        process = run_recipe(name, options, **how)
        assert process.returncode == 0, process.stderr
        return Run(Path(options["output_dir"]), options)

    return finish


@pytest.fixture(scope="session")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Names output folders that do not exist."""
    return lambda: tmp_path_factory.mktemp("run") / "out"


@pytest.fixture(scope="session")
def t5_run(finished: Callable[..., Run], ppo_options: Callable[..., Any], new_folder: Callable[[], Path]) -> Run:
    """PPO on all weights of a tiny T5, on one rank."""
    return finished("ppo_detox", ppo_options(output_dir=new_folder()))


@pytest.fixture
def called(call_recipe: Callable[..., Any]) -> Callable[..., Run]:
    """As finished, in this process."""

    def call(name: str, options: dict[str, Any]) -> Run:
        process = call_recipe(name, options)
        assert process.returncode == 0, process.stderr
        return Run(Path(options["output_dir"]), options)

    return call


@pytest.fixture(scope="session")
def without_timing() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A log line or a manifest's metrics without what the clock decides."""
    return lambda record: {name: value for name, value in record.items() if not name.startswith(TIMING)}
