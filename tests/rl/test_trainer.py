from types import SimpleNamespace

import pytest
import torch

from yunque.errors import InputError
from yunque.models.arguments import GenerationArguments
from yunque.rl.config import PPOConfig
from yunque.rl.rollout import generate
from yunque.rl.trainer import NonFiniteError, PPOTrainer

QUERIES = [[3, 4, 5, 1], [6, 7, 1], [11, 20, 21, 22, 1], [12, 13, 1]]
RESPONSES = [[8, 9, 30, 1], [10, 11], [40, 1], [16, 17, 18, 19, 20, 1]]
SCORES = [1.0, -0.5, 0.3, 2.0]
MODELS = [("t5", False), ("llama", False), ("t5", True), ("llama", True)]


@pytest.fixture(params=MODELS, ids=lambda model: f"{model[0]}{'-lora' * model[1]}")
def tiny_model(request):
    return dict(zip(("family", "lora"), request.param, strict=True))


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def adam_moments(trainer):
    return [value.clone() for state in trainer.optimizer.state_dict()["state"].values() for value in state.values()]


# --- one batch, one update, however it is cut up ---


@pytest.mark.parametrize(
    "pieces",
    [
        {"mini_batch_size": 2, "gradient_accumulation_steps": 2},
        {"mini_batch_size": 1, "gradient_accumulation_steps": 4},
    ],
    ids=["2 minibatches of 2", "4 minibatches of 1"],
)
def test_accumulated_minibatches_give_the_update_of_one_large_minibatch(trainer_of, weights_of, tiny_model, pieces):
    options = {"ppo_epochs": 2, "optimizer": torch.optim.SGD, "learning_rate": 0.1, "max_grad_norm": 1.0}
    whole = trainer_of(**tiny_model, mini_batch_size=4, **options)
    parts = trainer_of(**tiny_model, **pieces, **options)
    start = weights_of(whole)
    whole.step(QUERIES, RESPONSES, SCORES)
    parts.step(QUERIES, RESPONSES, SCORES)
    assert moved(start, weights_of(whole))
    for (name, ours), theirs in zip(weights_of(parts).items(), weights_of(whole).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)  # padding differs: float32 rounding


def test_normalising_by_minibatches_weighs_short_minibatches_more(trainer_of, weights_of):
    # the responses have 4 + 2 and 2 + 6 tokens: the two normalisations differ, or the test above would say nothing
    options = {"mini_batch_size": 2, "gradient_accumulation_steps": 2, "optimizer": torch.optim.SGD}
    ends = []
    for normalization in ("tokens", "minibatches"):
        trainer = trainer_of("t5", loss_normalization=normalization, **options)
        trainer.step(QUERIES, RESPONSES, SCORES)
        ends.append(weights_of(trainer))
    assert moved(*ends)


def test_only_what_trains_moves(trainer_of, weights_of, tiny_model):
    trainer = trainer_of(**tiny_model)
    start = weights_of(trainer)
    trainer.step(QUERIES, RESPONSES, SCORES)
    policy = trainer.accelerator.unwrap_model(trainer.policy)
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert "v_head.summary.weight" in trained
    assert moved(start, weights_of(trainer)) == trained


def test_the_learning_rate_follows_its_schedule_over_all_steps(trainer_of):
    trainer = trainer_of(
        "t5", total_steps=4, lr_scheduler_type="linear", warmup_steps=1, learning_rate=0.1, ppo_epochs=2
    )
    rates = [trainer.step(QUERIES, RESPONSES, SCORES)["ppo/learning_rate"] for _ in range(4)]
    assert rates == pytest.approx([0.1, 0.1 * 2 / 3, 0.1 / 3, 0.0])  # at the end of warm-up, then down to 0


# --- the ratio of PPO ---


