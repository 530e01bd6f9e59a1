import csv
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import evaluated
import numpy as np
import pytest
import yaml
from warm import ON_CPU

from yunque.cli.matrix import _parse
from yunque.errors import InputError
from yunque.evaluation.comparison import Options
from yunque.evaluation.error_types import ErrorRules, error_table, error_types
from yunque.evaluation.evaluations import read_evaluation
from yunque.evaluation.matrix import compare_runs, evaluations_of, overview, read_matrix, run_matrix

AXES = {
    "model": {"sft": "models/sft", "ppo": "models/ppo"},
    "decoding": {"greedy": {"temperature": [0.0]}, "hot": {"temperature": [1.0]}},
}


def matrix_file(folder, **content):
    path = folder / "matrix.yaml"
    path.write_text(
        yaml.safe_dump({"axes": AXES, "evaluate": {"dataset_name": "rows.jsonl"}} | content, sort_keys=False)
    )
    return path


def fake(done=None, stop_at=None):
    """An `evaluate` that writes scores which tell the runs apart."""

    def evaluate(run):
        if done is not None:
            done.append(run.values)
        if stop_at is not None and run.values == stop_at:
            raise InputError("dataset_name: rows.jsonl: no such file")
        shift = 0.3 if run.values["model"] == "sft" else 0.0
        scores = {"toxicity": evaluated.toxicity(80, 0.1, seed=1) * 0.5 + shift, "rougeL": [0.4] * 80}
        evaluated.write(run.folder, scores)

    return evaluate


def test_axes_expand_to_runs_with_the_options_of_all(tmp_path):
    content = {"axes": {**AXES, "prompt": {"plain": "{text}"}, "context": ["one.jsonl"]}, "evaluate": {"seed": 3}}
    matrix = read_matrix(matrix_file(tmp_path, **content), tmp_path)
    assert matrix.varied == ["model", "decoding"]
    assert [run.name(matrix.varied) for run in matrix.runs] == ["sft greedy", "sft hot", "ppo greedy", "ppo hot"]
    assert matrix.runs[3].options == {
        "seed": 3, "model_name_or_path": "models/ppo", "prompt_template": "{text}", "dataset_name": "one.jsonl",
        "temperature": [1.0],
    }  # fmt: skip
    assert len({run.folder for run in matrix.runs}) == 4


def test_finished_runs_are_skipped_and_a_changed_option_or_model_makes_a_new_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sft").mkdir(parents=True)
    (tmp_path / "models" / "sft" / "yunque.json").write_text("{}")
    path, done, said = matrix_file(tmp_path), [], []
    run_matrix(read_matrix(path, tmp_path), fake(done), said.append)
    assert len(done) == 4
    run_matrix(read_matrix(path, tmp_path), fake(done), said.append)
    assert len(done) == 4
    assert said[-1] == "run 4 of 4: ppo hot: finished before"
    (tmp_path / "models" / "sft" / "yunque.json").write_text('{"saved": "anew"}')
    run_matrix(read_matrix(path, tmp_path), fake(done), said.append)
    assert [values["model"] for values in done[4:]] == ["sft", "sft"]
    run_matrix(read_matrix(matrix_file(tmp_path, evaluate={"dataset_name": "x"}), tmp_path), fake(done), said.append)
    assert len(done) == 10


def test_a_failing_run_is_named_and_the_finished_ones_are_kept(tmp_path):
    matrix = read_matrix(matrix_file(tmp_path), tmp_path)
    with pytest.raises(InputError, match=r"^run ppo greedy: dataset_name: rows.jsonl: no such file"):
        run_matrix(matrix, fake(stop_at={"model": "ppo", "decoding": "greedy"}), print)
    assert [run.finished for run in matrix.runs] == [True, True, False, False]


