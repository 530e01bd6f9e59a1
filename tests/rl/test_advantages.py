import pytest
import torch

from yunque.rl.advantages import Rewards, estimate_advantages, gae, token_rewards, whitened_gae
from yunque.rl.config import PPOConfig

MASK = torch.tensor([[True, True, True], [True, True, False]])


def row(*values):
    return torch.tensor([values])


def test_score_comes_at_the_last_token_and_the_penalty_at_every_token():
    kl = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, 9.0]])
    rewards, penalty = token_rewards(torch.tensor([10.0, -1.0]), kl, 0.1, MASK)
    torch.testing.assert_close(penalty, torch.tensor([[-0.1, 0.2, -0.3], [-0.4, -0.5, 0.0]]))  # -0.1 * KL, 0 in padding
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 0.2, 9.7], [-0.4, -1.5, 0.0]]))


def test_score_comes_at_the_last_masked_token_when_the_mask_has_holes():
    mask = torch.tensor([[False, True, False, True, False]])
    rewards, _ = token_rewards(torch.tensor([2.0]), torch.ones(1, 5), 0.5, mask)
    torch.testing.assert_close(rewards, row(0.0, -0.5, 0.0, 1.5, 0.0))


def test_gae_worked_by_hand_with_gamma_and_lambda_below_1():
    # backwards: A3 = 2 - 3 = -1; A2 = -0.5 + 0.5 * 3 - 2 + 0.25 * -1 = -1.25; A1 = 0.5 + 0.5 * 2 - 1 + 0.25 * -1.25
    advantages, returns = gae(row(1.0, 2.0, 3.0), row(0.5, -0.5, 2.0), MASK[:1], gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages, row(0.1875, -1.25, -1.0))
    torch.testing.assert_close(returns, row(1.1875, 0.75, 2.0))  # A + V


def test_gae_with_gamma_and_lambda_1_is_the_reward_to_go_minus_the_value():
    # rewards to go are 2, 1.5, 2
    advantages, returns = gae(row(1.0, 2.0, 3.0), row(0.5, -0.5, 2.0), MASK[:1], gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages, row(1.0, -0.5, -1.0))
    torch.testing.assert_close(returns, row(2.0, 1.5, 2.0))


def test_gae_with_lambda_0_is_the_one_step_error():
    # deltas: 0.5 + 0.5 * 2 - 1; -0.5 + 0.5 * 3 - 2; 2 - 3
    advantages, _ = gae(row(1.0, 2.0, 3.0), row(0.5, -0.5, 2.0), MASK[:1], gamma=0.5, lam=0.0)
    torch.testing.assert_close(advantages, row(0.5, -1.0, -1.0))


def test_gae_takes_no_value_from_padding():
    # A2 = 1 - 2 = -1; A1 = 0 + 2 - 1 + 0.5 * -1 = 0.5; what stands in slot 3 is never read
    advantages, returns = gae(row(1.0, 2.0, 99.0), row(0.0, 1.0, 77.0), MASK[1:], gamma=1.0, lam=0.5)
    torch.testing.assert_close(advantages, row(0.5, -1.0, 0.0))
    torch.testing.assert_close(returns, row(1.5, 1.0, 0.0))


def test_gae_does_not_depend_on_how_far_a_row_is_padded():
    generator = torch.Generator().manual_seed(0)
    values, rewards = torch.randn(2, 3, generator=generator), torch.randn(2, 3, generator=generator)
    wide = torch.nn.functional.pad(MASK, (0, 4))
    padded = [torch.nn.functional.pad(tensor, (0, 4), value=5.0) for tensor in (values, rewards)]
    for narrow, padded_out in zip(
        gae(values, rewards, MASK, gamma=0.9, lam=0.8), gae(*padded, wide, gamma=0.9, lam=0.8), strict=True
    ):
        torch.testing.assert_close(padded_out[:, :3][MASK], narrow[MASK])


def test_advantages_are_whitened_over_the_whole_batch_and_returns_are_not():
    values, rewards = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 1.0], [0.0, 4.0, 0.0]])
    # gamma = lambda = 1, V = 0: A = reward to go = 1, 1, 1, 4, 4; mean 2.2, unbiased variance 2.7
    advantages, returns = whitened_gae(values, rewards, MASK, gamma=1.0, lam=1.0, whiten_rewards=False)
    torch.testing.assert_close(returns[MASK], torch.tensor([1.0, 1.0, 1.0, 4.0, 4.0]))
    expected = (torch.tensor([1.0, 1.0, 1.0, 4.0, 4.0]) - 2.2) / 2.7**0.5
    torch.testing.assert_close(advantages[MASK], expected)


