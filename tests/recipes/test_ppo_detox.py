"""recipes/ppo_detox.py from the command line to the model folder: one rank, two ranks, repeated, killed, stopped."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, PeftModel
from runs import assert_refused
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from yunque.artifacts import verify
from yunque.evaluation.answers import FIRST_SAMPLE
from yunque.models.adapter import adapter_for
from yunque.models.arguments import GenerationArguments
from yunque.rl.rollout import generate

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "q_proj"}
POLL_S = 0.002
TOLERANCE = 1e-4
"""Ranks sum in another order: 1e-7 after a step, which Adam and PPO's clips amplify to 1e-5 after 12 (measured)."""
START_TIMEOUT_S = 120

METRICS = {
    *("toxicity_before", "toxicity_after", "toxicity_change", "rougeL_before", "rougeL_after", "rougeL_change"),
    *("kl_final", "samples_per_s", "peak_memory_bytes"),
}
"""What scripts from outside read from the manifest (DESIGN 13), but for the embedded corpus' rude words."""

LOGGED = {
    *("step", "epoch", "objective/kl", "objective/kl_coef", "objective/entropy", "ppo/mean_non_score_reward"),
    *("ppo/mean_scores", "ppo/std_scores", "ppo/loss/policy", "ppo/loss/value", "ppo/loss/total", "ppo/policy/entropy"),
    *("ppo/policy/approxkl", "ppo/policy/clipfrac", "ppo/returns/mean", "ppo/val/mean", "ppo/learning_rate"),
    *("tokens/queries_len_mean", "tokens/responses_len_mean", "time/ppo/total"),
}


FILES = {"before_after.csv", "before_after.jsonl", "reward.png", "kl.png", "loss.png", "toxicity.png", "tokenizer.json"}
T5_FILES = FILES | {"model.safetensors", "config.json"}
ADAPTER_FILES = FILES | {"adapter_model.safetensors", "adapter_config.json"}


@pytest.fixture(scope="session")
def llama_run(finished, ppo_options, new_folder, assets):
    """A new LoRA on a tiny Llama, on one rank."""
    options = ppo_options(output_dir=new_folder(), model_name_or_path=assets.llama, **LORA)
    return finished("ppo_detox", options, cold=True)


