"""recipes/finetune.py on decoder-only models and instruction rows: every method, packing, chat, mixtures, refusals."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest
import tiny
import torch
from runs import assert_refused

from yunque.artifacts import verify
from yunque.models.arguments import ModelArguments, PromptTuningArguments
from yunque.models.loading import load_model, load_tokenizer

WORDS = ("###", "Instruction:", "Input:", "Response:", "say", "repeat", "user:", "assistant:")
CHAT = (
    "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LORA = {"use_peft": True, "lora_r": 4, "learning_rate": 2e-2}
METHODS = {
    "full": {},
    "lora": LORA,
    "qlora": LORA | {"load_in_4bit": True},
    "prompt_tuning": {"prompt_tuning_tokens": 20, "learning_rate": 0.3},
}


@pytest.fixture(scope="session")
def causal(tmp_path_factory):
    """A folder with a tiny llama, its tokenizer with a chat template, and 24 instruction rows."""
    root = tmp_path_factory.mktemp("causal")
    tokenizer = tiny.tokenizer(WORDS)
    tokenizer.chat_template = CHAT
    tiny.llama().save_pretrained(root / "llama")
    tokenizer.save_pretrained(root / "llama")
    rows = []
    for number in range(24):
        word = f"w{20 + number % 3}"
        row = {
            "instruction": "say" if number % 2 else "repeat",
            "input": word if number % 3 else "",
            "output": "w30 w31",
        }
        rows.append(row | {"answer": f"{word} w40"})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def options(causal, tmp_path):
    """Options of a short run; keywords add or replace, None removes."""

    def chosen(**changed):
        fixed = {
            "model_name_or_path": causal / "llama",
            "dataset_name": causal / "rows.jsonl",
            "target_column": "output",
            "prompt_templates": "instruction_en",
            "output_dir": tmp_path / "out",
            "max_steps": 20,
            "logging_steps": 5,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "max_new_tokens": 4,
            "max_target_length": 8,
            "mixed_precision": "no",
        } | changed
        return {name: value for name, value in fixed.items() if value is not None}

    return chosen


def logits(folder, *, quantized=False):
    args = ModelArguments(model_name_or_path=str(folder), load_in_4bit=quantized)
    model = load_model(args, load_tokenizer(args), PromptTuningArguments()).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 4, 20, 6, 30]])).logits.float()


def answers_again(run, quantized):
    """What the model in the run's folder answers to the queries of its predictions, one by one."""
    args = ModelArguments(model_name_or_path=str(run.folder), load_in_4bit=quantized)
    tokenizer = load_tokenizer(args)
    model = load_model(args, tokenizer, PromptTuningArguments()).eval()
    answers = []
    for row in run.rows("predictions.jsonl"):
        inputs = tokenizer(row["query"], return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=run.options["max_new_tokens"])
        answers.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_its_folder_loads(method, called, options, causal):
    run = called("finetune", options(**METHODS[method]))
    assert run.losses[-1] < 0.8 * run.losses[0]
    assert verify(run.folder) == []
    assert ("adapter_model.safetensors" in run.manifest["files"]) == (method != "full")
    quantized = method == "qlora"
    assert answers_again(run, quantized) == [row["prediction"] for row in run.rows("predictions.jsonl")]
    change = (logits(run.folder, quantized=quantized)[:, -5:] - logits(causal / "llama", quantized=False)).abs().max()
    assert change > 0.1
    assert run.manifest["prompt_template"].startswith("### Instruction:")


@pytest.mark.parametrize("method", ["lora", "qlora"])  # all weights: test_finetune.py
def test_two_ranks_train_as_one(method, called, finished, options, tmp_path):
    quick = {**METHODS[method], "max_steps": 4, "logging_steps": 1, "lora_dropout": 0.0}
    one = called("finetune", options(**quick))
    two = finished("finetune", options(**quick, output_dir=tmp_path / "two", per_device_train_batch_size=2), ranks=2)
    # nf4 computes in bfloat16, whose sums depend on the batch's shape
    assert two.losses == pytest.approx(one.losses, rel=1e-2 if method == "qlora" else 1e-4)
    assert len(two.rows("predictions.jsonl")) == len(one.rows("predictions.jsonl"))


def test_a_merged_model_answers_as_base_and_adapter_did(called, options, tmp_path):
    for method in ("lora", "qlora"):
        adapter = called("finetune", options(**METHODS[method], output_dir=tmp_path / method))
        folder = tmp_path / f"{method}_merged"
        merged = called("finetune", options(**METHODS[method], output_dir=folder, merge_adapter=True))
        assert "adapter_config.json" not in merged.manifest["files"]
        expected = logits(adapter.folder, quantized=method == "qlora")
        noise = 2**-7 * expected.abs().max()  # bfloat16 keeps 8 bits
        assert (logits(folder) - expected).abs().max() < 2 * noise


