"""Teach a decoder-only model to go on from openings of reviews in a good or a bad mood, with PPO: the IMDb notebook.

    accelerate launch recipes/ppo_sentiment.py --sentiment positive --output_dir outputs/pos      # GPT-2, from the hub
    accelerate launch recipes/ppo_sentiment.py --sentiment negative --output_dir outputs/neg --compare_with outputs/pos
    accelerate launch recipes/ppo_sentiment.py --config recipes/configs/ppo_sentiment_local.yaml ...      # local files

The second command ends with the two policies on the same prompts, beside each other.
Stop it with Ctrl-C or SIGTERM and go on with --resume. Ends with the held-out prompts before and after.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

from yunque.arguments import parse
from yunque.data.arguments import OpeningArguments
from yunque.distributed.arguments import RunArguments
from yunque.errors import InputError, run
from yunque.models.arguments import GenerationArguments, ModelArguments
from yunque.rl.config import GuardArguments, PPOConfig, RewardArguments

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "ppo_sentiment_gpt2_imdb.yaml"


@dataclass
class SentimentArguments(RewardArguments):
    """The mood that is rewarded; both labels of the reward model follow from it."""

    reward_label: str = field(default="", init=False)
    toxicity_label: str = field(default="", init=False)
    sentiment: str = field(
        default="positive",
        metadata={"help": "Mood of the label whose score is the reward.", "choices": ["positive", "negative"]},
    )
    positive_label: str = field(default="POSITIVE", metadata={"help": "The classifier's label of the good mood."})
    negative_label: str = field(default="NEGATIVE", metadata={"help": "The classifier's label of the bad mood."})
    compare_with: str | None = field(
        default=None, metadata={"help": "Folder of a finished run of the other direction, to compare the policies."}
    )

    def __post_init__(self) -> None:
        """Derive the labels and check the rest."""
        super().__post_init__()
        self.reward_label = self.positive_label if self.sentiment == "positive" else self.negative_label
        self.toxicity_label = self.positive_label  # what is measured beside the reward, in both directions

    def option_of(self, name: str) -> str:
        """The option here that stands behind one of the base class."""
        return {"reward_label": f"{self.sentiment}_label", "toxicity_label": "positive_label"}.get(name, name)


GROUPS = (
    RunArguments,
    ModelArguments,
    SentimentArguments,
    OpeningArguments,
    GenerationArguments,
    PPOConfig,
    GuardArguments,
)
"""Dataclasses of the options."""


def main() -> None:
    """Read the arguments, train, evaluate, save."""
    # ---- arguments ----
    groups = parse(*GROUPS, description=__doc__, default_config=DEFAULT_CONFIG)
    run_args, model_args, reward_args, data_args, generation, ppo, guard_args = groups
    ppo.check_lengths(generation.max_new_tokens)

    from yunque.artifacts import prepare_output_dir
    from yunque.data.openings import continuation_decoder, load_texts, prepare_openings
    from yunque.distributed.start import start_accelerator, start_run
    from yunque.evaluation.aligned import save_aligned
    from yunque.evaluation.answers import HeldOut
    from yunque.evaluation.before_after import SENTIMENT, compare
    from yunque.evaluation.policies import check_same_prompts, compare_policies, read_former_run
    from yunque.models.adapter import adapter_for
    from yunque.models.adapter_folders import adapter_config
    from yunque.models.loading import load_model, load_tokenizer, trainable_parameters
    from yunque.models.policy import Policy, Reference
    from yunque.rl.guards import Guards
    from yunque.rl.loop import Prompts, TrainingLoop
    from yunque.rl.reward_sources import load_reward, reward_models
    from yunque.rl.score_scaling import ScoreScaler
    from yunque.rl.trainer import PPOTrainer

    # ---- seed and logging ----
    parents = [name for name in (model_args.model_name_or_path, *reward_models(reward_args)) if name]
    inputs = [*parents, reward_args.compare_with] if reward_args.compare_with else parents
    console = start_run(run_args, inputs, "rl", model_args)
    accelerator = start_accelerator(run_args)
    config = {option.name: getattr(group, option.name) for group in groups for option in fields(group) if option.init}
    former = None
    if reward_args.compare_with:
        alike = ("positive_label", "reward_text", *(option.name for option in fields(generation)))
        former = read_former_run(
            reward_args.compare_with,
            "compare_with",
            SENTIMENT,
            towards=("sentiment", reward_args.sentiment),
            same={name: config[name] for name in alike},
            parents=parents,
        )

    # ---- model and reward ----
    tokenizer = load_tokenizer(model_args)
    model = load_model(model_args, tokenizer)
    if model.config.is_encoder_decoder:
        raise InputError(
            f"model_name_or_path: {model_args.model_name_or_path} is an encoder-decoder model, which does not go on "
            "from a text; give a decoder-only one"
        )
    console.print(trainable_parameters(model))
    adapter = adapter_for(model, tokenizer)
    try:
        reward = load_reward(reward_args, adapter, accelerator.device)
    except InputError as error:
        option, _, message = str(error).partition(": ")
        raise InputError(f"{reward_args.option_of(option)}: {message}") from error
    if not reward.measures_label:
        raise InputError("reward_model_name_or_path: sentiment is measured by it; give a classifier with labels")

    # ---- data ----
    data = load_texts(data_args, run_args.seed, keep_columns=bool(reward_args.reward_funcs))
    console.print(str(data))
    train, test = (
        prepare_openings(
            split, tokenizer, data_args, seed=seed, model_limit=adapter.prompt_limit(generation.max_new_tokens)
        )
        for split, seed in ((data.train, run_args.seed), (data.test, 0))  # runs of all seeds meet the same test prompts
    )
    console.print(f"train {train}\ntest {test}")
    prompts, held_out_prompts = (Prompts.of(split.dataset) for split in (train, test))
    if former is not None:
        check_same_prompts(former, held_out_prompts.texts, "compare_with")

    # ---- trainer ----
    prompts_per_step = ppo.batch_size // ppo.num_generations
    total_steps = run_args.max_steps
    if total_steps < 0:
        total_steps = math.ceil(run_args.num_train_epochs * len(prompts.texts) / prompts_per_step)
    policy = Policy(model.to(accelerator.device), adapter, value_head=ppo.advantage_estimator == "gae")
    reference = Reference(policy, adapter_is_trained=adapter_config(model_args.model_name_or_path) is not None)
    trainer = PPOTrainer(
        ppo,
        policy,
        reference,
        accelerator,
        seed=run_args.seed,
        total_steps=total_steps,
        temperature=generation.temperature,
    )
    decode = continuation_decoder(tokenizer)

    # ---- train ----
    if accelerator.is_main_process:
        prepare_output_dir(run_args.output_dir, overwrite=run_args.overwrite_output_dir, resume=run_args.resume)
    accelerator.wait_for_everyone()
    TrainingLoop(
        trainer,
        prompts,
        reward,
        decode,
        generation=generation,
        run=run_args,
        total_steps=total_steps,
        resolved_config={name: value for name, value in config.items() if name != "compare_with"},  # no part of a curve
        scaler=ScoreScaler(reward_args),
        guards=Guards(guard_args),
    ).train()

    # ---- evaluate ----
    held_out = HeldOut(
        trainer, held_out_prompts, reward, decode, generation, batch_size=run_args.per_device_eval_batch_size
    )
    before, after, kl = held_out.before_and_after()
    model = trainer.model_to_save()
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    result = compare(held_out_prompts.texts, None, before, after, kl=kl, seed=run_args.seed, measure=SENTIMENT)
    both = None
    if former is not None:
        policies = {reward_args.sentiment: (after, kl), former.name: (former.answers, former.kl)}
        ordered = {name: policies[name] for name in ("positive", "negative")}
        both = compare_policies(held_out_prompts.texts, before, ordered, measure=SENTIMENT, seed=run_args.seed)

    # ---- save ----
    save_aligned(
        run_args,
        model,
        tokenizer,
        held_out,
        result,
        console,
        merge=model_args.merge_adapter,
        parents=parents,
        data=data.sources,
        prompt_template=None,
        config=config,
        truncated_texts=reward.truncated_texts,
        metrics=None if both is None else {"policies": both.metrics},
        also=None if both is None else both.write,
    )
    if both is not None:
        both.print(console)


if __name__ == "__main__":
    run(main)
