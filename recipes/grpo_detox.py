"""Detoxify a language model with GRPO: answers compete within a group, by topic, length band or prompt; no value head.

    accelerate launch recipes/grpo_detox.py                              # embedded models and dialogues, no network
    accelerate launch recipes/grpo_detox.py --advantage_estimator rloo
    accelerate launch recipes/grpo_detox.py --config recipes/configs/grpo_detox_flan_t5_base.yaml
    accelerate launch --config_file launch/ddp.yaml --num_processes 4 recipes/grpo_detox.py --config ...
    accelerate launch --config_file launch/fsdp2.yaml --num_processes 8 recipes/grpo_detox.py --config ...

Groups are the values of --group_column, bands of prompt length (--group_column length_band), or, without it, the
answers to one prompt. Stop it with Ctrl-C or SIGTERM and go on with --resume.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

from yunque.arguments import parse
from yunque.data.arguments import DataArguments, GroupArguments
from yunque.distributed.arguments import RunArguments
from yunque.errors import InputError, run
from yunque.models.arguments import GenerationArguments, ModelArguments
from yunque.rl.config import GRPOConfig, GuardArguments, RewardArguments

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "grpo_detox_embedded.yaml"

GROUPS = (
    RunArguments,
    ModelArguments,
    RewardArguments,
    DataArguments,
    GroupArguments,
    GenerationArguments,
    GRPOConfig,
    GuardArguments,
)
"""Dataclasses of the options."""


def main() -> None:
    """Read the arguments, train, evaluate, save."""
    # ---- arguments ----
    groups = parse(*GROUPS, description=__doc__, default_config=DEFAULT_CONFIG)
    run_args, model_args, reward_args, data_args, group_args, generation, grpo, guard_args = groups
    if grpo.num_generations < 2 and data_args.group_column is None:
        raise InputError("num_generations: an answer alone has no group; give 2 or more, or a group_column")
    grpo.check_lengths(generation.max_new_tokens)

    from yunque.artifacts import prepare_output_dir
    from yunque.data.corpus import count_rude_words
    from yunque.data.groups import LENGTH_BAND, make_groups
    from yunque.data.loading import load_splits
    from yunque.data.prompts import prepare_prompts
    from yunque.distributed.start import start_accelerator, start_run
    from yunque.evaluation.aligned import save_aligned
    from yunque.evaluation.answers import HeldOut
    from yunque.evaluation.before_after import TOXICITY, compare
    from yunque.evaluation.by_group import compare_groups, group_table
    from yunque.models.adapter import adapter_for
    from yunque.models.adapter_folders import adapter_config
    from yunque.models.embedded import use_embedded
    from yunque.models.loading import load_model, load_tokenizer, trainable_parameters
    from yunque.models.policy import Policy, Reference
    from yunque.rl.guards import Guards
    from yunque.rl.loop import Prompts, TrainingLoop
    from yunque.rl.reward_sources import load_toxicity_reward, reward_models
    from yunque.rl.score_scaling import ScoreScaler
    from yunque.rl.trainer import PPOTrainer

    # ---- seed and logging ----
    inputs = [model_args.model_name_or_path, *reward_models(reward_args)]
    console = start_run(run_args, inputs, "rl", model_args)
    accelerator = start_accelerator(run_args)
    use_embedded((model_args, "model_name_or_path"), (reward_args, "reward_model_name_or_path"))
    embedded_data = use_embedded((data_args, "dataset_name"))
    config = {name: value for group in groups for name, value in asdict(group).items()}

    # ---- model and reward ----
    tokenizer = load_tokenizer(model_args)
    model = load_model(model_args, tokenizer)
    console.print(trainable_parameters(model))
    adapter = adapter_for(model, tokenizer)
    reward = load_toxicity_reward(reward_args, adapter, accelerator.device)

    # ---- data and groups ----
    by_length = data_args.group_column == LENGTH_BAND
    data = load_splits(
        replace(data_args, group_column=None) if by_length else data_args,
        run_args.seed,
        keep_columns=bool(reward_args.reward_funcs),
    )
    console.print(str(data))
    train, test = (
        prepare_prompts(
            split,
            tokenizer,
            data_args,
            append_eos=model.config.is_encoder_decoder,
            model_limit=adapter.prompt_limit(generation.max_new_tokens),
        )
        for split in (data.train, data.test)
    )
    console.print(f"train {train.report}\ntest {test.report}")
    train_groups, test_groups = make_groups(train.dataset, test.dataset, data_args.group_column, group_args.max_groups)
    prompts = Prompts.of(train.dataset, train_groups)
    held_out_prompts = Prompts.of(test.dataset, test_groups)

    # ---- trainer ----
    prompts_per_step = grpo.batch_size // grpo.num_generations
    total_steps = run_args.max_steps
    if total_steps < 0:
        total_steps = math.ceil(run_args.num_train_epochs * len(prompts.texts) / prompts_per_step)
    policy = Policy(model.to(accelerator.device), adapter, value_head=False)
    reference = Reference(policy, adapter_is_trained=adapter_config(model_args.model_name_or_path) is not None)
    trainer = PPOTrainer(
        grpo,
        policy,
        reference,
        accelerator,
        seed=run_args.seed,
        total_steps=total_steps,
        temperature=generation.temperature,
    )

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True).strip()

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
        resolved_config=config,
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
    result = compare(
        held_out_prompts.texts,
        test.dataset["references"],
        before,
        after,
        kl=kl,
        seed=run_args.seed,
        rude_words=count_rude_words if embedded_data else None,
    )
    by_group = {}
    if test_groups is not None:
        by_group = compare_groups(test_groups, before, after, measure=TOXICITY, seed=run_args.seed)

    # ---- save ----
    save_aligned(
        run_args,
        model,
        tokenizer,
        held_out,
        result,
        console,
        stage="grpo",
        merge=model_args.merge_adapter,
        parents=[model_args.model_name_or_path, *reward_models(reward_args)],
        data=data.sources,
        prompt_template=data_args.prompt_template,
        config=config,
        truncated_texts=reward.truncated_texts,
        metrics={"groups": by_group} if by_group else None,
    )
    if by_group:
        console.print(group_table(by_group, TOXICITY))


if __name__ == "__main__":
    run(main)
