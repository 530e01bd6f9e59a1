import json

import pytest

from yunque.errors import CheckFailed, InputError
from yunque.rl.batch import Scored
from yunque.rl.config import GuardArguments
from yunque.rl.guards import NUM_DUMPS, Guards, remove_dumps
from yunque.rl.rollout import Response

NAMES = ("kl", "ratio", "reward_std", "empty", "endless")
WELL = {"objective/kl": 1.0, "ppo/skipped_updates": 0.0, "scores/raw_std": 0.5}


def batch_of(texts=("a", "b", "c", "d"), finished=True):
    ends = [finished] * len(texts) if isinstance(finished, bool) else finished
    return [
        Scored("query", Response([5], finished=end), text, 0.0, {}, None) for text, end in zip(texts, ends, strict=True)
    ]


def fired(statistics=(), batch=None, **options):
    result = Guards(GuardArguments(**options)).check(WELL | dict(statistics), batch or batch_of())
    assert list(result) == [f"guards/{name}" for name in NAMES]
    assert set(result.values()) <= {0.0, 1.0}
    return [name for name in NAMES if result[f"guards/{name}"]]


def test_nothing_fires_on_a_step_that_went_well():
    assert fired() == []


@pytest.mark.parametrize(
    ("guard", "statistics", "batch", "options"),
    [
        ("kl", {"objective/kl": 100.1}, None, {}),
        ("kl", {"objective/kl": -100.1}, None, {}),
        ("kl", {"objective/kl": 1.1}, None, {"guard_kl": 1.0}),
        ("ratio", {"ppo/skipped_updates": 1.0}, None, {}),
        ("reward_std", {"scores/raw_std": 0.0}, None, {}),
        ("reward_std", {"scores/raw_std": 0.4}, None, {"guard_reward_std": 0.45}),
        ("empty", {}, batch_of(("a", "", "b", "\n\t \u200b")), {}),
        ("empty", {}, batch_of(("a", "b", "c", "")), {"guard_empty": 0.25}),
        ("endless", {}, batch_of(finished=False), {"guard_endless": 1.0}),
        ("endless", {}, batch_of(finished=[True, True, True, False]), {"guard_endless": 0.25}),
    ],
)
def test_each_guard_sees_its_sign_and_no_other_does(guard, statistics, batch, options):
    assert fired(statistics, batch, **options) == [guard]


@pytest.mark.parametrize(
    ("statistics", "batch", "options"),
    [
        ({"objective/kl": 100.0}, None, {}),
        ({"objective/kl": 1e9}, None, {"guard_kl": None}),
        ({"scores/raw_std": 2e-6}, None, {}),
        ({"scores/raw_std": 0.0}, None, {"guard_reward_std": None}),
        ({"scores/raw_std": 0.0}, batch_of(("a",)), {}),  # one score cannot differ
        ({}, batch_of(("a", "b", "c", "")), {}),
        ({}, batch_of(("", "", "", "")), {"guard_empty": None}),
        ({}, batch_of(finished=False), {}),
        ({}, batch_of(finished=[True, True, True, False]), {"guard_endless": 0.5}),
    ],
)
def test_at_the_limit_and_switched_off_nothing_fires(statistics, batch, options):
    assert fired(statistics, batch, **options) == []


def test_patience_counts_firings_of_one_guard_in_a_row(tmp_path):
    guards = Guards(GuardArguments(guard_patience=3))
    blown_up, collapsed = {"objective/kl": 200.0}, {"scores/raw_std": 0.0}
    signs = [blown_up, blown_up, {}, blown_up, collapsed, blown_up | collapsed, blown_up]
    for step, sign in enumerate(signs, start=1):
        guards.check(WELL | sign, batch_of())
        guards.stop_if_patience_is_over(step, tmp_path)
    assert guards.in_a_row == {"kl": 2, "ratio": 0, "reward_std": 0, "empty": 0, "endless": 0}
    assert guards.warnings(7) == ["step 7: guard kl: KL of 200.0 nats per response (2 of 3 in a row)"]
    guards.check(WELL | blown_up, batch_of())
    with pytest.raises(CheckFailed, match=r"step 8: guard kl fired 3 times in a row: KL of 200.0 nats .*learning_rate"):
        guards.stop_if_patience_is_over(8, tmp_path)


def test_every_guard_says_what_to_change(tmp_path):
    guards = Guards(GuardArguments(guard_patience=1, guard_endless=0.5))
    signs = {"objective/kl": 200.0, "ppo/skipped_updates": 2.0, "scores/raw_std": 0.0}
    guards.check(signs, batch_of(("",) * 4, finished=False))
    assert len(guards.warnings(1)) == len(NAMES)
    firing = guards.firing
    for name in NAMES:
        guards.firing = {name: firing[name]}
        with pytest.raises(CheckFailed, match=f"guard {name} fired.*or change (guard_{name}|ratio_threshold)$"):
            guards.stop_if_patience_is_over(1, tmp_path)


def test_only_the_first_batches_of_a_guard_are_dumped(tmp_path):
    guards, paths = Guards(GuardArguments()), []
    for step in range(1, 7):
        guards.check(WELL | {"objective/kl": 200.0 * (step != 2)}, batch_of())
        paths += guards.dump_paths(tmp_path, step)
    assert [path.name for path in paths] == [f"guard_kl_step_{step}.jsonl" for step in (1, 3, 4)]
    assert len(paths) == NUM_DUMPS


def test_counters_survive_json(tmp_path):
    guards, other = Guards(GuardArguments()), Guards(GuardArguments())
    guards.check(WELL | {"objective/kl": 200.0}, batch_of())
    guards.dump_paths(tmp_path, 1)
    other.load_state(json.loads(json.dumps(guards.state())))
    assert other.state() == guards.state()
    assert other.in_a_row["kl"] == other.dumps["kl"] == 1


def test_dumps_of_steps_that_are_done_again_are_removed(tmp_path):
    names = [f"guard_kl_step_{step}.jsonl" for step in (2, 3, 12)] + ["nonfinite_step_4.jsonl", "guard_notes.jsonl"]
    for name in names:
        (tmp_path / name).touch()
    remove_dumps(tmp_path, after_step=2)
    assert {path.name for path in tmp_path.iterdir()} == {"guard_kl_step_2.jsonl", "guard_notes.jsonl"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guard_kl": 0.0}, "guard_kl: 0.0 is not positive"),
        ({"guard_kl": float("nan")}, "guard_kl: nan is not positive"),
        ({"guard_reward_std": -1.0}, "guard_reward_std: -1.0 is not positive"),
        ({"guard_empty": 0.0}, "guard_empty: 0.0 is not a share in (0, 1]"),
        ({"guard_endless": 1.5}, "guard_endless: 1.5 is not a share in (0, 1]"),
        ({"guard_patience": 0}, "guard_patience: 0 is too small; give 1 or more"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(options, message):
    with pytest.raises(InputError) as caught:
        GuardArguments(**options)
    assert str(caught.value) == message
