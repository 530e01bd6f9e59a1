"""Short RL runs of tiny models under whatever profile starts this; writes what they computed.

    python tests/sharded_rl.py FOLDER RESULT.json CASE...

FOLDER holds the models by family. A case is FAMILY-METHOD-PRECISION, a curve of a few steps whose model is saved in
FOLDER beside the others, or ``probes``: what a profile does when batches are bad and ranks are unequal.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from yunque.distributed.accounting import Meter
from yunque.evaluation.answers import HeldOut
from yunque.models.adapter import adapter_for
from yunque.models.arguments import GenerationArguments, ModelArguments
from yunque.models.loading import load_classifier, load_model, load_tokenizer, save_model
from yunque.models.policy import Policy, Reference
from yunque.rl.config import PPOConfig, RewardArguments
from yunque.rl.loop import Prompts
from yunque.rl.rewards import ClassifierReward, ClassifierScorer, WeightedReward
from yunque.rl.rollout import generate
from yunque.rl.trainer import NonFiniteError, PPOTrainer, Sampled

QUERIES = [[3, 4, 5, 1], [6, 7, 1], [11, 20, 21, 22, 1], [12, 13, 1]]
GIVEN = [[8, 9, 30, 1], [10, 11], [40, 1], [16, 17, 18, 19, 20, 1], [50, 51, 52], [61, 1], [45, 3, 1], [33, 44, 55]]
STEPS = 3
SETTINGS = {
    "batch_size": 8, "mini_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 2, "ppo_epochs": 2,
    "learning_rate": 1e-2, "max_grad_norm": 1.0,
}  # fmt: skip
GRPO = {"advantage_estimator": "grpo", "loss_normalization": "groups", "kl_placement": "loss", "kl_estimator": "k3"}
METHODS = {
    "full": {},
    "lora": {},
    "grpo_lora": GRPO,
    "adapter": {},  # one that is trained already: its reference is a second, frozen one
    "full_kl": {"advantage_estimator": "reinforce", "kl_placement": "loss", "kl_estimator": "full"},
}
ONE_UPDATE = {"mini_batch_size": 8, "gradient_accumulation_steps": 1, "ppo_epochs": 1}
LAUNCHED = "LOCAL_RANK" in os.environ
MAIN = os.environ.get("RANK", "0") == "0"


def trainer_of(models, family, method, precision, **options):
    """A trainer of a model read from disk, as a recipe makes it, and the tokenizer."""
    AcceleratorState._reset_state(reset_partial_state=not LAUNCHED)
    if LAUNCHED:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # not the former trainer's engine
    once = GradientAccumulationPlugin(num_steps=1)
    accelerator = Accelerator(cpu=not LAUNCHED, mixed_precision=precision, gradient_accumulation_plugin=once)
    torch.manual_seed(0)
    name = f"{models}/{family}{'-adapter' * (method == 'adapter')}"
    arguments = ModelArguments(model_name_or_path=name, lora_r=4, lora_dropout=0.0, use_peft="lora" in method)
    tokenizer = load_tokenizer(arguments)
    model = load_model(arguments, tokenizer)
    config = PPOConfig(**(SETTINGS | METHODS[method] | options))
    torch.manual_seed(0)  # the value head's weights
    policy = Policy(model, adapter_for(model, tokenizer), value_head=config.advantage_estimator == "gae")
    reference = Reference(policy, adapter_is_trained=method == "adapter")
    return PPOTrainer(config, policy, reference, accelerator, seed=0, total_steps=STEPS), tokenizer


def sample(trainer, queries, samples, limit=6, shortest=2):
    """This rank's responses to its queries."""
    with trainer.whole(reference=False) as (policy, _), trainer.accelerator.autocast():
        return generate(
            policy.model, trainer.adapter, queries, GenerationArguments(max_new_tokens=limit), seed=0,
            samples=samples, shortest_limit=shortest, device=trainer.accelerator.device, value_head=policy.v_head,
        )  # fmt: skip


def step(trainer, number, reward=1.0):
    """Statistics of sampling and learning; the reward is the share of large tokens.

    In bf16 of learning from given answers: samples would part at the first token that rounding changes.
    """
    queries = [query for query in QUERIES for _ in range(2)]
    if trainer.accelerator.mixed_precision == "bf16":
        scores = [sum(token > 40 for token in row) / len(row) for row in GIVEN]
        return _without_times(trainer.step(queries, GIVEN, scores))
    samples = range(number * len(queries), (number + 1) * len(queries))
    responses = trainer.gather(sample(trainer, trainer.share(queries), trainer.share(samples)))
    scores = [reward * sum(token > 40 for token in row.tokens) / len(row.tokens) for row in responses]
    known = [row.logprobs for row in responses]
    values = None if trainer.unwrapped.v_head is None else [row.values for row in responses]
    sampled = Sampled(known, values) if all(known) else None
    return _without_times(trainer.step(queries, [row.tokens for row in responses], scores, sampled=sampled))


