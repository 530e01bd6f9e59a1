"""recipes/ppo_detox.py with several rewards, scaled scores, guards and an unseen scorer; and what it refuses."""

from __future__ import annotations

import pytest
import tiny
from runs import assert_refused

from yunque.artifacts import verify

TOLERANCE = 1e-4
"""As in test_ppo_detox.py: ranks sum in another order."""

FUNCTIONS = """
def short_words(queries, responses):
    return [-0.1 * sum(len(word) for word in response.split()) for response in responses]

def equal(queries, responses):
    return [1.0 for response in responses]

def breaks(queries, responses):
    raise ValueError("no such word")
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory, assets):
    """Folders of an unseen classifier and of a reward model with one output."""
    root = tmp_path_factory.mktemp("models")
    for name, options in (("unseen", {"labels": ("hate", "nothate")}), ("scorer", {"labels": ("LABEL_0",)})):
        tiny.roberta(**options).save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A module of reward functions where Python finds it, also in the processes it starts."""
    (tmp_path / "detox_rewards.py").write_text(FUNCTIONS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def options(ppo_options, models, functions, tmp_path):
    """A run with everything that a reward may be made of; keywords replace."""
    return lambda **changed: ppo_options(
        **{
            "output_dir": tmp_path / "out",
            "config": _yaml(tmp_path, models),
            "watch_model_name_or_path": models / "unseen",
            "use_score_scaling": True,
            "use_score_norm": True,
            "score_clip": 3.0,
            "length_penalty": 0.05,
            "length_target": 5,
        }
        | changed
    )


def _yaml(folder, models):
    """The lists among the options, as a configuration file."""
    path = folder / "rewards.yaml"
    path.write_text(
        f"reward_funcs: ['detox_rewards:short_words', '{models / 'scorer'}']\nreward_weights: [1.0, 0.5, 0.25]\n"
    )
    return path


def test_rewards_watch_and_guards_are_logged_and_reported(called, options, models):
    run = called("ppo_detox", options())
    assert verify(run.folder) == []
    assert "reward_hacking.png" in run.manifest["files"]
    parents = [parent["path"] for parent in run.manifest["parents"]]
    assert parents[2:] == [str(models / "scorer")]  # beside policy and classifier
    for record in run.log:
        parts = {name: record[f"reward/{name}/mean"] for name in ("reward_model", "short_words", "scorer")}
        total = parts["reward_model"] + 0.5 * parts["short_words"] + 0.25 * parts["scorer"]
        assert record["scores/raw_mean"] == pytest.approx(total + record["reward/length_penalty/mean"], abs=1e-5)
        assert abs(record["ppo/mean_scores"]) < 3
        assert record.keys() >= {"watch/mean_scores", "guards/kl", "guards/ratio", "guards/reward_std", "guards/empty"}
    metrics = run.manifest["metrics"]
    assert metrics["watch_parted_at_step"] is None  # 12 steps of noise
    assert metrics["watch_change"]["mean"] == pytest.approx(metrics["watch_after"] - metrics["watch_before"])


@pytest.mark.distributed
def test_two_ranks_score_as_one_does(called, finished, options, new_folder, without_timing):
    one = called("ppo_detox", options(max_steps=3))
    two = finished("ppo_detox", options(max_steps=3, output_dir=new_folder()), ranks=2)
    for ours, theirs in zip(two.log, one.log, strict=True):
        assert without_timing(ours) == pytest.approx(without_timing(theirs), abs=TOLERANCE, rel=TOLERANCE)
    for name in ("watch_before", "watch_after", "reward_after", "toxicity_after"):
        assert two.manifest["metrics"][name] == pytest.approx(one.manifest["metrics"][name], abs=TOLERANCE), name


def test_a_guard_that_keeps_firing_ends_the_run_with_exit_code_1(call_recipe, ppo_options, functions, tmp_path):
    folder = tmp_path / "out"
    (tmp_path / "equal.yaml").write_text("reward_funcs: ['detox_rewards:equal']\nreward_weights: [0.0, 1.0]\n")
    process = call_recipe("ppo_detox", ppo_options(output_dir=folder, config=tmp_path / "equal.yaml"))
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert last.startswith("failed: step 5: guard reward_std fired 5 times in a row")
    assert str(folder) in last
    assert "Traceback" not in process.stderr
    dumps = sorted(path.name for path in folder.glob("guard_*"))
    assert dumps == [f"guard_reward_std_step_{step}.jsonl" for step in (1, 2, 3)]
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-000003"]
    assert not (folder / "yunque.json").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"reward_model_name_or_path": None}, ("reward_model_name_or_path: ", "toxicity", "'hate'", "weight 0")),
        ({"reward_model_name_or_path": "scorer"}, ("reward_model_name_or_path: ", "toxicity", "'hate'", "weight 0")),
        ({"reward_funcs": "detox_rewards:absent"}, ("reward_funcs: detox_rewards has no function absent",)),
        ({"reward_weights": "1"}, ("reward_weights: 1 for 2 rewards",)),
        ({"watch_label": "kind", "watch_model_name_or_path": "unseen"}, ("watch_label: ", "'kind'", "hate, nothate")),
        ({"guard_patience": 0}, ("guard_patience: 0 is too small",)),
    ],
    ids=["no_classifier", "one_output", "no_function", "weights", "watch_label", "patience"],
)
def test_bad_rewards_are_refused_before_anything_is_written(
    changed, words, call_recipe, ppo_options, functions, models, tmp_path
):
    folder = tmp_path / "out"
    paths = {name: models / value if value in ("scorer", "unseen") else value for name, value in changed.items()}
    given = ppo_options(**{"output_dir": folder, "reward_funcs": "detox_rewards:short_words"} | paths)
    process = call_recipe("ppo_detox", given)
    assert_refused(process, *words, alone=True)
    assert not folder.exists()


def test_a_function_that_breaks_ends_the_run_in_one_line(call_recipe, ppo_options, functions, tmp_path):
    options = ppo_options(output_dir=tmp_path / "out", reward_funcs="detox_rewards:breaks")
    process = call_recipe("ppo_detox", options)
    assert process.returncode == 2
    last = process.stderr.splitlines()[-1]
    assert last == "error: reward_funcs: detox_rewards:breaks raised ValueError: no such word (detox_rewards.py:9)"
    assert "Traceback" not in process.stderr