def test_packed_rows_give_the_loss_of_single_ones(called, options, tmp_path):
    # all 23 rows in one batch either way, so the first loss is the same mean over the same labels
    single = {"max_steps": 1, "per_device_train_batch_size": 23, "test_size": 0.05}
    alone = called("finetune", options(**single))
    packed = called("finetune", options(**single, output_dir=tmp_path / "packed", packing=True, packing_length=64))
    assert packed.losses[0] == pytest.approx(alone.losses[0], rel=1e-4)


def test_a_signalled_run_resumes_to_the_same_curve(called, call_recipe, options, tmp_path):
    whole = called("finetune", options(max_steps=60, logging_steps=1))
    stopped = options(max_steps=60, logging_steps=1, output_dir=tmp_path / "stopped")
    log = tmp_path / "stopped" / "log.jsonl"

    def signal_once_it_trains():
        while not log.exists() or len(log.read_text().splitlines()) < 3:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=signal_once_it_trains, daemon=True).start()
    process = call_recipe("finetune", stopped)
    assert process.returncode == 75, process.stderr
    assert called("finetune", stopped | {"resume": True}).losses == whole.losses


def test_the_chat_template_frames_prompt_and_answer(called, options):
    run = called("finetune", options(chat_template=True, prompt_templates="{instruction} {input}", max_steps=2))
    queries = [row["query"] for row in run.rows("predictions.jsonl")]
    assert all(query.startswith("user: ") and query.endswith(" </s> assistant: ") for query in queries)


def test_a_mixture_of_one_task_reports_as_a_plain_run(called, options):
    run = called("finetune", options(mixture='{"name": "only"}', max_steps=2))
    assert run.manifest["metrics"]["eval_loss"] > 0


def test_a_mixture_reports_each_task_and_what_was_forgotten(called, options, causal):
    tasks = [{"name": "fixed", "weight": 3}, {"name": "echo", "weight": 1, "target_column": "answer"}]
    old = {"name": "old", "dataset_name": str(causal / "rows.jsonl"), "target_column": "answer"}
    config = causal / "mixture.yaml"
    config.write_text(json.dumps({"mixture": tasks, "old_task": old}))  # JSON is YAML
    run = called("finetune", options(config=config, evaluate_before=True))
    metrics = run.manifest["metrics"]
    assert set(metrics["tasks"]) == {"fixed", "echo"}
    assert metrics["forgetting"]["task"] == "old"
    for report in (metrics["forgetting"], *metrics["change"].values()):
        change = report["loss_change"]
        assert change["low"] <= change["mean"] <= change["high"]
        assert change["mean"] == pytest.approx(report["loss_after"] - report["loss_before"])
    assert metrics["change"]["fixed"]["loss_change"]["high"] < 0
    assert {source["task"] for source in run.manifest["data"]} == {"fixed", "echo", "old"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prompt_templates": "Answer:"}, ("prompt_templates: ", "no placeholder")),
        ({"prompt_templates": "{question}"}, ("prompt_templates: ", "no column 'question'", "instruction, input")),
        ({"target_column": "reply"}, ("target_column: ", "reply")),
        ({"load_in_4bit": True}, ("load_in_4bit: ", "use_peft")),
        ({"quantize_head": True}, ("quantize_head: ", "load_in_4bit")),
        ({"use_peft": True, "lora_target_modules": "nope"}, ("lora_target_modules: ", "q_proj")),
        ({"prompt_tuning_tokens": 0}, ("prompt_tuning_tokens: 0",)),
        ({"prompt_tuning_tokens": 8, "use_peft": True}, ("prompt_tuning_tokens: ", "use_peft")),
        ({"prompt_tuning_tokens": 8, "merge_adapter": True}, ("merge_adapter: ", "virtual tokens")),
        ({"prompt_tuning_tokens": 8, "packing": True}, ("packing: ", "virtual tokens")),
        ({"packing": True, "packing_length": 4}, ("packing_length: ", "tokens")),
        ({"system_prompt": "be kind"}, ("system_prompt: ", "chat_template")),
        ({"mixture": '{"weight": 1}'}, ("mixture: ", "a name")),
        ({"mixture": '{"name": "a", "learning_rate": 1}'}, ("mixture: ", "unknown option learning_rate")),
        ({"old_task": '{"name": "a", "prompt_template": "x"}'}, ("old_task: ", "{text}")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(changed, words, call_recipe, options, tmp_path):
    process = call_recipe("finetune", options(**changed))
    assert_refused(process, *words)
    assert not (tmp_path / "out").exists()
