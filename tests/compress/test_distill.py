"""compress/distill.py from the command line to the student's folder: taught, on two ranks, refused."""

import json

import pytest
import torch

from yunque.artifacts import verify
from yunque.models.arguments import ModelArguments
from yunque.models.loading import load_model, load_tokenizer

DISTILL = "compress/distill"


@pytest.fixture(scope="session")
def options(assets):
    """Options of a short run; keywords add or replace, None removes."""

    def options(**changed):
        chosen = {
            "teacher_name_or_path": assets.t5,
            "dataset_name": assets.data,
            "max_steps": 12,
            "max_train_samples": 16,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "max_new_tokens": 6,
            "max_target_length": 16,
        } | changed
        return {name: value for name, value in chosen.items() if value is not None}

    return options


@pytest.fixture
def run(called, options, tmp_path):
    everything = {"hidden_weight": 0.1, "alignment_weight": 0.1, "on_policy_share": 0.3, "sequence_level": True}
    return called(DISTILL, options(output_dir=tmp_path / "out", student_num_layers=1, max_steps=60, **everything))


def test_the_student_is_smaller_taught_and_whole(run):
    assert run.manifest["stage"] == "distill"
    assert verify(run.folder) == []
    assert run.manifest["parents"][0]["path"] == str(run.options["teacher_name_or_path"])
    metrics = run.manifest["metrics"]
    assert metrics["parameters"] < metrics["teacher_parameters"]
    assert metrics["layers"] == {"encoder.block": [0], "decoder.block": [0]}
    taught = [line["loss/hard"] for line in run.log if "loss/hard" in line]  # other lines: the student's own answers
    assert 20 < len(taught) < 60
    assert sum(taught[-5:]) < 0.8 * sum(taught[:5])
    assert all({"loss/hidden", "loss/alignment"} <= line.keys() for line in run.log if "loss/hard" in line)


def test_the_saved_student_gives_the_answers_it_was_judged_by(run):
    args = ModelArguments(model_name_or_path=str(run.folder))
    tokenizer = load_tokenizer(args)
    model = load_model(args, tokenizer).eval()
    rows = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
    inputs = tokenizer([row["query"] for row in rows], padding=True, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=6)
    assert [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)] == [
        row["prediction"] for row in rows
    ]
    assert any(row["teacher"] != row["prediction"] for row in rows)


def test_labels_are_the_teacher_s_answers(run):
    answers = [json.loads(line) for line in (run.folder / "teacher_answers.jsonl").read_text().splitlines()]
    assert sorted(row["row"] for row in answers) == list(range(16))


def test_an_adapter_teaches_merged(called, options, assets, tmp_path):
    run = called(DISTILL, options(output_dir=tmp_path / "out", teacher_name_or_path=assets.adapter))
    assert run.manifest["metrics"]["layers"] == {"encoder.block": [0], "decoder.block": [0]}
    # the adapter's share of a layer is in the student, which had little time to leave it
    names = {name for name, _ in torch.nn.Module.named_parameters(load_student(run))}
    assert not any("lora" in name for name in names)


def load_student(run):
    args = ModelArguments(model_name_or_path=str(run.folder))
    return load_model(args, load_tokenizer(args))


def test_a_decoder_only_teacher(called, options, assets, tmp_path):
    llama = {"teacher_name_or_path": assets.llama, "student_layers": "1", "on_policy_share": 0.5}
    run = called(DISTILL, options(output_dir=tmp_path / "out", **llama))
    assert run.manifest["metrics"]["layers"] == {"model.layers": [1]}
    assert load_student(run).config.num_hidden_layers == 1


@pytest.mark.distributed
def test_two_ranks_take_the_steps_of_one(finished, options, assets, tmp_path):
    # Llama has no dropout, and own answers are drawn per rank: without them both runs see the same batches.
    both = {"teacher_name_or_path": assets.llama, "hidden_weight": 0.1, "alignment_weight": 0.1, "sequence_level": True}
    both |= {"mixed_precision": "no"}
    eight = {"output_dir": tmp_path / "one", "per_device_train_batch_size": 8}
    one = finished(DISTILL, options(max_steps=4, **eight, **both), cold=True)
    two = finished(DISTILL, options(output_dir=tmp_path / "two", max_steps=4, **both), ranks=2)
    for name in ("loss/soft", "loss/hard", "loss/hidden", "loss/alignment"):
        curves = [[line[name] for line in run.log if name in line] for run in (one, two)]
        assert curves[0] == pytest.approx(curves[1], rel=1e-2)  # Adam enlarges rounding; a wrong count would be 2x off


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher_name_or_path": "./nowhere"}, "teacher_name_or_path: no such model folder: ./nowhere"),
        ({"student_num_layers": 9}, "student_num_layers: 9 is more than the 2 of the teacher's encoder.block"),
        ({"student_layers": "0"}, "transformers' T5 cannot generate so"),
        ({"soft_weight": 0, "hard_weight": 0}, "soft_weight: all weights are 0"),
        ({"student_temperature": 2}, "student_temperature"),
    ],
)
def test_bad_input_is_one_line(call_recipe, options, tmp_path, changed, message):
    done = call_recipe(DISTILL, options(output_dir=tmp_path / "out", **changed))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
