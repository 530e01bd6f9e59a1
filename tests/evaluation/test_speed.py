"""Start, memory and speed of a folder in a process of its own, without torch where it is an ONNX folder."""

import io
import json
import shutil
import sys

import pytest
import torch
from evaluating import result

from yunque.errors import InputError
from yunque.evaluation import torch_speed
from yunque.evaluation.arguments import EvaluatedModelArguments, EvaluationArguments
from yunque.evaluation.speed import measure_speed
from yunque.runtime.speed import peak_memory_bytes


def check(measured, sizes, new_tokens):
    assert measured["new_tokens"] == new_tokens
    assert measured["tokens_per_s"].keys() == measured["tokens_per_cpu_s"].keys() == set(sizes)
    assert min(measured["tokens_per_s"].values()) > 0
    assert 0 < measured["load_s"] <= measured["start_s"]
    assert 0 < measured["loaded_memory_bytes"] <= measured["peak_memory_bytes"]
    assert measured["first_token_s"] > 0


def test_an_onnx_folder_is_measured_by_itself(evaluate):
    done = evaluate(
        "onnx", max_test_samples=3, latency_prompts=2, measure_speed=True, speed_batch_sizes=[1, 5], speed_new_tokens=4
    )
    assert done.code == 0, done.errors
    fresh = result(done.folder)["speed"]["fresh_process"]
    check(fresh, ("1", "5"), 4)
    assert "in a fresh process" in done.output
    # Linux would let ru_maxrss begin at this process's memory, which holds torch
    assert fresh["peak_memory_bytes"] < 200e6 < peak_memory_bytes()


def test_a_torch_folder_writes_as_many_tokens(kinds, monkeypatch, capsys):
    calls = []

    def answers(self, queries, setting, *, seed, samples):
        found = whole(self, queries, setting, seed=seed, samples=samples)
        calls.append((len(queries), [len(answer.tokens) for answer in found]))
        return found

    whole = torch_speed.load_generator.__globals__["TorchGenerator"].answers
    monkeypatch.setattr(torch_speed.load_generator.__globals__["TorchGenerator"], "answers", answers)
    request = {
        "folder": str(kinds.t5), "prompts": [[5, 6, 1], [7, 1]], "batch_sizes": [3], "new_tokens": 5,
        "first_token_prompts": 1, "repeats": 2, "threads": torch.get_num_threads(), "spawned": 0.0,
    }  # fmt: skip
    given = {"request": request, "model": {"model_name_or_path": str(kinds.t5)}}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(given)))
    torch_speed.main()
    check(json.loads(capsys.readouterr().out.splitlines()[-1]), ("3",), 5)
    assert calls == [(1, [1]), (1, [1]), (3, [2] * 3), (3, [5] * 3), (3, [5] * 3)]


def test_a_process_that_fails_says_why(kinds, tmp_path):
    broken = tmp_path / "onnx"
    shutil.copytree(kinds.onnx, broken)
    (broken / "weights.bin").unlink()
    with pytest.raises(InputError, match=r"measure_speed: .*weights\.bin"):
        measure_speed(EvaluatedModelArguments(str(broken)), EvaluationArguments(), [[5, 1]], 8)


def test_sizes_below_1_are_refused():
    for wrong in ({"speed_batch_sizes": [0, 4]}, {"speed_batch_sizes": []}, {"speed_new_tokens": 0}):
        with pytest.raises(InputError, match="speed_batch_sizes"):
            EvaluationArguments(**wrong)
