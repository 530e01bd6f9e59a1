"""Every advantage estimator through the trainer: one update however it is laid out, learning, metrics of groups."""

import json
import subprocess
from pathlib import Path

import layouts
import pytest
import torch
import warm

from yunque.errors import InputError
from yunque.models.arguments import GenerationArguments
from yunque.models.policy import Reference
from yunque.rl.config import PPOConfig
from yunque.rl.rollout import generate
from yunque.rl.statistics import MINIBATCH_STATISTICS
from yunque.rl.trainer import PPOTrainer, Sampled

ROOT = Path(__file__).parents[2]
ESTIMATORS = ["gae", "grpo", "rloo", "reinforce"]
QUERIES = [[3, 4, 5, 1], [6, 7, 1], [11, 20, 21, 22, 1], [12, 13, 1]]
RESPONSES = [[8, 9, 30, 1], [10, 11], [40, 1], [16, 17, 18, 19, 20, 1]]
SCORES = [1.0, -0.5, 0.3, 2.0]
GROUPS = ["a", "b", "a", "b"]


def group_options(estimator):
    return {"advantage_estimator": estimator, "optimizer": torch.optim.SGD, "learning_rate": 0.1}


# --- the layout of a batch ---


@pytest.fixture(scope="module")
def one_rank():
    return {case: layouts.run(*case) for case in layouts.CASES}


