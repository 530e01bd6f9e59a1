"""Losses on pairs beside numbers worked out by hand; the trainer's tests compare them with TRL's."""

import math

import pytest
import torch

from yunque.models.preference_losses import DPO, ORPO, PairScores


def scores(chosen, rejected, tokens=(4, 2)):
    values = [torch.tensor([float(value)], requires_grad=True) for value in (chosen, rejected)]
    return PairScores(*values, *(torch.tensor([count]) for count in tokens))


# log pi(w) = -10 against log ref(w) = -12, log pi(l) = -15 against -14: delta = 2 - (-1) = 3
POLICY, REFERENCE = (-10, -15), (-12, -14)


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({}, 0.554355),  # -log sigmoid(0.1 * 3), sigmoid(0.3) = 0.574443
        ({"label_smoothing": 0.1}, 0.584355),  # 0.9 * 0.554355 + 0.1 * -log sigmoid(-0.3) = 0.1 * 0.854355
        ({"loss_type": "hinge"}, 0.7),  # 1 - 0.3
        ({"loss_type": "ipo"}, 16.0),  # (2/4 - (-1)/2 - 1/0.2)^2 = (1 - 5)^2
    ],
)
def test_dpo_of_one_pair(options, loss):
    found = DPO(beta=0.1, **options)(scores(*POLICY), scores(*REFERENCE))
    assert found.losses_B.item() == pytest.approx(loss, abs=1e-5)
    assert found.chosen_rewards_B.item() == pytest.approx(0.2)
    assert found.rejected_rewards_B.item() == pytest.approx(-0.1)


def test_the_gradient_of_dpo_fades_as_the_pair_is_learnt():
    policy = scores(*POLICY)
    found = DPO(beta=0.1)(policy, scores(*REFERENCE))
    found.losses_B.sum().backward()
    assert policy.chosen_B.grad.item() == pytest.approx(-0.1 * 0.425557, abs=1e-6)  # -beta * sigmoid(-0.3)
    assert policy.rejected_B.grad.item() == pytest.approx(0.1 * 0.425557, abs=1e-6)
    assert not found.chosen_rewards_B.requires_grad


def test_dpo_begins_at_log_2():
    assert DPO(beta=0.1)(scores(-7, -9), scores(-7, -9)).losses_B.item() == pytest.approx(math.log(2))


def test_orpo_of_one_pair():
    # p_w = 1/2 per token over 4 tokens, p_l = 1/4 over 2: odds 1 and 1/3, log odds ratio log 3, sigmoid of it 3/4
    policy = scores(4 * math.log(0.5), 2 * math.log(0.25))
    found = ORPO(beta=0.1)(policy, None)
    assert found.losses_B.item() == pytest.approx(-0.1 * math.log(0.75), abs=1e-6)
    assert found.chosen_rewards_B.item() == pytest.approx(0.1 * math.log(0.5))
    assert found.rejected_rewards_B.item() == pytest.approx(0.1 * math.log(0.25))


@pytest.mark.parametrize(("chosen", "rejected"), [(-1e-9, -1e4), (-1e4, -1e-9), (0.0, 0.0)])
def test_orpo_stays_finite_where_an_answer_is_certain_or_impossible(chosen, rejected):
    policy = scores(chosen, rejected, tokens=(1, 1))
    loss = ORPO(beta=0.1)(policy, None).losses_B
    loss.sum().backward()
    assert torch.isfinite(torch.stack([loss, policy.chosen_B.grad, policy.rejected_B.grad])).all()
