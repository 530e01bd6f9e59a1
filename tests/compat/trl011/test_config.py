import dataclasses
import warnings

import pytest

from yunque.compat.trl011 import PPOConfig
from yunque.compat.trl011.config import STRICT_VARIABLE
from yunque.errors import InputError


def test_defaults_are_trl_s():
    config = PPOConfig()
    ours = (config.batch_size, config.mini_batch_size, config.ppo_epochs, config.init_kl_coef, config.horizon)
    assert ours == (128, 128, 4, 0.2, 10000.0)
    assert (config.backward_batch_size, config.total_ppo_epochs, config.strict) == (128, 157, False)
    assert config.to_dict()["learning_rate"] == 1.41e-5


def test_old_names():
    config = PPOConfig(batch_size=8, forward_batch_size=2, optimize_cuda_cache=True)
    assert (config.mini_batch_size, config.optimize_device_cache) == (2, True)


def test_batch_sizes_become_totals():
    config = PPOConfig(batch_size=8, mini_batch_size=2, gradient_accumulation_steps=2, kl_penalty="mse", target=3.0)
    engine = config.engine_config(4)
    assert (engine.batch_size, engine.mini_batch_size, engine.gradient_accumulation_steps) == (32, 8, 2)
    assert (engine.kl_estimator, engine.kl_target, engine.early_stop_kl) == ("k2", 3.0, None)
    assert PPOConfig(early_stopping=True, target_kl=0.2).engine_config(1).early_stop_kl == pytest.approx(0.3)


def test_every_number_reaches_the_engine():
    changed = {
        **{"learning_rate": 0.5, "gamma": 0.5, "lam": 0.25, "cliprange": 0.3, "cliprange_value": 0.4, "vf_coef": 0.7},
        **{"ppo_epochs": 3, "whiten_rewards": True, "max_grad_norm": 2.0, "init_kl_coef": 0.9, "adap_kl_ctrl": False},
        **{"ratio_threshold": 5.0, "gradient_checkpointing": True},
    }
    engine = dataclasses.asdict(PPOConfig(**changed).engine_config(1))
    assert {name: engine[name] for name in changed} == changed
    assert PPOConfig(horizon=7.0).engine_config(1).kl_horizon == 7.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 2, "mini_batch_size": 2, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"batch_size": 6, "mini_batch_size": 4}, "mini_batch_size: 4 does not divide"),
        ({"kl_penalty": "k3"}, "kl_penalty"),
        ({"push_to_hub_if_best_kwargs": {"private": True}}, "repo_id"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        PPOConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"tracker_project_name": "mine"},
        {"tracker_kwargs": {"wandb": {}}},
        {"use_score_norm": True},
        {"dataset_num_proc": 2},
    ],
)
def test_options_without_effect_are_named(options):
    with pytest.warns(UserWarning, match=f"without effect: {next(iter(options))}"):
        PPOConfig(**options)


def test_the_defaults_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PPOConfig()


def test_the_switch(monkeypatch):
    for value, strict in (("1", True), ("true", True), ("0", False), ("", False)):
        monkeypatch.setenv(STRICT_VARIABLE, value)
        assert PPOConfig().strict is strict
    assert PPOConfig(strict=True).strict
    monkeypatch.setenv(STRICT_VARIABLE, "yes please")
    with pytest.raises(InputError, match="neither 0 nor 1"):
        PPOConfig()