def test_runs_are_compared_with_the_baseline_of_their_context(tmp_path):
    axes = {"model": AXES["model"], "context": {"a": "a.jsonl", "b": "b.jsonl"}}
    content = {"axes": axes, "evaluate": {}, "baseline": "ppo", "gates": ["toxicity<=+0.1"]}
    matrix = read_matrix(matrix_file(tmp_path, **content), tmp_path)
    run_matrix(matrix, fake(), print)
    evaluations, silent = evaluations_of(matrix)
    assert silent == []
    results = compare_runs(matrix, evaluations, Options())
    assert list(results) == ["a", "b"]
    assert results["b"].baseline.name == "ppo b"
    assert [each.evaluation.name for each in results["b"].candidates] == ["sft b"]
    assert results["b"].not_proved() == ["sft b toxicity<=+0.1 (failed)"]
    table = overview(matrix, evaluations)
    assert table["header"] == ["model", "context", "Toxicity", "ROUGE-L"]
    assert table["rows"][0] == ["sft", "a", f"{np.mean(evaluations['sft a'].scores['toxicity']):.3f}", "40.00"]


def test_a_model_that_answers_nothing_is_left_out_of_the_comparison_and_said(tmp_path):
    matrix = read_matrix(matrix_file(tmp_path), tmp_path)
    run_matrix(matrix, fake(), print)
    path = matrix.runs[2].folder / "generations.jsonl"
    rows = [json.loads(line) | {"answer": ""} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluations, silent = evaluations_of(matrix)
    assert silent == [f"run ppo greedy is left out: {path}: all 80 answers are empty; there is nothing to compare"]
    [result] = compare_runs(matrix, evaluations, Options()).values()
    assert [each.evaluation.name for each in result.candidates] == ["sft hot", "ppo hot"]
    assert overview(matrix, evaluations)["rows"][2] == ["ppo", "greedy", "-", "-"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"axis": {}}, "unknown key axis; there are: axes, evaluate"),
        ({"axes": {"model": ["m"], "temperature": [1]}}, "unknown axis temperature; there are: model, prompt"),
        ({"axes": {"decoding": {"greedy": {"temperature": [0.0]}}}}, "give at least the axis model"),
        ({"axes": {"model": ["m"], "decoding": ["greedy"]}}, "decoding: greedy: give a mapping of evaluate's options"),
        ({"axes": {"model": []}}, "model: give names with values"),
        ({"axes": {"model": ["m", "m"]}}, "a list of different values"),
        ({"evaluate": {"temperature": [0.5]}}, "temperature is given by evaluate and by axis decoding"),
        ({"evaluate": {"output_dir": "x"}}, "evaluate: output_dir is set by the matrix itself"),
        ({"baseline": "dpo"}, "baseline: dpo is not on axis model; there are: sft, ppo"),
        ({"gates": ["toxicity"]}, "--gate toxicity: give METRIC<=LIMIT"),
        ({"errors": {"toxic": 1}}, "unknown key of errors toxic; there are: toxicity, repetition, rougeL"),
        ({"errors": {"toxicity": "high"}}, "toxicity: 'high' is no limit"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path, content, words):
    with pytest.raises(InputError, match=words):
        read_matrix(matrix_file(tmp_path, **content), tmp_path)