def _without_times(statistics):
    return {name: value for name, value in statistics.items() if not name.startswith("time/")}


def weights_of(trainer):
    """Whole weights of the policy, added up: in float64, so that no other set of them gives the same sum."""
    with trainer.whole(reference=False) as (policy, _):
        return [parameter.double().abs().sum().item() for parameter in policy.parameters()]


def run(models, case):
    """Curve and end of a training run, and the bytes that this rank held in it."""
    with Meter() as meter:
        trainer, tokenizer = trainer_of(models, *case.split("-"), **(ONE_UPDATE if case.endswith("bf16") else {}))
        curve = [step(trainer, number) for number in range(STEPS)]
    weights = sum(weights_of(trainer))
    model = trainer.model_to_save()
    if MAIN:
        save_model(model, tokenizer, Path(models) / f"{os.environ.get('SHARDED_PROFILE', 'one')}-{case}")
    trainer.accelerator.wait_for_everyone()
    return {"curve": [line | {"weights": weights} for line in curve], "bytes": meter.report()}


def probes(models, family="t5"):
    """What happens at the edges of a run: see the keys."""
    trainer, tokenizer = trainer_of(models, family, "full", "no", early_stop_kl=0.05)
    curve = [step(trainer, 0)]
    before = weights_of(trainer)
    trainer.config.ratio_threshold = 0.5  # below the ratio of 1 that every update starts with
    skipped = step(trainer, 1)["ppo/skipped_updates"]
    trainer.config.ratio_threshold = 10.0
    after_skip = weights_of(trainer)
    try:
        step(trainer, 1, reward=1e30)  # its square is beyond float32
        refused = ""
    except NonFiniteError as error:
        refused = str(error)
    after_infinity = weights_of(trainer)
    curve.append(step(trainer, 2))
    curve[-1]["weights"] = sum(weights_of(trainer))
    return {
        "curve": curve,
        "skipped": skipped,
        "moved by skipped updates": before != after_skip,
        "refused": refused,
        "moved by a refused update": before != after_infinity,
        "gathered by limit": [_gathered_bytes(trainer, limit) for limit in (3, 24)],
        "lengths": _unequal_lengths(trainer),
        "before and after": _one_held_out_prompt(trainer, tokenizer, models),
    }


def _gathered_bytes(trainer, limit):
    with Meter() as meter:
        sample(trainer, trainer.share(QUERIES), trainer.share(range(4)), limit, shortest=limit)
    return meter.report()["communication_bytes"]


def _unequal_lengths(trainer):
    """Lengths of the answers of all ranks: rank 0 ends them at the first token, others never; then it has none."""
    given = trainer.adapter.eos_ids
    trainer.adapter.eos_ids = list(range(64)) if MAIN else [-1]
    rows = sample(trainer, QUERIES, range(4), 40, shortest=40)
    rows += sample(trainer, [] if MAIN else QUERIES[:1], [] if MAIN else [9], 40, shortest=40)
    trainer.adapter.eos_ids = given
    return [len(row.tokens) for row in trainer.gather(rows)]


def _one_held_out_prompt(trainer, tokenizer, models):
    """Toxicities and KL of one prompt, which all ranks but one have nothing of."""
    arguments = RewardArguments(reward_model_name_or_path=f"{models}/roberta")
    scorer = ClassifierScorer(*load_classifier(f"{models}/roberta"), batch_size=4, device=torch.device("cpu"))
    reward = WeightedReward(arguments, ClassifierReward(scorer, trainer.adapter, arguments), {}, [1.0])
    prompts = Prompts([QUERIES[0]], ["w3 w4 w5"])
    held_out = HeldOut(trainer, prompts, reward, tokenizer.decode, GenerationArguments(max_new_tokens=6), batch_size=2)
    before, after, kl = held_out.before_and_after()
    return [*before.texts, *after.texts, *before.probabilities.tolist(), *after.probabilities.tolist(), kl]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, result, *cases = sys.argv[1:]
    found = {case: probes(folder) if case == "probes" else run(folder, case) for case in cases}
    if MAIN:
        Path(result).write_text(json.dumps(found))
