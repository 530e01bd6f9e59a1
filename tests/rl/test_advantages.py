import pytest
import torch

from yunque.rl.advantages import gae, token_rewards, whitened_gae

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
