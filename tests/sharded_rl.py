"""Short training runs on as many ranks as start it, under whatever engine the launch profile brings.

    sharded.py MODELS_FOLDER RESULT.json CASE...

Writes curves, bytes held, collectives of rollouts; saves each trained model as MODELS_FOLDER/PROFILE-CASE.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from torch.distributed.tensor.debug import CommDebugMode

from yunque.models.adapter import adapter_for
from yunque.models.arguments import GenerationArguments, ModelArguments
from yunque.models.loading import add_lora, load_model, load_tokenizer, save_model
from yunque.models.policy import Policy, Reference
from yunque.rl.config import PPOConfig
from yunque.rl.rollout import generate
from yunque.rl.trainer import PPOTrainer, Sampled

QUERIES = [[3, 4, 5, 1], [6, 7, 1], [11, 20, 21, 22, 1], [12, 13, 1]]
STEPS = 3
SETTINGS = {
    "batch_size": 8, "mini_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 2, "ppo_epochs": 2,
    "learning_rate": 1e-2, "max_grad_norm": 1.0,
}  # fmt: skip
GRPO = {"advantage_estimator": "grpo", "loss_normalization": "groups", "kl_placement": "loss", "kl_estimator": "k3"}
METHODS = {
    "full": {},
    "lora": {},
    "trained_adapter": {"advantage_estimator": "rloo"},
    "grpo_lora": GRPO,
    "full_kl": {"advantage_estimator": "reinforce", "kl_placement": "loss", "kl_estimator": "full"},
}


def trainer_of(models, family, method, precision, **options):
    """A trainer of a model read from disk, as a recipe makes it."""
    launched = "LOCAL_RANK" in os.environ
    AcceleratorState._reset_state(reset_partial_state=not launched)
    if launched:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # the former engine's else
    once = GradientAccumulationPlugin(num_steps=1)  # the profiles say "auto", which only a Trainer reads
    accelerator = Accelerator(cpu=not launched, mixed_precision=precision, gradient_accumulation_plugin=once)
    torch.manual_seed(0)
    arguments = ModelArguments(model_name_or_path=f"{models}/{family}", lora_r=4, use_peft=method != "full")
    tokenizer = load_tokenizer(arguments)
    model = load_model(arguments, tokenizer)
    if method == "trained_adapter":
        _move_adapter(model)
    config = PPOConfig(**(SETTINGS | METHODS[method] | options))
    adapter = adapter_for(model.config, tokenizer)
    policy = Policy(model, adapter, value_head=config.advantage_estimator == "gae")
    reference = Reference(policy, adapter_is_trained=method == "trained_adapter")
    return PPOTrainer(config, policy, reference, accelerator, seed=0, total_steps=STEPS), tokenizer


def _move_adapter(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


def sample(trainer, queries, samples, limit=6, **options):
    """This rank's responses."""
    with trainer.whole(reference=False) as (policy, _), trainer.accelerator.autocast():
        return generate(
            policy.model, trainer.adapter, queries, GenerationArguments(max_new_tokens=limit, **options), seed=0,
            samples=samples, shortest_limit=2, device=trainer.accelerator.device, value_head=policy.v_head,
        )  # fmt: skip


def step(trainer, number):
    queries = [query for query in QUERIES for _ in range(2)]
    samples = range(number * len(queries), (number + 1) * len(queries))
    responses = trainer.gather(sample(trainer, trainer.share(queries), trainer.share(samples)))
    scores = [sum(token > 40 for token in row.tokens) / len(row.tokens) for row in responses]
    known = [row.logprobs for row in responses]
    values = None if trainer.unwrapped.v_head is None else [row.values for row in responses]
    sampled = Sampled(known, values) if all(known) else None
    statistics = trainer.step(queries, [row.tokens for row in responses], scores, sampled=sampled)
    return {name: value for name, value in statistics.items() if not name.startswith("time/")}


def run(models, case):
    family, method, precision = case.split("-")
    trainer, tokenizer = trainer_of(models, family, method, precision)
    curve = [step(trainer, number) for number in range(STEPS)]
    with trainer.whole() as (policy, _):
        weights = sum(parameter.double().abs().sum().item() for parameter in policy.parameters())
    model = trainer.model_to_save()
    if trainer.accelerator.is_main_process:
        name = os.environ.get("SHARDED_NAME", "one")
        save_model(model, tokenizer, Path(models) / f"{name}-{case}")
    trainer.accelerator.wait_for_everyone()
    return {"curve": curve, "weights": weights}


if __name__ == "__main__":
    torch.set_num_threads(1)
    models, result, *cases = sys.argv[1:]
    found = {case: run(models, case) for case in cases}
    if int(os.environ.get("RANK", "0")) == 0:
        Path(result).write_text(json.dumps(found))