@pytest.mark.parametrize(("family", "lora"), [("t5", False), ("gpt2", False), ("bart", False), ("t5", True)])
def test_the_first_minibatch_meets_the_policy_that_sampled(trainer_of, family, lora):
    options = {"lora": lora, "dropout": 0.3, "mini_batch_size": 4}
    steady = trainer_of(family, **options).step(QUERIES, RESPONSES, SCORES)
    assert steady["ppo/policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert steady["ppo/policy/approxkl"] == pytest.approx(0.0, abs=1e-10)
    noisy = trainer_of(family, **options, disable_dropout=False).step(QUERIES, RESPONSES, SCORES)
    assert noisy["ppo/policy/approxkl"] > 1e-3  # the models have dropout: it was switched off


def test_later_epochs_meet_a_policy_that_moved(trainer_of):
    statistics = trainer_of("t5", ppo_epochs=3).step(QUERIES, RESPONSES, SCORES)
    assert statistics["ppo/policy/approxkl"] > 1e-6
    assert statistics["ppo/epochs_done"] == 3


def test_early_stop_kl_ends_the_epochs_of_a_batch(trainer_of):
    assert trainer_of("t5", ppo_epochs=4, early_stop_kl=1e-9).step(QUERIES, RESPONSES, SCORES)["ppo/epochs_done"] == 1
    assert trainer_of("t5", ppo_epochs=4, early_stop_kl=1e9).step(QUERIES, RESPONSES, SCORES)["ppo/epochs_done"] == 4


def test_a_skipped_update_leaves_weights_and_adam_s_moments_untouched(trainer_of, weights_of, tiny_model):
    trainer = trainer_of(**tiny_model)
    trainer.step(QUERIES, RESPONSES, SCORES)  # gives Adam momentum
    start, moments = weights_of(trainer), adam_moments(trainer)
    assert any(moment.abs().sum() > 0 for moment in moments)
    trainer.config.ratio_threshold = 0.5  # below the ratio of 1 that every update starts with
    statistics = trainer.step(QUERIES, RESPONSES, SCORES)
    assert statistics["ppo/skipped_updates"] == 2
    assert not moved(start, weights_of(trainer))
    assert all(torch.equal(*pair) for pair in zip(moments, adam_moments(trainer), strict=True))


def test_one_runaway_minibatch_skips_the_whole_accumulated_update(trainer_of, weights_of, monkeypatch):
    trainer = trainer_of("t5", gradient_accumulation_steps=2)
    start = weights_of(trainer)
    accumulate = trainer._accumulate

    def with_one_runaway(*args):
        means = accumulate(*args)
        means[1][6] = 11.0
        return means

    monkeypatch.setattr(trainer, "_accumulate", with_one_runaway)
    assert trainer.step(QUERIES, RESPONSES, SCORES)["ppo/skipped_updates"] == 1
    assert not moved(start, weights_of(trainer))


# --- NaN and infinity ---


def test_a_nan_score_is_refused_before_anything_moves(trainer_of, weights_of, tiny_model):
    trainer = trainer_of(**tiny_model)
    start = weights_of(trainer)
    with pytest.raises(NonFiniteError, match="the reward"):
        trainer.step(QUERIES, RESPONSES, [1.0, float("nan"), 0.3, 2.0])
    assert not moved(start, weights_of(trainer))


def test_nan_weights_are_refused_before_anything_moves(trainer_of, weights_of):
    trainer = trainer_of("t5")
    with torch.no_grad():
        trainer.policy.model.lm_head.weight[5] = float("nan")
    start = weights_of(trainer)
    with pytest.raises(NonFiniteError, match="log-probabilities or values"):
        trainer.step(QUERIES, RESPONSES, SCORES)
    assert all(
        torch.equal(start[name].nan_to_num(7.0), now.nan_to_num(7.0)) for name, now in weights_of(trainer).items()
    )


def test_after_an_infinite_loss_training_goes_on_as_if_the_batch_had_never_come(trainer_of, weights_of):
    shaken, calm = trainer_of("t5"), trainer_of("t5")
    start = weights_of(shaken)
    with pytest.raises(NonFiniteError, match="loss or its gradient"):
        shaken.step(QUERIES, RESPONSES, [1e30, 0.0, 0.0, 0.0])  # its square is beyond float32
    assert not moved(start, weights_of(shaken))
    for trainer in (shaken, calm):
        trainer.step(QUERIES, RESPONSES, SCORES)
    assert not moved(weights_of(shaken), weights_of(calm))


# --- inputs ---


def test_scores_may_be_whole_numbers(trainer_of):
    assert trainer_of("t5").step(QUERIES, RESPONSES, [1, 0, 0, 2])["ppo/mean_scores"] == 0.75


def test_a_minibatch_that_does_not_divide_over_the_ranks_is_refused(trainer_of):
    trainer = trainer_of("t5")
    with pytest.raises(InputError, match="mini_batch_size: 2 does not divide over 3 ranks"):
        PPOTrainer(
            PPOConfig(batch_size=6, mini_batch_size=2), trainer.policy, trainer.reference,
            SimpleNamespace(num_processes=3), seed=0, total_steps=1,
        )  # fmt: skip


def test_kl_is_0_at_the_start_and_not_after_an_update(trainer_of, tiny_model):
    trainer = trainer_of(**tiny_model)
    assert trainer.step(QUERIES, RESPONSES, SCORES)["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(trainer.step(QUERIES, RESPONSES, SCORES)["objective/kl"]) > 1e-4


def test_policy_and_reference_are_compared_at_the_temperature_that_samples(trainer_of):
    warm, cold = trainer_of("t5"), trainer_of("t5", temperature=0.5, mini_batch_size=4)
    statistics = cold.step(QUERIES, RESPONSES, SCORES)
    assert statistics["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert statistics["ppo/policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    plain = warm.step(QUERIES, RESPONSES, SCORES)
    assert abs(statistics["objective/entropy"] - plain["objective/entropy"]) > 0.1  # -log p of the same tokens


def test_kl_starts_at_0_from_a_trained_adapter_too(trainer_of):
    # TRL 0.11 compares with the base model there and starts at a KL of 32
    trainer = trainer_of("t5", trained_adapter=True)
    assert trainer.step(QUERIES, RESPONSES, SCORES)["objective/kl"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("estimator", ["k2", "k3", "abs", "full"])
def test_other_estimators_charge_a_divergence_that_is_not_negative(trainer_of, estimator):
    trainer = trainer_of("t5", kl_estimator=estimator, ppo_epochs=2)
    assert trainer.step(QUERIES, RESPONSES, SCORES)["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert trainer.step(QUERIES, RESPONSES, SCORES)["objective/kl"] > 1e-5


def test_an_adaptive_coefficient_falls_while_the_kl_is_below_its_target_and_a_fixed_one_stays(trainer_of):
    adaptive, fixed = trainer_of("t5"), trainer_of("t5", adap_kl_ctrl=False)
    for trainer in (adaptive, fixed):
        trainer.step(QUERIES, RESPONSES, SCORES)
    assert adaptive.kl_controller.value == pytest.approx(0.2 * (1 - 0.2 * 4 / 10_000))
    assert fixed.kl_controller.value == 0.2


# --- learning ---


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_ppo_raises_the_probability_of_a_rewarded_token(trainer_of, family):
    trainer = trainer_of(family, batch_size=32, mini_batch_size=16, ppo_epochs=2, learning_rate=5e-3, init_kl_coef=0.02)
    queries, rewarded = QUERIES * 8, {20, 21, 22, 23, 24, 25, 26, 27}
    generation, shares = GenerationArguments(max_new_tokens=6), []
    for step in range(12):
        model = trainer.accelerator.unwrap_model(trainer.policy).model
        responses = generate(
            model, trainer.adapter, queries, generation,
            seed=0, samples=range(32 * step, 32 * step + 32), device=torch.device("cpu"),
        )  # fmt: skip
        tokens = [response.tokens for response in responses]
        shares.append([sum(token in rewarded for token in row) / len(row) for row in tokens])
        trainer.step(queries, tokens, shares[-1])
    first, last = (sum(map(sum, part)) / (3 * 32) for part in (shares[:3], shares[-3:]))
    assert first < 0.25, first  # 8 of 64 tokens
    assert last > 2 * first, (first, last)


def test_gradient_checkpointing_computes_layers_again_and_changes_nothing_else(trainer_of, weights_of, tiny_model):
    options = {"optimizer": torch.optim.SGD, "learning_rate": 0.1}
    plain, checkpointed = (
        trainer_of(**tiny_model, **options),
        trainer_of(**tiny_model, **options, gradient_checkpointing=True),
    )
    passes = {}
    for trainer in (plain, checkpointed):
        policy = trainer.accelerator.unwrap_model(trainer.policy)
        attention = next(
            layer for name, layer in policy.named_modules() if name.endswith(("SelfAttention", "self_attn"))
        )
        calls = []
        attention.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        trainer.step(QUERIES, RESPONSES, SCORES)
        passes[trainer] = len(calls)
    assert passes[checkpointed] == passes[plain] + 2  # once more in the backward pass of each of the two minibatches
    for (name, ours), theirs in zip(weights_of(plain).items(), weights_of(checkpointed).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
