"""Detoxify a language model with PPO: a hate-speech classifier is the reward, the KL to the start model the leash.

    accelerate launch recipes/ppo_detox.py                               # embedded models and dialogues, no network
    accelerate launch recipes/ppo_detox.py --config recipes/configs/ppo_detox_flan_t5_base.yaml
    accelerate launch --config_file launch/ddp.yaml --num_processes 4 recipes/ppo_detox.py --config ...

Stop it with Ctrl-C or SIGTERM and go on with --resume. Ends with the held-out prompts before and after.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from yunque.arguments import parse
from yunque.data.arguments import DataArguments
from yunque.distributed.arguments import RunArguments
from yunque.errors import InputError, run
from yunque.models.arguments import GenerationArguments, ModelArguments
from yunque.rl.config import PPOConfig, RewardArguments

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "ppo_detox_embedded.yaml"


def main() -> None:
    """Read the arguments, train, evaluate, save."""
    # ---- arguments ----
    groups = parse(
        RunArguments,
        ModelArguments,
        RewardArguments,
        DataArguments,
        GenerationArguments,
        PPOConfig,
        description=__doc__,
        default_config=DEFAULT_CONFIG,
    )
    run_args, model_args, reward_args, data_args, generation, ppo = groups
    if ppo.max_new_tokens_low is not None and ppo.max_new_tokens_low > generation.max_new_tokens:
        raise InputError(
            f"max_new_tokens_low: {ppo.max_new_tokens_low} is more than max_new_tokens ({generation.max_new_tokens})"
        )

    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration, set_seed
    from rich.console import Console

    from yunque.artifacts import LOG, check_output_dir, prepare_output_dir, save_model_folder
    from yunque.data.corpus import count_rude_words
    from yunque.data.loading import load_splits
    from yunque.data.prompts import prepare_prompts
    from yunque.evaluation.answers import HeldOut
    from yunque.evaluation.before_after import compare
    from yunque.evaluation.plots import plot_before_after, plot_training
    from yunque.models.adapter import adapter_for
    from yunque.models.embedded import use_embedded
    from yunque.models.loading import (
        adapter_config,
        load_classifier,
        load_model,
        load_tokenizer,
        save_model,
        trainable_parameters,
    )
    from yunque.models.policy import Policy, Reference
    from yunque.rl.log import summarize_log
    from yunque.rl.loop import Prompts, TrainingLoop
    from yunque.rl.rewards import ClassifierReward, ClassifierScorer
    from yunque.rl.trainer import PPOTrainer

    # ---- seed and logging ----
    inputs = [model_args.model_name_or_path, reward_args.reward_model_name_or_path]
    check_output_dir(
        run_args.output_dir, overwrite=run_args.overwrite_output_dir, resume=run_args.resume, inputs=inputs
    )
    accelerator = Accelerator(
        mixed_precision=run_args.mixed_precision,
        log_with=run_args.report_to or None,
        project_config=ProjectConfiguration(logging_dir=f"{run_args.output_dir}/tensorboard"),
    )
    main_process = accelerator.is_main_process
    console = Console(quiet=not main_process)
    set_seed(run_args.seed)
    use_embedded((model_args, "model_name_or_path"), (reward_args, "reward_model_name_or_path"))
    embedded_data = use_embedded((data_args, "dataset_name"))
    config = {name: value for group in groups for name, value in asdict(group).items()}

    # ---- model and reward ----
    tokenizer = load_tokenizer(model_args)
    model = load_model(model_args, tokenizer)
    console.print(trainable_parameters(model))
    adapter = adapter_for(model.config, tokenizer)
    classifier = load_classifier(reward_args.reward_model_name_or_path, "reward_model_name_or_path")
    scorer = ClassifierScorer(
        *classifier,
        batch_size=reward_args.reward_batch_size,
        device=reward_args.reward_device or accelerator.device,
    )
    reward = ClassifierReward(scorer, adapter, reward_args)

    # ---- data ----
    data = load_splits(data_args, run_args.seed)
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
    prompts, held_out_prompts = (Prompts(split.dataset["input_ids"], split.dataset["query"]) for split in (train, test))

    # ---- trainer ----
    total_steps = run_args.max_steps
    if total_steps < 0:
        total_steps = math.ceil(run_args.num_train_epochs * len(prompts.texts) / ppo.batch_size)
    policy = Policy(model.to(accelerator.device), adapter)
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

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True).strip()

    # ---- train ----
    if main_process:
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
    ).train()

    # ---- evaluate ----
    held_out = HeldOut(
        trainer, held_out_prompts, reward, decode, generation, batch_size=run_args.per_device_eval_batch_size
    )
    with reference.model() as reference_model:
        before, _ = held_out.answers(reference_model, "before")
    after, responses = held_out.answers(policy.model, "after")
    kl = held_out.divergence(policy, reference, responses)
    accelerator.end_training()
    if not main_process:
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

    # ---- save ----
    folder = Path(run_args.output_dir)
    metrics = result.metrics | summarize_log(folder / LOG)

    def write(staging: Path) -> None:
        save_model(model, tokenizer, staging, merge=model_args.merge_adapter)
        result.write(staging)
        plot_training(folder / LOG, staging)
        plot_before_after(result, staging)

    save_model_folder(
        folder,
        write,
        stage="ppo",
        parents=[model_args.model_name_or_path, reward_args.reward_model_name_or_path],
        data=data.sources,
        prompt_template=data_args.prompt_template,
        seed=run_args.seed,
        config=config,
        metrics=metrics,
    )
    result.print(console)
    if scorer.truncated_texts:
        console.print(f"{scorer.truncated_texts:,} texts were longer than the classifier reads and lost their start")
    console.print(f"Model, plots (reward.png, kl.png, loss.png) and answers (before_after.csv): {folder}")


if __name__ == "__main__":
    run(main)
