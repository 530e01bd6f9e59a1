import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from yunque.distributed.arguments import RunArguments
from yunque.errors import CheckFailed, InputError, Stopped
from yunque.models.arguments import GenerationArguments
from yunque.rl.config import GuardArguments, RewardArguments
from yunque.rl.guards import Guards
from yunque.rl.loop import Prompts, TrainingLoop
from yunque.rl.rewards import RewardScores
from yunque.rl.score_scaling import ScoreScaler
from yunque.rl.trainer import NonFiniteError

PROMPTS = Prompts(
    [[3, 4, 1], [5, 6, 7, 1], [8, 1], [9, 10, 1], [11, 12, 13, 1], [14, 1]], [f"prompt {n}" for n in range(6)]
)
TIMINGS = ("time/", "samples_per_s", "peak_memory_bytes")
SETUPS = {
    "t5": {"family": "t5"},
    "llama-lora": {"family": "llama", "lora": True},
    "t5-trained-adapter": {"family": "t5", "trained_adapter": True},
}


NO_END = {"min_new_tokens": 5}
"""No room for an end token beside max_new_tokens=5."""


def decode(tokens):
    return " ".join(str(token) for token in tokens)


def long_words(queries, responses):
    """A reward that is a pure function of the texts."""
    return np.array([sum(len(word) == 2 for word in response.split()) for response in responses], dtype=np.float32)


class By:
    """The reward that a function of queries and responses gives, and what a second one, never trained on, does."""

    def __init__(self, function, watch=None):
        self.function, self.watch = function, watch

    def scores(self, queries, responses, num_tokens, columns=None):
        total = self.function(queries, responses)
        return RewardScores(total, {"words": total}, watch=self.watch and self.watch(queries, responses))


LONG_WORDS = By(long_words)


class During:
    """The reward ``long_words``, during whose nth call something happens."""

    def __init__(self, call, happens):
        self.calls, self.call, self.happens = 0, call, happens

    def scores(self, queries, responses, num_tokens, columns=None):
        self.calls += 1
        if self.calls == self.call:
            self.happens()
        return LONG_WORDS.scores(queries, responses, num_tokens)


