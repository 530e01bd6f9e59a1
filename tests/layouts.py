"""One short training run of every estimator and family, on as many ranks as start it; writes its curves when run."""

import json
import sys
from pathlib import Path

import tiny
import torch
from accelerate import Accelerator

from yunque.models.adapter import adapter_for
from yunque.models.arguments import GenerationArguments
from yunque.models.policy import Policy, Reference
from yunque.rl.config import PPOConfig
from yunque.rl.rollout import generate
from yunque.rl.trainer import PPOTrainer, Sampled

CASES = [(family, estimator) for family in ("t5", "llama") for estimator in ("gae", "grpo", "rloo", "reinforce")]
QUERIES = [[3, 4, 5, 1], [6, 7, 1], [11, 20, 21, 22, 1], [12, 13, 1]]
STEPS = 3
TIMING = "time/"


def run(family, estimator, **options):
    """Statistics of a few steps of sampling and learning; the reward is the share of large tokens."""
    model = tiny.FAMILIES[family]()
    settings = {"batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2, "learning_rate": 1e-2, "max_grad_norm": 1.0}
    groups = {"loss_normalization": "groups", "kl_placement": "loss", "kl_estimator": "k3"}
    settings |= groups if estimator == "grpo" else {}
    config = PPOConfig(advantage_estimator=estimator, num_generations=2, **(settings | options))
    torch.manual_seed(0)
    policy = Policy(model, adapter_for(model, tiny.tokenizer()), value_head=estimator == "gae")
    trainer = PPOTrainer(config, policy, Reference(policy), Accelerator(cpu=True), seed=0, total_steps=STEPS)
    queries = [query for query in QUERIES for _ in range(2)]
    return [_step(trainer, queries, step) for step in range(STEPS)]


def _step(trainer, queries, step):
    samples = range(step * len(queries), (step + 1) * len(queries))
    policy = trainer.unwrapped
    here = generate(
        policy.model, trainer.adapter, trainer.share(queries), GenerationArguments(max_new_tokens=6),
        seed=0, samples=trainer.share(samples), shortest_limit=2, device=torch.device("cpu"), value_head=policy.v_head,
    )  # fmt: skip
    responses = trainer.gather(here)
    scores = [sum(token > 40 for token in row.tokens) / len(row.tokens) for row in responses]
    values = None if policy.v_head is None else [row.values for row in responses]
    sampled = Sampled([row.logprobs for row in responses], values)
    statistics = trainer.step(queries, [row.tokens for row in responses], scores, sampled=sampled)
    weights = sum(parameter.double().abs().sum() for parameter in policy.parameters())
    return {name: value for name, value in statistics.items() if not name.startswith(TIMING)} | {
        "weights": weights.item()
    }


def assert_same(curve, expected, without=()):
    """Equal up to float32 rounding; sums that cancel to about 0 have their terms' rounding."""
    for step, wanted in zip(curve, expected, strict=True):
        assert step.keys() == wanted.keys()
        for name in wanted.keys() - set(without):
            assert abs(step[name] - wanted[name]) <= 1e-3 * abs(wanted[name]) + 1e-4, (name, step[name], wanted[name])


if __name__ == "__main__":
    torch.set_num_threads(1)
    curves = {"-".join(case): run(*case) for case in CASES}
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(curves))
