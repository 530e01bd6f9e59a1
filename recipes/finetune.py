"""Fine-tune a language model on prompts with answers: all weights, LoRA, QLoRA (nf4) or prompt tuning.

    python recipes/finetune.py --config recipes/configs/finetune_flan_t5_base.yaml
    python recipes/finetune.py --config recipes/configs/finetune_stories260k_alpaca.yaml
    accelerate launch --config_file launch/ddp.yaml --num_processes 4 recipes/finetune.py --config ...
    accelerate launch --config_file launch/fsdp2.yaml --num_processes 8 recipes/finetune.py --config ...

Encoder-decoder or decoder-only follows from the model. Ends with loss and ROUGE-L on the test split, and on an old task
before and after. Stop it with Ctrl-C or SIGTERM and go on with --resume. Which method and why: docs/finetuning.md
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from yunque.arguments import parse
from yunque.data.arguments import DataArguments, MixtureArguments, TemplateArguments
from yunque.distributed.supervised import SupervisedArguments
from yunque.errors import InputError, run
from yunque.models.arguments import ModelArguments, PromptTuningArguments
from yunque.models.scratch import ScratchArguments


@dataclass
class TargetArguments:
    """The answers: how long they may be, in training and in the evaluation at the end, and how they are batched."""

    max_target_length: int = field(default=128, metadata={"help": "Cut reference answers to this many tokens."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer generated for ROUGE-L, in tokens."})
    packing: bool = field(
        default=False, metadata={"help": "Put several short rows into one sequence (decoder-only models)."}
    )
    packing_length: int = field(default=512, metadata={"help": "Tokens of such a sequence."})

    def __post_init__(self) -> None:
        """Check the lengths."""
        for name in ("max_target_length", "max_new_tokens", "packing_length"):
            if getattr(self, name) < 2:
                raise InputError(f"{name}: {getattr(self, name)} leaves no answer; give 2 or more")


GROUPS = (
    SupervisedArguments,
    ModelArguments,
    PromptTuningArguments,
    ScratchArguments,
    DataArguments,
    TemplateArguments,
    MixtureArguments,
    TargetArguments,
)
"""Dataclasses of the options."""


def main() -> None:
    """Fine-tune, answer the test split, save the model folder."""
    # ---- arguments ----
    groups = parse(*GROUPS, description=__doc__)
    args, model_args, prompt_args, scratch_args, data_args, template_args, mixture_args, target_args = groups
    if scratch_args.model_type not in (None, "t5"):
        raise InputError(f"model_type: {scratch_args.model_type} writes no answers; give t5 or leave it out")
    for name in ("use_peft", "load_in_4bit", "prompt_tuning_tokens"):
        if scratch_args.from_scratch and (asdict(model_args) | asdict(prompt_args))[name]:
            raise InputError(f"{name}: needs a trained model to stand on; leave it or from_scratch out")
    if prompt_args.prompt_tuning_tokens and (model_args.merge_adapter or target_args.packing):
        name = "merge_adapter" if model_args.merge_adapter else "packing"
        raise InputError(f"{name}: virtual tokens stand before every single prompt; leave {name} out")

    from transformers import Seq2SeqTrainingArguments

    from yunque.artifacts import save_model_folder
    from yunque.data.mixtures import (
        Encoding,
        load_task,
        mix,
        old_task_of,
        prepare_task,
        prompt_template_of,
        tasks_of,
    )
    from yunque.data.targets import AnswerCollator, pack
    from yunque.distributed.held_out import HeldOut, HeldOutScores, answer_rows, change, show_change
    from yunque.distributed.saving import gathered_weights
    from yunque.distributed.start import split_while_loading, start_run
    from yunque.distributed.supervised import claim_output_dir, fit, remove_checkpoints, trainer_arguments
    from yunque.distributed.trainers import AnswerTrainer, label_loss
    from yunque.models.adapter import adapter_for
    from yunque.models.embedded import use_embedded
    from yunque.models.loading import load_model, load_tokenizer, save_model, trainable_parameters
    from yunque.models.scratch import new_model, train_tokenizer

    # ---- seed and logging ----
    use_embedded((model_args, "model_name_or_path"), (data_args, "dataset_name"))
    parents = [] if scratch_args.from_scratch else [model_args.model_name_or_path or ""]
    console = start_run(args, parents, "finetune", model_args, prompt_args)
    config = {name: value for group in groups for name, value in asdict(group).items()}

    # ---- model ----
    tasks = tasks_of(data_args, template_args, mixture_args)
    old_task = old_task_of(data_args, template_args, mixture_args)
    if scratch_args.from_scratch:
        texts = [load_task(task, args.seed).train for task in tasks]
        answers = [answer for rows in texts for references in rows["references"] for answer in references]
        prompts = [text for rows in texts for text in rows["text"]]
        tokenizer = train_tokenizer([*prompts, *answers], "t5", scratch_args.vocab_size, spaced=True)
        model = new_model(scratch_args, "t5", tokenizer, seed=args.seed)
    else:
        split_while_loading(args)
        tokenizer = load_tokenizer(model_args)
        model = load_model(model_args, tokenizer, prompt_args)
    encoder_decoder = model.config.is_encoder_decoder
    if encoder_decoder and target_args.packing:
        raise InputError(f"packing: {model.config.model_type} is an encoder-decoder model; leave packing out")
    console.print(trainable_parameters(model))

    # ---- data ----
    adapter = adapter_for(model, tokenizer)
    longest = target_args.max_new_tokens
    if not encoder_decoder:  # prompt and answer share the positions
        longest = max(longest, target_args.max_target_length) + (prompt_args.prompt_tuning_tokens or 0)
    encoding = Encoding(encoder_decoder, adapter.prompt_limit(longest), target_args.max_target_length, adapter.eos_ids)
    prepared = [prepare_task(task, tokenizer, encoding, args.seed) for task in tasks]
    old = prepare_task(old_task, tokenizer, encoding, args.seed) if old_task else None
    for task in [*prepared, *([old] if old else [])]:
        console.print(task.report)
    train_rows = mix([task.train for task in prepared], [task.weight for task in tasks], args.seed)
    if len(tasks) > 1:
        console.print(f"mixture: {len(train_rows):,} train rows of {', '.join(task.name for task in tasks)}")
    if target_args.packing:
        from yunque.distributed.causal import check_packing

        check_packing(model)
        train_rows, packed = pack(train_rows, target_args.packing_length)
        console.print(packed)

    # ---- trainer ----
    if encoder_decoder:
        arguments = trainer_arguments(args, Seq2SeqTrainingArguments)
        claim_output_dir(args)
        trainer = AnswerTrainer(
            model=model,
            args=arguments,
            train_dataset=train_rows,
            data_collator=AnswerCollator(tokenizer, model),
            compute_loss_func=label_loss(args.label_smoothing_factor),
            processing_class=tokenizer,
        )
    else:
        from trl import SFTConfig  # here: it takes seconds to import

        from yunque.distributed.causal import PREPARED, ContinuationTrainer

        arguments = trainer_arguments(args, SFTConfig, packing=target_args.packing, **PREPARED)
        claim_output_dir(args)
        trainer = ContinuationTrainer(model=model, args=arguments, train_dataset=train_rows, processing_class=tokenizer)

    # ---- what to watch ----
    held_out = HeldOut(
        trainer.accelerator,
        adapter,
        tokenizer,
        batch_size=args.per_device_eval_batch_size,
        max_new_tokens=target_args.max_new_tokens,
    )
    watched = [*(prepared if mixture_args.evaluate_before else []), *([old] if old else [])]

    # ---- train ----
    metrics, start = fit(
        trainer,
        args,
        config,
        lambda: {task.name: held_out.scores(trainer.model, task.test).to_json() for task in watched},
    )
    before = {name: HeldOutScores.from_json(scores) for name, scores in start.items()}

    # ---- evaluate ----
    after = {task.name: held_out.scores(trainer.model, task.test) for task in [*prepared, *([old] if old else [])]}
    weights = gathered_weights(trainer.accelerator, model, trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    scores = {task.name: after[task.name].as_dict(args.seed) for task in prepared}
    metrics |= scores[tasks[0].name] if len(tasks) == 1 else {"tasks": scores}
    changes = {name: change(before[name], after[name], args.seed) for name in before}
    if old:
        metrics["forgetting"] = {"task": old.name, **changes[old.name]}
    if mixture_args.evaluate_before:
        metrics["change"] = {task.name: changes[task.name] for task in prepared}

    # ---- save ----
    folder = Path(args.output_dir)

    def write(staging: Path) -> None:
        save_model(model, tokenizer, staging, merge=model_args.merge_adapter, weights=weights)
        with (staging / "predictions.jsonl").open("w", encoding="utf-8") as file:
            for task in prepared:
                for row in answer_rows(task.test, after[task.name]):
                    row = {"task": task.name, **row} if len(tasks) > 1 else row
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")

    save_model_folder(
        folder,
        write,
        stage="finetune",
        parents=parents,
        data=[source for task in [*prepared, *([old] if old else [])] for source in task.sources],
        prompt_template=prompt_template_of(tasks),
        seed=args.seed,
        config=config,
        metrics=metrics,
    )
    remove_checkpoints(args)
    for name, score in scores.items():
        rouge = score["rougeL"]
        interval = "" if rouge["low"] is None else f" [{rouge['low']:.3f}, {rouge['high']:.3f}]"
        console.print(
            f"{name}: loss {score['eval_loss']:.3f}, ROUGE-L {rouge['mean']:.3f}{interval},"
            f" {len(after[name].nats):,} rows"
        )
    for name, report in changes.items():
        console.print(show_change(f"{name}, before -> after", report))
    console.print(f"Model and answers (predictions.jsonl): {folder}")


if __name__ == "__main__":
    run(main)