def interrupt(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def die():
    raise SystemExit


@pytest.fixture
def loop_of(trainer_of, tmp_path):
    """Builds a loop with a trainer of its own, as a new process would: loop_of(folder name, steps, setup=)."""
    process_seeds = itertools.count()

    def build(
        folder="run",
        steps=6,
        *,
        setup="t5",
        reward=LONG_WORDS,
        prompts=PROMPTS,
        resume=False,
        changed=(),
        run=(),
        generation=(),
        scaling=(),
        guards=(),
        **config,
    ):
        path = tmp_path / folder
        config_of_run = {"learning_rate": 1e-2, "save_steps": 3, "output_dir": str(path), "resume": resume}
        path.mkdir(exist_ok=True)
        trainer = trainer_of(**SETUPS[setup], total_steps=steps, **({"ppo_epochs": 2} | config))
        torch.manual_seed(next(process_seeds))  # nothing may depend on what torch's generator did in a process
        return TrainingLoop(
            trainer, prompts, reward, decode,
            generation=GenerationArguments(**({"max_new_tokens": 5} | dict(generation))),
            run=RunArguments(output_dir=str(path), resume=resume, **({"save_steps": 3} | dict(run))),
            total_steps=steps,
            resolved_config=config_of_run | dict(changed),
            scaler=ScoreScaler(RewardArguments(**dict(scaling))),
            guards=Guards(GuardArguments(**dict(guards))),
        )  # fmt: skip

    return build


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_of(loop):
    records = lines_of(loop.folder / "log.jsonl")
    return [{key: value for key, value in record.items() if not key.startswith(TIMINGS)} for record in records]


def checkpoints_of(loop):
    return sorted(path.name for path in (loop.folder / "checkpoints").glob("step-*"))


def assert_same_end(weights_of, loop, other):
    assert log_of(loop) == log_of(other)
    for (name, ours), theirs in zip(weights_of(loop.trainer).items(), weights_of(other.trainer).values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert loop.trainer.kl_controller.value == other.trainer.kl_controller.value


# --- which prompts ---


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 6, 20])
def test_every_epoch_has_every_prompt_once_also_where_batches_run_over_its_end(batch_size):
    steps = 60 // batch_size
    rows = [row for step in range(steps) for row in PROMPTS.rows(step, batch_size, seed=3)]
    assert len(rows) == 60
    epochs = [rows[start : start + 6] for start in range(0, 60, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5  # each its own order


def test_rows_are_a_function_of_step_batch_size_and_seed_alone():
    assert PROMPTS.rows(7, 4, seed=3) == PROMPTS.rows(7, 4, seed=3)
    in_one_batch = PROMPTS.rows(0, 48, seed=3)
    assert [row for step in range(12) for row in PROMPTS.rows(step, 4, seed=3)] == in_one_batch
    assert PROMPTS.rows(0, 48, seed=4) != in_one_batch


# --- a run and its log ---


def test_a_run_logs_every_step_and_learns(loop_of, weights_of):
    loop = loop_of(steps=3)
    start = weights_of(loop.trainer)
    loop.train()
    log = log_of(loop)
    assert [record["step"] for record in log] == [1, 2, 3]
    assert [record["epoch"] for record in log] == pytest.approx([4 / 6, 8 / 6, 2.0])
    assert all(np.isfinite(list(record.values())).all() for record in log)
    assert checkpoints_of(loop) == ["step-000003"]
    assert any(not torch.equal(start[name], now) for name, now in weights_of(loop.trainer).items())


def test_every_step_draws_anew(loop_of):
    drawn = []

    def listening(queries, responses):
        drawn.append(tuple(responses))
        return long_words(queries, responses)

    loop = loop_of(steps=3, reward=By(listening), prompts=Prompts([[3, 4, 1]], ["prompt"]), learning_rate=1e-12)
    loop.train()
    assert len(set(drawn)) == 3  # from one prompt and one policy


def test_unfinished_responses_are_counted_and_may_be_penalised(loop_of):
    options = {"steps": 1, "generation": NO_END}
    plain, penalised = loop_of("plain", **options), loop_of("penalised", **options, missing_eos_penalty=2.5)
    for loop in (plain, penalised):
        loop.train()
    (record,), (lower,) = log_of(plain), log_of(penalised)
    assert record["tokens/responses_unfinished"] == lower["tokens/responses_unfinished"] == 1.0
    assert lower["ppo/mean_scores"] == pytest.approx(record["ppo/mean_scores"] - 2.5)


def test_scores_are_scaled_for_training_and_logged_raw(loop_of):
    plain, scaled = loop_of("plain", steps=1), loop_of("scaled", steps=1, scaling={"use_score_scaling": True})
    clipped = loop_of("clipped", steps=1, scaling={"score_clip": 0.5})
    for loop in (plain, scaled, clipped):
        loop.train()
    (record,), (divided,), (cut,) = log_of(plain), log_of(scaled), log_of(clipped)
    assert record["scores/raw_mean"] == record["ppo/mean_scores"]
    assert record["scores/raw_std"] > 0
    for other in (divided, cut):
        assert all(other[name] == record[name] for name in ("scores/raw_mean", "scores/raw_std"))
    assert divided["ppo/std_scores"] == pytest.approx(1.0)
    assert divided["ppo/mean_scores"] == pytest.approx(record["scores/raw_mean"] / record["scores/raw_std"])
    assert 0 < cut["ppo/mean_scores"] <= 0.5


def test_a_watch_is_logged_and_changes_nothing(loop_of, weights_of):
    def first_number(queries, responses):
        return np.array([float(response.split()[0]) for response in responses])

    plain, watching = loop_of("plain", steps=2), loop_of("watching", steps=2, reward=By(long_words, first_number))
    for loop in (plain, watching):
        loop.train()
    for record, watched in zip(log_of(plain), log_of(watching), strict=True):
        assert "reward/words/mean" not in record
        assert watched["reward/words/mean"] == watched["scores/raw_mean"] == record["scores/raw_mean"]
        assert watched["watch/mean_scores"] > 0
        assert record.items() <= watched.items()


def test_early_stop_kl_reaches_the_log(loop_of):
    loop = loop_of(steps=2, ppo_epochs=4, early_stop_kl=1e-9)
    loop.train()
    assert [record["ppo/epochs_done"] for record in log_of(loop)] == [1.0, 1.0]


# --- stop and go on ---


@pytest.mark.parametrize("setup", SETUPS)
def test_a_resumed_run_ends_where_an_unbroken_one_does(loop_of, weights_of, setup):
    options = {"setup": setup, "lr_scheduler_type": "linear"}
    unbroken = loop_of("unbroken", **options)
    unbroken.train()
    with pytest.raises(Stopped):
        loop_of("broken", reward=During(3, interrupt), **options).train()
    resumed = loop_of("broken", resume=True, **options)
    resumed.train()
    assert_same_end(weights_of, resumed, unbroken)


def test_a_resumed_run_scales_by_all_scores_and_counts_all_firings_so_far(loop_of, weights_of):
    scaling = {"use_score_scaling": True, "use_score_norm": True, "score_clip": 2.0}
    options = {"scaling": scaling, "guards": {"guard_endless": 0.01, "guard_patience": 7}, "generation": NO_END}
    unbroken = loop_of("unbroken", **options)
    unbroken.train()
    with pytest.raises(Stopped):
        loop_of("broken", reward=During(2, interrupt), **options).train()
    resumed = loop_of("broken", resume=True, **options)
    resumed.train()
    assert_same_end(weights_of, resumed, unbroken)
    assert resumed.scaler.state() == unbroken.scaler.state()
    assert resumed.guards.state() == unbroken.guards.state()
    assert resumed.guards.in_a_row["endless"] == 6
    dumps = [sorted(path.name for path in loop.folder.glob("guard_endless*")) for loop in (resumed, unbroken)]
    assert dumps[0] == dumps[1] == [f"guard_endless_step_{step}.jsonl" for step in (1, 2, 3)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_lets_the_step_finish_saves_it_and_stops(loop_of, weights_of, number):
    handler = signal.getsignal(number)
    stopped = loop_of(reward=During(2, lambda: interrupt(number)))
    with pytest.raises(Stopped, match=r"saved step 2 of 6 in .*; go on with --resume"):
        stopped.train()
    assert [record["step"] for record in log_of(stopped)] == [1, 2]
    assert checkpoints_of(stopped) == ["step-000002"]
    assert signal.getsignal(number) is handler
    resumed, unbroken = loop_of(resume=True), loop_of("unbroken")
    for loop in (resumed, unbroken):
        loop.train()
    assert_same_end(weights_of, resumed, unbroken)


def test_a_second_interrupt_stops_at_once(loop_of):
    def twice():
        interrupt(signal.SIGINT)
        interrupt(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop_of(reward=During(1, twice)).train()


def test_a_signal_during_the_last_step_leaves_only_what_follows_training(loop_of, weights_of):
    loop = loop_of(steps=2, reward=During(2, interrupt))
    with pytest.raises(Stopped, match="saved step 2 of 2"):
        loop.train()
    assert checkpoints_of(loop) == ["step-000002"]
    assert json.loads((loop.folder / "checkpoints" / "stopped.json").read_text())["step"] == 2
    resumed = loop_of(steps=2, resume=True)
    resumed.train()
    assert_same_end(weights_of, resumed, loop)


def test_the_last_step_is_saved_and_the_best_checkpoint_kept(loop_of):
    loop = loop_of(steps=5, run={"save_steps": 2, "save_total_limit": 1})
    loop.train()
    rewards = [record["scores/raw_mean"] for record in log_of(loop)]
    means = {2: np.mean(rewards[:2]), 4: np.mean(rewards[2:4]), 5: rewards[4]}
    best = max(means, key=lambda step: means[step])
    assert checkpoints_of(loop) == sorted({f"step-{best:06}", "step-000005"})
    pointer = json.loads((loop.folder / "checkpoints" / "best.json").read_text())
    assert (pointer["step"], pointer["metric"]) == (best, "reward")
    assert pointer["value"] == pytest.approx(means[best])


def test_a_damaged_checkpoint_costs_one_interval_and_the_end_is_the_same(loop_of, weights_of, capsys):
    with pytest.raises(Stopped):
        loop_of("broken", reward=During(4, interrupt)).train()
    state = loop_of("broken").folder / "checkpoints" / "step-000004" / "state.json"
    state.write_text(state.read_text().replace("0", "1", 1))
    resumed, unbroken = loop_of("broken", resume=True), loop_of("unbroken")
    for loop in (resumed, unbroken):
        loop.train()
    assert "step-000004 is damaged: state.json has other content" in capsys.readouterr().err
    assert_same_end(weights_of, resumed, unbroken)


def test_steps_logged_after_the_last_checkpoint_are_done_again_and_half_a_line_is_dropped(loop_of, weights_of):
    loop = loop_of(reward=During(6, die))
    with pytest.raises(SystemExit):
        loop.train()
    assert [record["step"] for record in log_of(loop)] == [1, 2, 3, 4, 5]
    with (loop.folder / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "objective/kl": 0.1')
    resumed, unbroken = loop_of(resume=True), loop_of("unbroken")
    for each in (resumed, unbroken):
        each.train()
    assert_same_end(weights_of, resumed, unbroken)


def test_resume_without_a_checkpoint_starts_at_the_first_step(loop_of):
    loop = loop_of(steps=1, resume=True)
    loop.train()
    assert [record["step"] for record in log_of(loop)] == [1]


def test_a_finished_run_resumes_to_nothing(loop_of, weights_of):
    loop = loop_of(steps=3)
    loop.train()
    again = loop_of(steps=3, resume=True)
    again.train()
    assert_same_end(weights_of, again, loop)


def test_resume_refuses_a_changed_option_by_name(loop_of, weights_of):
    loop_of(steps=3).train()
    resumed = loop_of(steps=6, resume=True, changed={"learning_rate": 5e-3})
    start = weights_of(resumed.trainer)
    with pytest.raises(
        InputError, match=r"learning_rate: .* made with 0.01, now it is 0.005; .*--overwrite_output_dir"
    ):
        resumed.train()
    assert all(torch.equal(start[name], now) for name, now in weights_of(resumed.trainer).items())
    assert [record["step"] for record in log_of(resumed)] == [1, 2, 3]


def test_resume_allows_another_checkpoint_interval(loop_of):
    loop_of(steps=3).train()
    resumed = loop_of(steps=4, resume=True, changed={"save_steps": 2}, run={"save_steps": 2})
    resumed.train()
    assert [record["step"] for record in log_of(resumed)] == [1, 2, 3, 4]


# --- guards ---


def constant(queries, responses):
    return np.full(len(responses), 0.25)


def test_a_guard_logs_warns_and_dumps_and_lets_the_run_go_on(loop_of, capsys):
    loop = loop_of(steps=4, reward=By(constant))
    loop.train()
    log = log_of(loop)
    assert [record["guards/reward_std"] for record in log] == [1.0] * 4
    assert [record["guards/empty"] for record in log] == [0.0] * 4
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    assert len(warnings) == 4
    assert "step 4: guard reward_std: the 4 scores differ by 0 only (4 of 5 in a row)" in warnings[3]
    dumps = sorted(loop.folder.glob("guard_*"))
    assert [path.name for path in dumps] == [f"guard_reward_std_step_{step}.jsonl" for step in (1, 2, 3)]
    records = lines_of(dumps[1])
    assert [record["query"] for record in records] == [PROMPTS.texts[row] for row in PROMPTS.rows(1, 4, seed=0)]
    assert [record["score"] for record in records] == [0.25] * 4
    assert all(record["response"] == decode(record["tokens"]) for record in records)


def test_a_guard_that_keeps_firing_stops_the_run_without_saving_it(loop_of):
    loop = loop_of(reward=By(constant), guards={"guard_patience": 3}, run={"save_steps": 1})
    with pytest.raises(CheckFailed, match=r"step 3: guard reward_std fired 3 times in a row: .*reward_std_step_\*"):
        loop.train()
    assert [record["step"] for record in log_of(loop)] == [1, 2, 3]
    assert checkpoints_of(loop) == ["step-000001", "step-000002"]


def test_a_stopped_run_may_go_on_with_a_guard_set_anew(loop_of, weights_of):
    options = {"reward": By(constant), "changed": {"guard_patience": 2}}
    with pytest.raises(CheckFailed):
        loop_of(guards={"guard_patience": 2}, run={"save_steps": 1}, **options).train()
    patient = {"guards": {"guard_patience": 20}, "reward": By(constant), "changed": {"guard_patience": 20}}
    resumed, unbroken = loop_of(resume=True, **patient), loop_of("unbroken", **patient)
    for loop in (resumed, unbroken):
        loop.train()
    assert_same_end(weights_of, resumed, unbroken)


def test_batches_of_a_former_run_are_removed(loop_of):
    loop = loop_of(steps=1)
    (loop.folder / "guard_kl_step_9.jsonl").touch()
    loop.train()
    assert not list(loop.folder.glob("guard_*"))


def test_a_reward_function_that_fails_stops_the_run_by_name(loop_of):
    def fails(queries, responses):
        raise InputError("reward_funcs: m:f raised")

    with pytest.raises(InputError, match="reward_funcs: m:f raised"):
        loop_of(reward=By(fails)).train()


# --- NaN ---


def test_a_nan_reward_stops_the_run_and_leaves_its_batch_behind(loop_of, weights_of):
    def broken(queries, responses):
        return np.array([1.0, float("nan"), 0.0, 2.0])

    loop = loop_of(reward=By(broken))
    start = weights_of(loop.trainer)
    with pytest.raises(NonFiniteError, match=r"the reward; see .*nonfinite_step_1.jsonl"):
        loop.train()
    records = lines_of(loop.folder / "nonfinite_step_1.jsonl")
    rows = PROMPTS.rows(0, 4, seed=0)
    assert [record["query"] for record in records] == [PROMPTS.texts[row] for row in rows]
    assert all(record["tokens"] and record["response"] == decode(record["tokens"]) for record in records)
    assert [np.isnan(record["score"]) for record in records] == [False, True, False, False]
    assert all(torch.equal(start[name], now) for name, now in weights_of(loop.trainer).items())
    assert not Path(loop.folder / "checkpoints").exists()