@pytest.fixture(params=["t5_run", "llama_run"])
def any_run(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def adapter_run(finished, ppo_options, new_folder, assets):
    """The LoRA of a former run, trained on."""
    return finished("ppo_detox", ppo_options(output_dir=new_folder(), model_name_or_path=assets.adapter))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def held_out_queries(run):
    rows = [json.loads(line) for line in (run.options["dataset_name"] / "test.jsonl").read_text().splitlines()]
    return [run.manifest["prompt_template"].replace("{text}", row["dialogue"]) for row in rows]


def sampled_answers(model, run):
    """What ``model`` answers to the held-out prompts from the random streams of the recipe's evaluation, by query."""
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    queries = held_out_queries(run)
    responses = generate(
        model,
        adapter_for(model, tokenizer),
        tokenizer(queries)["input_ids"],
        GenerationArguments(max_new_tokens=run.options["max_new_tokens"]),
        seed=0,
        samples=range(FIRST_SAMPLE, FIRST_SAMPLE + len(queries)),
        device=torch.device("cpu"),
    )
    texts = tokenizer.batch_decode([response.tokens for response in responses], skip_special_tokens=True)
    return {query: text.strip() for query, text in zip(queries, texts, strict=True)}


def greedy_tokens(model, run):
    tokenizer = AutoTokenizer.from_pretrained(run.folder, padding_side="left")
    inputs = tokenizer(held_out_queries(run), return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    return model.generate(**inputs, do_sample=False, max_new_tokens=12).tolist()


# --- one rank: what a finished run leaves ---


def test_folder_is_complete_and_says_where_it_comes_from(any_run):
    manifest = any_run.manifest
    assert verify(any_run.folder) == []
    assert set(manifest["files"]) >= (ADAPTER_FILES if any_run.options.get("use_peft") else T5_FILES)
    assert (manifest["stage"], manifest["seed"]) == ("ppo", 0)
    parents = [any_run.options["model_name_or_path"], any_run.options["reward_model_name_or_path"]]
    assert [parent["path"] for parent in manifest["parents"]] == [str(path) for path in parents]
    data = any_run.options["dataset_name"]
    assert [(part["split"], part["rows"], part["sha256"]) for part in manifest["data"]] == [
        ("train", 20, sha256(data / "train.jsonl")),
        ("test", 7, sha256(data / "test.jsonl")),
    ]


def test_metrics_have_the_names_others_rely_on(any_run):
    metrics = any_run.manifest["metrics"]
    assert metrics.keys() >= METRICS
    for name in ("toxicity", "rougeL"):
        change = metrics[f"{name}_change"]
        assert change["low"] <= change["mean"] <= change["high"]
        assert change["mean"] == pytest.approx(metrics[f"{name}_after"] - metrics[f"{name}_before"])
    assert metrics["kl_final"] != 0
    assert metrics["samples_per_s"] > 0
    assert metrics["peak_memory_bytes"] > 50e6


def test_manifest_holds_the_resolved_config(any_run):
    config = any_run.manifest["config"]
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in any_run.options.items()}
    asked |= {"lora_target_modules": ["q_proj"]} if "use_peft" in asked else {}
    assert {name: config[name] for name in asked} == asked
    defaults = {"lam": 0.95, "kl_estimator": "k1", "reward_label": "nothate", "temperature": 1.0, "resume": False}
    assert {name: config[name] for name in defaults} == defaults


def test_log_has_a_line_of_finite_numbers_for_every_step(any_run):
    log = any_run.log
    assert [line["step"] for line in log] == list(range(1, 13))
    assert all(line.keys() >= LOGGED for line in log)
    assert all(np.isfinite(list(line.values())).all() for line in log)
    assert log[0]["objective/kl"] == pytest.approx(0, abs=1e-5)  # the policy is its reference
    assert abs(log[-1]["objective/kl"]) > 1e-4
    assert log[-1]["epoch"] == pytest.approx(12 * 8 / 20)


@pytest.mark.parametrize("name", ["reward.png", "kl.png", "loss.png", "toxicity.png"])
def test_plots_show_something(t5_run, name):
    pixels = image.imread(t5_run.folder / name)[..., :3].reshape(-1, 3)
    saturated = (pixels.max(axis=1) - pixels.min(axis=1)) > 0.3
    assert len(pixels) > 100_000
    assert saturated.mean() > 0.001  # a curve or bars, not only grey axes and text


def test_table_of_answers_is_sorted_by_gained_reward(any_run):
    with (any_run.folder / "before_after.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    before, after, gains = (
        np.array([float(row[f"reward_{name}"]) for row in rows]) for name in ("before", "after", "difference")
    )
    assert gains.tolist() == sorted(gains, reverse=True)
    assert gains == pytest.approx(after - before)
    assert gains[0] > gains[-1]
    assert sorted(row["query"] for row in rows) == sorted(held_out_queries(any_run))
    assert after.mean() == pytest.approx(any_run.manifest["metrics"]["reward_after"])


@pytest.mark.parametrize(("run", "auto"), [("t5_run", AutoModelForSeq2SeqLM), ("llama_run", AutoPeftModelForCausalLM)])
def test_saved_model_gives_the_answers_of_the_report(run, auto, request):
    run = request.getfixturevalue(run)
    assert sampled_answers(auto.from_pretrained(run.folder), run) == {
        row["query"]: row["response_after"] for row in run.answers
    }
    assert any(row["response_after"] != row["response_before"] for row in run.answers)


def test_merged_model_answers_as_base_with_adapter(llama_run, called, ppo_options, tmp_path, without_timing):
    options = llama_run.options | {"output_dir": tmp_path / "out", "merge_adapter": True}
    run = called("ppo_detox", options)
    assert not (run.folder / "adapter_config.json").exists()
    assert without_timing(run.manifest["metrics"]) == without_timing(llama_run.manifest["metrics"])
    merged = AutoModelForCausalLM.from_pretrained(run.folder)
    adapted = AutoPeftModelForCausalLM.from_pretrained(llama_run.folder)
    base = AutoModelForCausalLM.from_pretrained(options["model_name_or_path"])
    assert greedy_tokens(merged, run) == greedy_tokens(adapted, llama_run)
    assert greedy_tokens(merged, run) != greedy_tokens(base, run)


def test_run_from_an_adapter_starts_at_that_adapter(adapter_run, assets):
    """TRL 0.11 takes the bare base for the reference, and the KL begins far from 0."""
    start = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(assets.t5), assets.adapter)
    reported = {row["query"]: row["response_before"] for row in adapter_run.answers}
    assert adapter_run.log[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(adapter_run.log[-1]["objective/kl"]) > 1e-4
    assert sampled_answers(start, adapter_run) == reported
    with start.disable_adapter():
        assert sampled_answers(start, adapter_run) != reported


def test_run_from_an_adapter_saves_one_adapter_of_the_same_base(adapter_run, assets):
    assert set(adapter_run.manifest["files"]) >= ADAPTER_FILES
    saved = json.loads((adapter_run.folder / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(assets.t5)
    model = AutoPeftModelForSeq2SeqLM.from_pretrained(adapter_run.folder)
    assert sampled_answers(model, adapter_run) == {row["query"]: row["response_after"] for row in adapter_run.answers}


# --- the same curve: two ranks, the same seed ---


@pytest.mark.distributed
@pytest.mark.parametrize("run", ["t5_run", "llama_run"])
def test_two_ranks_learn_what_one_learns(run, request, finished, new_folder, without_timing):
    one = request.getfixturevalue(run)
    two = finished("ppo_detox", one.options | {"output_dir": new_folder()}, ranks=2)
    assert verify(two.folder) == []
    assert two.manifest["hardware"]["world_size"] == 2
    assert [line["step"] for line in two.log] == [line["step"] for line in one.log]
    for ours, theirs in zip(two.log, one.log, strict=True):
        assert without_timing(ours) == close_to(without_timing(theirs)), ours["step"]
    metrics = without_timing(one.manifest["metrics"])
    for name, value in without_timing(two.manifest["metrics"]).items():
        assert value == close_to(metrics[name]), name
    answers = [{row["query"]: row["response_after"] for row in run.answers} for run in (one, two)]
    assert answers[0] == answers[1]


def close_to(expected):
    return pytest.approx(expected, abs=TOLERANCE, rel=TOLERANCE)


def test_the_same_seed_gives_the_same_run(t5_run, called, tmp_path, without_timing):
    again = called("ppo_detox", t5_run.options | {"output_dir": tmp_path / "out"})
    assert_same_run(again, t5_run, without_timing)


def test_another_seed_gives_another_run(t5_run, called, tmp_path):
    other = called("ppo_detox", t5_run.options | {"output_dir": tmp_path / "out", "seed": 1, "max_steps": 2})
    for name in ("tokens/queries_len_mean", "ppo/mean_scores", "ppo/loss/total"):
        assert [line[name] for line in other.log] != [line[name] for line in t5_run.log[:2]]


def assert_same_run(run, other, without_timing):
    assert [without_timing(line) for line in run.log] == [without_timing(line) for line in other.log]
    assert without_timing(run.manifest["metrics"]) == without_timing(other.manifest["metrics"])
    for name in ("model.safetensors", "before_after.csv"):
        assert sha256(run.folder / name) == sha256(other.folder / name)


# --- killed and stopped ---


def interrupt(process, folder, number, at_step):
    """Send a signal once the run has logged ``at_step`` steps; returns (exit code, stderr)."""
    log = folder / "log.jsonl"
    deadline = time.monotonic() + START_TIMEOUT_S
    while not log.exists() or log.read_bytes().count(b"\n") < at_step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run did not start"
        time.sleep(POLL_S)
    os.killpg(process.pid, number)
    errors = process.communicate(timeout=START_TIMEOUT_S)[1]
    return process.returncode, errors


@pytest.fixture(scope="session")
def stopped(start_recipe, t5_run, new_folder):
    """A run like t5_run, asked to stop by SIGTERM after its checkpoint at step 3."""
    options = t5_run.options | {"output_dir": new_folder()}
    code, errors = interrupt(start_recipe("ppo_detox", options), options["output_dir"], signal.SIGTERM, at_step=4)
    return options, code, errors


def test_killed_run_resumes_to_the_same_end(start_recipe, finished, t5_run, new_folder, without_timing):
    options = t5_run.options | {"output_dir": new_folder()}
    folder = options["output_dir"]
    code, _ = interrupt(start_recipe("ppo_detox", options), folder, signal.SIGKILL, at_step=4)
    assert code == -signal.SIGKILL
    assert not (folder / "yunque.json").exists()
    assert (folder / "log.jsonl").read_bytes().count(b"\n") < 12
    resumed = finished("ppo_detox", options | {"resume": True})
    assert verify(folder) == []
    assert_same_run(resumed, t5_run, without_timing)


def test_stopped_run_says_how_to_go_on(stopped):
    options, code, errors = stopped
    assert code == 75
    last = errors.splitlines()[-1]
    assert last.startswith("stopped: ")
    assert "--resume" in last
    assert str(options["output_dir"]) in last
    assert "Traceback" not in errors
    assert not (options["output_dir"] / "yunque.json").exists()


def test_stopped_run_resumes_to_the_same_end(stopped, called, t5_run, tmp_path, without_timing):
    shutil.copytree(stopped[0]["output_dir"], tmp_path / "out")
    done = len((tmp_path / "out" / "log.jsonl").read_text().splitlines())
    assert 4 <= done < 12
    resumed = called("ppo_detox", t5_run.options | {"output_dir": tmp_path / "out", "resume": True})
    assert_same_run(resumed, t5_run, without_timing)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"resume": True, "learning_rate": 1e-2}, ("learning_rate: ", "0.001", "0.01", "--overwrite_output_dir")),
        ({}, ("--output_dir ", "--resume", "--overwrite_output_dir")),
    ],
)
def test_stopped_run_is_not_continued_as_another(stopped, call_recipe, tmp_path, changed, words):
    folder = tmp_path / "out"
    shutil.copytree(stopped[0]["output_dir"], folder)
    before = content(folder)
    assert_refused(call_recipe("ppo_detox", stopped[0] | {"output_dir": folder} | changed), *words)
    assert content(folder) == before
