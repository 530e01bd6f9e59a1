"""recipes/grpo_detox.py on tiny models: groups by prompt, by topic and by length; bad input; resume; two ranks."""

import json

import pytest
from runs import assert_refused


@pytest.fixture(scope="module")
def grpo_options(ppo_options):
    """Options of a short GRPO run over topics."""

    def options(**changed):
        chosen = {"group_column": "topic", "max_groups": 2, "num_generations": 2, "max_steps": 4, "save_steps": 2}
        return ppo_options(**(chosen | changed))

    return options


@pytest.fixture(scope="module")
def topic_run(finished, grpo_options, new_folder):
    return finished("grpo_detox", grpo_options(output_dir=new_folder()), cold=True)


def test_the_log_has_every_group_of_the_step_and_no_value(topic_run):
    assert len(topic_run.log) == 4
    for record in topic_run.log:
        groups = {name.split("/")[1] for name in record if name.startswith("group/")}
        assert groups <= {"shopping", "bank", "other"}
        assert sum(record[f"group/{name}/responses"] for name in groups) == 8
        for name in groups:
            assert {f"group/{name}/reward", f"group/{name}/advantage", f"group/{name}/kl"} <= record.keys()
        assert not [name for name in record if "/val" in name]
    assert {name for record in topic_run.log for name in record if name.endswith("/responses")} == {
        f"group/{name}/responses" for name in ("shopping", "bank", "other")
    }


def test_the_manifest_has_the_change_of_every_group(topic_run):
    assert topic_run.manifest["stage"] == "grpo"
    groups = topic_run.manifest["metrics"]["groups"]
    assert {name: row["prompts"] for name, row in groups.items()} == {"shopping": 4, "other": 2, "bank": 1}
    answers = topic_run.answers
    total = sum(row["prompts"] * row["toxicity_after"] for row in groups.values()) / len(answers)
    assert total == pytest.approx(topic_run.manifest["metrics"]["toxicity_after"])
    assert list(groups["shopping"]["toxicity_change"]) == ["mean", "low", "high"]


def test_answers_of_one_prompt_are_groups_without_a_column(called, grpo_options, tmp_path):
    run = called("grpo_detox", grpo_options(group_column=None, max_groups=None, output_dir=tmp_path / "out"))
    assert "groups" not in run.manifest["metrics"]
    assert not [name for name in run.log[0] if name.startswith("group/")]


def test_length_bands_are_groups(called, grpo_options, tmp_path):
    run = called("grpo_detox", grpo_options(group_column="length_band", output_dir=tmp_path / "out"))
    names = list(run.manifest["metrics"]["groups"])
    assert len(names) == 2
    assert all(name.endswith(" tokens") for name in names)


@pytest.mark.parametrize("estimator", ["rloo", "reinforce"])
def test_other_estimators_and_a_decoder_only_model(called, grpo_options, assets, tmp_path, estimator):
    options = grpo_options(advantage_estimator=estimator, model_name_or_path=assets.llama, max_steps=2)
    run = called("grpo_detox", options | {"output_dir": tmp_path / "out"})
    assert run.manifest["config"]["advantage_estimator"] == estimator
    assert len(run.log) == 2


def test_weights_of_groups_are_read_from_the_command_line(called, grpo_options, tmp_path):
    options = grpo_options(loss_normalization="groups", group_weights="shopping=3", max_steps=2)
    run = called("grpo_detox", options | {"output_dir": tmp_path / "out"})
    assert run.manifest["config"]["group_weights"] == ["shopping=3"]


@pytest.mark.distributed
def test_two_ranks_learn_what_one_learns(topic_run, finished, new_folder, without_timing):
    both = finished("grpo_detox", topic_run.options | {"output_dir": new_folder()}, ranks=2)
    for ours, theirs in zip(both.log, topic_run.log, strict=True):
        assert without_timing(ours) == pytest.approx(without_timing(theirs), rel=1e-3, abs=1e-4)
    assert [row["response_after"] for row in both.answers] == [row["response_after"] for row in topic_run.answers]


def test_a_stopped_run_resumes_to_the_same_end(topic_run, called, grpo_options, tmp_path, without_timing):
    folder = tmp_path / "out"
    called("grpo_detox", topic_run.options | {"output_dir": folder})
    later = folder / "checkpoints" / "step-000004"
    assert later.is_dir()
    for path in sorted(later.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    later.rmdir()
    (folder / "yunque.json").unlink()
    run = called("grpo_detox", topic_run.options | {"output_dir": folder, "resume": True})
    assert [without_timing(row) for row in run.log] == [without_timing(row) for row in topic_run.log]
    assert json.dumps(run.answers) == json.dumps(topic_run.answers)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"advantage_estimator": "gae"}, "advantage_estimator"),
        ({"group_column": None, "max_groups": None, "num_generations": 1}, "num_generations: an answer alone"),
        ({"group_column": "subject"}, "group_column: "),
        ({"max_groups": 0}, "max_groups: 0 is too small"),
        ({"num_generations": 3}, "num_generations: 3 does not divide batch_size"),
        ({"group_weights": "shopping"}, "group_weights: "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_is_one_line_and_exit_2(call_recipe, grpo_options, tmp_path, changed, words):
    assert_refused(call_recipe("grpo_detox", grpo_options(**changed) | {"output_dir": tmp_path / "out"}), words)
    assert not (tmp_path / "out").exists()