def test_whiten_rewards_scales_the_rewards_and_keeps_their_mean():
    mask = torch.tensor([[True, True, False]])
    # rewards 1, 3: mean 2, standard deviation sqrt(2): 2 -+ 1 / sqrt(2); their sum stays 4
    _, returns = whitened_gae(row(0.0, 0.0, 0.0), row(1.0, 3.0, 50.0), mask, gamma=1.0, lam=1.0, whiten_rewards=True)
    assert returns[0, :2].tolist() == pytest.approx([4.0, 2 + 0.5**0.5])


# --- the estimators behind one interface ---

FULL = torch.ones(5, 2, dtype=torch.bool)
RETURNS = torch.tensor([[1.0, 0.0], [2.0, 1.0], [6.0, 0.0], [0.0, -2.0], [4.0, 4.0]])  # sums 1, 3, 6, -2, 8
GROUPS = torch.tensor([0, 0, 1, 1, 2])  # the last is alone


def estimated(estimator, rewards=RETURNS, mask=FULL, groups=GROUPS, values=None, **options):
    config = PPOConfig(advantage_estimator=estimator, **options)
    values = torch.zeros_like(rewards) if values is None else values
    return estimate_advantages(Rewards(rewards * mask, values, mask, groups), config)


def columns(*rows):
    return torch.tensor(rows).unsqueeze(1).expand(-1, 2)


def test_grpo_worked_by_hand():
    # groups (1, 3): mean 2, std sqrt(2); (6, -2): mean 2, std sqrt(32); alone: all five, mean 3.2, std sqrt(15.7)
    advantages, returns = estimated("grpo")
    expected = columns(-1 / 2**0.5, 1 / 2**0.5, 4 / 32**0.5, -4 / 32**0.5, 4.8 / 15.7**0.5)
    torch.testing.assert_close(advantages, expected, rtol=1e-3, atol=0)  # 1e-4 is added to each std
    torch.testing.assert_close(returns, columns(1.0, 3.0, 6.0, -2.0, 8.0))


@pytest.mark.parametrize(("scale", "divisor"), [("none", 1.0), ("batch", 15.7**0.5 + 1e-4)])
def test_grpo_may_divide_by_the_batch_or_by_nothing(scale, divisor):
    advantages, _ = estimated("grpo", scale_advantages=scale)
    torch.testing.assert_close(advantages, columns(-1.0, 1.0, 4.0, -4.0, 4.8) / divisor)


def test_rloo_worked_by_hand():
    # against the mean of the others: 1 - 3, 3 - 1, 6 + 2, -2 - 6; alone: 8 - (1 + 3 + 6 - 2) / 4
    torch.testing.assert_close(estimated("rloo")[0], columns(-2.0, 2.0, 8.0, -8.0, 6.0))


def test_reinforce_is_the_whitened_discounted_reward_to_go():
    advantages, returns = estimated("reinforce", gamma=0.5)
    to_go = torch.stack([RETURNS[:, 0] + 0.5 * RETURNS[:, 1], RETURNS[:, 1]], dim=1)
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(advantages, (to_go - to_go.mean()) / to_go.std())


def test_gae_through_the_interface_is_whitened_gae():
    values = torch.linspace(-1, 1, 10).reshape(5, 2)
    expected = whitened_gae(values, RETURNS, FULL, gamma=0.9, lam=0.8, whiten_rewards=True)
    for ours, theirs in zip(
        estimated("gae", values=values, gamma=0.9, lam=0.8, whiten_rewards=True), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_groups_may_lie_scattered_in_the_batch(estimator):
    order = torch.tensor([2, 0, 4, 3, 1])
    advantages, _ = estimated(estimator)
    scattered, _ = estimated(estimator, rewards=RETURNS[order], groups=GROUPS[order])
    torch.testing.assert_close(scattered, advantages[order])


@pytest.mark.parametrize("estimator", ["gae", "grpo", "rloo", "reinforce"])
def test_padding_earns_no_advantage_that_is_used(estimator):
    mask = FULL.clone()
    mask[0, 1] = mask[3, 1] = False
    clean, _ = estimated(estimator, mask=mask)
    dirty, _ = estimated(estimator, rewards=torch.where(mask, RETURNS, 0.0), mask=mask)
    torch.testing.assert_close(clean[mask], dirty[mask])


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_equal_rewards_teach_nothing(estimator):
    advantages, _ = estimated(estimator, rewards=torch.full((5, 2), 3.0))
    assert not advantages.any()