@pytest.mark.parametrize("case", layouts.CASES, ids="-".join)
def test_twice_the_accumulation_is_the_same_curve(one_rank, case):
    # but for what TRL's names define as plain means over minibatches, of which there are twice as many
    pieces = layouts.run(*case, mini_batch_size=2, gradient_accumulation_steps=2)
    by_minibatch = {f"ppo/{name}" for name in (*MINIBATCH_STATISTICS, "loss/total", "returns/var", "val/var")}
    layouts.assert_same(pieces, one_rank[case], without={*by_minibatch, "ppo/val/var_explained"})
    assert one_rank[case][0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(one_rank[case][-1]["objective/kl"]) > 1e-5  # the curve moves


@pytest.mark.distributed
def test_two_ranks_are_the_same_curve_for_every_estimator_and_family(one_rank, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "launch/ddp.yaml", "--num_processes", "2"]
    launcher += ["--main_process_port", "0", "--mixed_precision", "no", "-m", "yunque.distributed.rehearsal"]
    process = subprocess.run(
        [warm.python(), *launcher, "tests/layouts.py", str(tmp_path / "curves.json")],
        cwd=ROOT, env=warm.environment(ROOT / "tests"), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    curves = json.loads((tmp_path / "curves.json").read_text())
    for case, expected in one_rank.items():
        layouts.assert_same(curves["-".join(case)], expected)


# --- what each one needs and leaves alone ---


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce"])
def test_without_a_value_head_nothing_is_said_of_values(trainer_of, estimator):
    trainer = trainer_of("t5", advantage_estimator=estimator)
    assert trainer.unwrapped.v_head is None
    statistics = trainer.step(QUERIES, RESPONSES, SCORES)
    assert not [name for name in statistics if "/val" in name]
    assert "ppo/loss/policy" in statistics


def test_a_value_head_goes_with_gae_only(trainer_of):
    trainer = trainer_of("t5")
    with pytest.raises(ValueError, match="only gae goes with a value head"):
        PPOTrainer(
            PPOConfig(advantage_estimator="rloo"), trainer.unwrapped, Reference(trainer.unwrapped),
            trainer.accelerator, seed=0, total_steps=1,
        )  # fmt: skip


def test_responses_of_one_prompt_are_a_group(trainer_of, weights_of):
    queries = [QUERIES[0]] * 2 + [QUERIES[1]] * 2
    ends = []
    for options in ({"num_generations": 2}, {}):
        trainer = trainer_of("t5", **group_options("rloo"), **options)
        groups = None if options else ["x", "x", "y", "y"]
        trainer.step(queries, RESPONSES, SCORES, groups=groups)
        ends.append(weights_of(trainer))
    assert all(torch.equal(ends[0][name], weight) for name, weight in ends[1].items())


def test_groups_change_what_is_learned(trainer_of, weights_of):
    ends = []
    for groups in (GROUPS, ["a", "a", "b", "b"]):
        trainer = trainer_of("llama", **group_options("grpo"))
        trainer.step(QUERIES, RESPONSES, SCORES, groups=groups)
        ends.append(weights_of(trainer))
    assert any(not torch.equal(ends[0][name], weight) for name, weight in ends[1].items())


def test_every_group_has_its_metrics(trainer_of):
    statistics = trainer_of("t5", advantage_estimator="rloo").step(QUERIES, RESPONSES, SCORES, groups=GROUPS)
    assert statistics["group/a/responses"] == statistics["group/b/responses"] == 2
    assert statistics["group/a/reward"] == pytest.approx(0.65)
    assert statistics["group/b/reward"] == pytest.approx(0.75)
    # tokens: a has 4 and 2 of +0.7 and -0.7, b 2 and 6 of -2.5 and +2.5
    assert statistics["group/a/advantage"] == pytest.approx((4 * 0.7 - 2 * 0.7) / 6, abs=1e-4)
    assert statistics["group/b/advantage"] == pytest.approx((-2 * 2.5 + 6 * 2.5) / 8, abs=1e-4)
    assert statistics["group/a/kl"] == pytest.approx(0.0, abs=1e-5)


def test_a_group_s_weight_shifts_the_loss_towards_it(trainer_of):
    losses = {}
    for weights in (None, ["b=9"]):
        trainer = trainer_of(
            "t5", advantage_estimator="rloo", mini_batch_size=4, loss_normalization="groups", group_weights=weights
        )
        seen = []
        backward = trainer.accelerator.backward
        trainer.accelerator.backward = lambda loss, seen=seen, go=backward: (seen.append(loss.item()), go(loss))
        trainer.step(QUERIES, RESPONSES, SCORES, groups=GROUPS)
        losses[str(weights)] = seen[0]
    a, b = -(4 * 0.7 - 2 * 0.7) / 6, -(-2 * 2.5 + 6 * 2.5) / 8  # minus each group's mean advantage, at a ratio of 1
    assert losses["None"] == pytest.approx((a + b) / 2, abs=1e-3)
    assert losses["['b=9']"] == pytest.approx((a + 9 * b) / 10, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_generations": 3}, "num_generations: 3 does not divide batch_size"),
        ({"num_generations": 0}, "num_generations: 0 is too small"),
        ({"group_weights": ["a=2"]}, "group_weights: only the loss of loss_normalization groups"),
        ({"group_weights": ["a"], "loss_normalization": "groups"}, "'a' is not group=weight"),
        ({"group_weights": ["a=-1"], "loss_normalization": "groups"}, "'a=-1' is not group=weight"),
        ({"advantage_estimator": "rloo", "batch_size": 1, "mini_batch_size": 1}, "rloo compares responses"),
        ({"kl_placement": "loss"}, "kl_estimator: the gradient of k1"),
        ({"kl_placement": "loss", "kl_estimator": "abs"}, "kl_estimator: the gradient of abs"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        PPOConfig(**options)


# --- KL in the loss ---


@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_kl_in_the_loss_pulls_the_policy_back(trainer_of, estimator, lora):
    options = {"advantage_estimator": "grpo", "kl_estimator": estimator, "kl_placement": "loss", "adap_kl_ctrl": False}
    ends = []
    for coef in (0.0, 20.0):
        trainer = trainer_of("t5", lora=lora, init_kl_coef=coef, ppo_epochs=2, **options)
        for _ in range(6):
            statistics = trainer.step(QUERIES, RESPONSES, SCORES, groups=GROUPS)
        ends.append(statistics["objective/kl"])
    assert 0 <= ends[1] < 0.5 * ends[0]


def test_kl_in_the_loss_leaves_the_reward_alone(trainer_of):
    trainer = trainer_of("t5", advantage_estimator="rloo", kl_estimator="k3", kl_placement="loss")
    trainer.step(QUERIES, RESPONSES, SCORES)
    assert trainer.step(QUERIES, RESPONSES, SCORES)["ppo/mean_non_score_reward"] == 0.0


# --- what sampling already computed ---


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_known_logprobs_and_values_spare_a_forward_pass_and_change_nothing(trainer_of, weights_of, family):
    ends, statistics, passes = [], [], []
    for known in (False, True):
        trainer = trainer_of(family, lora=True, optimizer=torch.optim.SGD)
        responses = generate(
            trainer.unwrapped.model, trainer.adapter, QUERIES, GenerationArguments(max_new_tokens=6),
            seed=0, samples=range(4), device=torch.device("cpu"), value_head=trainer.unwrapped.v_head,
        )  # fmt: skip
        sampled = Sampled([row.logprobs for row in responses], [row.values for row in responses])
        calls = []
        trainer.unwrapped.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        tokens = [row.tokens for row in responses]
        statistics.append(trainer.step(QUERIES, tokens, SCORES, sampled=sampled if known else None))
        ends.append(weights_of(trainer))
        passes.append(len(calls))
    assert passes == [4, 2]  # two minibatches, scored and learned from; then only learned from
    for name, weight in ends[1].items():
        torch.testing.assert_close(weight, ends[0][name], rtol=1e-4, atol=1e-6, msg=name)
    for name in ("objective/kl", "objective/entropy", "ppo/returns/mean", "ppo/val/vpred"):
        assert statistics[1][name] == pytest.approx(statistics[0][name], rel=1e-4, abs=1e-5), name


def test_an_encoder_that_does_not_train_encodes_every_query_once(trainer_of, weights_of):
    ends, statistics, encoded = [], [], []
    for shared in (False, True):
        trainer = trainer_of("t5", lora=True, lora_modules=r"decoder.*\.(q|v)", ppo_epochs=2, optimizer=torch.optim.SGD)
        assert trainer.encodings.usable
        trainer.encodings.usable = shared
        count = []
        encoder = trainer.unwrapped.model.get_base_model().get_encoder()
        encoder.register_forward_hook(lambda *args, count=count: count.append(len(args[2].last_hidden_state)))
        for _ in range(2):
            statistics.append(trainer.step(QUERIES, RESPONSES, SCORES))
        ends.append(weights_of(trainer))
        encoded.append(sum(count))
    assert encoded == [2 * 4 * (1 + 1 + 2), 2 * 4]  # policy, reference and two epochs each; or once for all
    for name, weight in ends[1].items():
        torch.testing.assert_close(weight, ends[0][name], rtol=1e-4, atol=1e-6, msg=name)
    assert statistics[3]["objective/kl"] == pytest.approx(statistics[1]["objective/kl"], rel=1e-3, abs=1e-5)


def test_an_encoder_that_trains_is_not_shared(trainer_of):
    assert not trainer_of("t5").encodings.usable
    assert not trainer_of("t5", lora=True).encodings.usable
    assert not trainer_of("llama", lora=True).encodings.usable


def test_minibatches_hold_rows_of_similar_length_unless_told_otherwise(trainer_of):
    seen = {}
    for grouped in (True, False):
        trainer = trainer_of("t5", group_by_length=grouped)
        seen[grouped] = []
        loss = trainer._loss
        trainer._loss = lambda *args, seen=seen[grouped], go=loss: (seen.append(set(args[3])), go(*args))[1]
        for _ in range(6):
            trainer.step(QUERIES, RESPONSES, SCORES)
    # lengths 8, 5, 7, 9: the two short ones and the two long ones, in either order
    assert {frozenset(rows) for rows in seen[True]} == {frozenset({1, 2}), frozenset({0, 3})}
    assert len({tuple(sorted(rows)) for rows in seen[True][::2]}) == 2
    assert {frozenset(rows) for rows in seen[False]} > {frozenset({1, 2}), frozenset({0, 3})} or len(
        {frozenset(rows) for rows in seen[False]}
    ) > 2


# --- learning ---


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_raises_the_probability_of_a_rewarded_token(trainer_of, estimator):
    trainer = trainer_of(
        "t5", batch_size=32, mini_batch_size=16, ppo_epochs=2, learning_rate=5e-3, init_kl_coef=0.02,
        advantage_estimator=estimator, num_generations=4,
    )  # fmt: skip
    queries, rewarded = [query for query in QUERIES * 2 for _ in range(4)], set(range(20, 28))
    shares = []
    for step in range(12):
        responses = generate(
            trainer.unwrapped.model, trainer.adapter, queries, GenerationArguments(max_new_tokens=6),
            seed=0, samples=range(32 * step, 32 * step + 32), device=torch.device("cpu"),
        )  # fmt: skip
        tokens = [response.tokens for response in responses]
        shares.append([sum(token in rewarded for token in row) / len(row) for row in tokens])
        trainer.step(queries, tokens, shares[-1])
    first, last = (sum(map(sum, part)) / (3 * 32) for part in (shares[:3], shares[-3:]))
    assert first < 0.25, first  # 8 of 64 tokens
    assert last > 2 * first, (first, last)