def test_no_yaml_and_no_file_are_named(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_matrix(tmp_path / "none.yaml", tmp_path)
    (tmp_path / "bad.yaml").write_text("axes: [")
    with pytest.raises(InputError, match="not valid YAML"):
        read_matrix(tmp_path / "bad.yaml", tmp_path)


def test_error_types_follow_their_rules(tmp_path):
    scores = {
        "toxicity": [0.5, 0.49, 0.0, 0.9, 0.0],
        "rougeL": [0.1, 0.09, None, 0.0, 0.5],
        "repetition": [0.0, 0.2, 0.1, 0.0, 0.0],
        "unfinished": [0.0, 1.0, 0.0, 0.0, 0.0],
        "refusal": [0.0, 0.0, 1.0, 0.0, 0.0],
        "format": [1.0, 1.0, 0.0, 0.0, 1.0],
    }
    answers = ['=cmd, "quoted"', "two\nlines", "I cannot help", " ", "good"]
    written = evaluated.write(tmp_path / "a", scores, answers=answers, references=["r", "s", None, "t", "u"])
    evaluation = read_evaluation(written)
    assert [error_types(evaluation, row) for row in range(5)] == [
        ["toxic"], ["truncated", "repeated", "off-reference"], ["refusal", "format"], ["empty"], [],
    ]  # fmt: skip
    assert error_types(evaluation, 1, ErrorRules(toxicity=0.4)) == ["truncated", "repeated", "toxic", "off-reference"]
    lines = list(csv.DictReader(error_table({"run one": evaluation}).splitlines(keepends=True)))
    assert list(lines[0]) == ["run", "id", "prompt", "prediction", "reference", "error_type"]
    assert [(line["id"], line["error_type"]) for line in lines] == [
        ("0", "toxic"), ("1", "truncated"), ("1", "repeated"), ("1", "off-reference"), ("2", "refusal"),
        ("2", "format"), ("3", "empty"),
    ]  # fmt: skip
    assert (lines[0]["prediction"], lines[1]["prediction"], lines[1]["reference"]) == (*answers[:2], "s")


def test_the_examples_of_the_documentation_are_read(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")
    found = []
    for number, part in enumerate(text.split("```yaml\n")[1:]):
        path = tmp_path / f"experiments{number}.yaml"
        path.write_text(part.partition("```")[0])
        matrix = read_matrix(path, tmp_path)
        for run in matrix.runs:
            _parse(path, run)
        found.append((len(matrix.runs), matrix.varied))
    assert found == [(3, ["model"]), (12, ["model", "prompt", "decoding"])]


def test_the_command_on_tiny_models_for_real_the_gate_passes_the_copy_and_rejects_the_other(
    kinds, tmp_path, monkeypatch, capsys
):
    """The first time all are evaluated, the second time none."""
    import torch

    from yunque import cli

    for name, value in ON_CPU.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    common = {"dataset_name": str(kinds.rows), "max_new_tokens": 6, "latency_prompts": 0}
    common["toxicity_model_name_or_path"] = str(kinds.classifier)
    axes = {
        "model": {"t5": str(kinds.t5), "copy": str(tmp_path / "copy"), "tuned": str(kinds.adapter)},
        "prompt": {"plain": "Sum: {text}"},
        "decoding": AXES["decoding"],
    }
    shutil.copytree(kinds.t5, tmp_path / "copy")
    gates = ["nll<=+0.05"]
    path = matrix_file(tmp_path, axes=axes, evaluate=common, gates=gates)

    def run(*options):
        monkeypatch.setattr(
            sys, "argv", ["yunque", "matrix", str(path), "--output_dir", str(tmp_path / "out"), *options]
        )
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        return SimpleNamespace(code=left.value.code, **capsys.readouterr()._asdict())

    listed = run("--dry_run")
    assert (listed.code, listed.out.count("to do")) == (0, 6)
    assert not (tmp_path / "out").exists()
    first = run()
    assert first.code == 1, first.err
    assert "failed: 2 of 5 gates not proved: tuned greedy nll<=+0.05" in first.err
    assert "tuned hot nll<=+0.05" in first.err
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert len(numbers["runs"]) == 6
    assert set(numbers["comparisons"][""]["candidates"][0]["metrics"]) >= {"toxicity", "rougeL", "nll", "length"}
    assert "tuned hot" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "errors.csv").read_text().startswith("run,id,prompt,prediction,reference,error_type")
    second = run()
    assert (second.code, second.out.count("finished before")) == (1, 6)
    matrix_file(tmp_path, axes=axes, evaluate=common | {"max_new_tokns": 3})
    assert (run().code, "unknown argument --max_new_tokns" in run().err) == (2, True)
    torch.set_num_threads(threads)
