import pytest

from yunque.errors import InputError
from yunque.rl.config import PPOConfig, RewardArguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0 is too small; give 1 or more"),
        ({"mini_batch_size": 0}, "mini_batch_size: 0 is too small; give 1 or more"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: 0 is too small; give 1 or more"),
        ({"ppo_epochs": 0}, "ppo_epochs: 0 is too small; give 1 or more"),
        (
            {"batch_size": 12, "mini_batch_size": 5},
            "mini_batch_size: 5 does not divide batch_size (12); choose one of 1, 2, 3, 4, 6, 12",
        ),
        (
            {"batch_size": 12, "mini_batch_size": 4, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps: 2 minibatches of 4 do not divide batch_size (12)",
        ),
        ({"learning_rate": 0.0}, "learning_rate: 0.0 is not a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate: nan is not a positive number"),
        ({"kl_target": -1.0}, "kl_target: -1.0 is not a positive number"),
        ({"kl_horizon": 0}, "kl_horizon: 0 is not a positive number"),
        ({"ratio_threshold": 0.0}, "ratio_threshold: 0.0 is not a positive number"),
        ({"cliprange": -0.2}, "cliprange: -0.2 is not a positive number"),
        ({"cliprange_value": 0.0}, "cliprange_value: 0.0 is not a positive number"),
        ({"gamma": 1.01}, "gamma: 1.01 is not in [0, 1]"),
        ({"lam": -0.1}, "lam: -0.1 is not in [0, 1]"),
        ({"init_kl_coef": -0.1}, "init_kl_coef: -0.1 is not 0 or a positive number"),
        ({"max_new_tokens_low": 0}, "max_new_tokens_low: 0 is too small; give 1 or more"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(options, message):
    with pytest.raises(InputError) as caught:
        PPOConfig(**options)
    assert str(caught.value) == message


def test_values_at_the_ends_of_their_ranges_are_fine():
    PPOConfig(batch_size=1, mini_batch_size=1, gamma=0.0, lam=1.0, init_kl_coef=0.0, max_new_tokens_low=1)


def test_defaults_are_valid():
    assert PPOConfig() == PPOConfig(batch_size=16, mini_batch_size=4, ppo_epochs=1)


def test_a_reward_batch_of_nothing_is_refused():
    with pytest.raises(InputError, match="reward_batch_size: 0 is too small"):
        RewardArguments(reward_batch_size=0)
