"""Fine-tune an encoder-decoder model on texts with reference answers: all weights, or a LoRA adapter.

    python recipes/finetune.py --config recipes/configs/finetune_flan_t5_base.yaml
    python recipes/finetune.py --config recipes/configs/finetune_dialogsum_t5_scratch.yaml
    accelerate launch --config_file launch/ddp.yaml --num_processes 4 recipes/finetune.py --config ...

Ends with loss and ROUGE-L on the test split. Stop it with Ctrl-C or SIGTERM and go on with --resume.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from yunque.arguments import parse
from yunque.data.arguments import DataArguments
from yunque.distributed.supervised import SupervisedArguments
from yunque.errors import InputError, run
from yunque.models.arguments import ModelArguments
from yunque.models.scratch import ScratchArguments


@dataclass
class TargetArguments:
    """The answers: how long they may be, in training and in the evaluation at the end."""

    max_target_length: int = field(default=128, metadata={"help": "Cut reference answers to this many tokens."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer generated for ROUGE-L, in tokens."})

    def __post_init__(self) -> None:
        """Check the lengths."""
        for name in ("max_target_length", "max_new_tokens"):
            if getattr(self, name) < 2:
                raise InputError(f"{name}: {getattr(self, name)} leaves no answer; give 2 or more")


def main() -> None:
    """Fine-tune, answer the test split, save the model folder."""
    # ---- arguments ----
    groups = parse(
        SupervisedArguments, ModelArguments, ScratchArguments, DataArguments, TargetArguments, description=__doc__
    )
    args, model_args, scratch_args, data_args, target_args = groups
    if scratch_args.model_type not in (None, "t5"):
        raise InputError(f"model_type: {scratch_args.model_type} writes no answers; give t5 or leave it out")
    if scratch_args.from_scratch and model_args.use_peft:
        raise InputError("use_peft: an adapter needs a trained model under it; leave it or from_scratch out")

    from rich.console import Console
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainingArguments

    from yunque.artifacts import save_model_folder
    from yunque.data.loading import load_splits
    from yunque.data.prompts import prepare_prompts
    from yunque.data.targets import encode_targets
    from yunque.distributed.supervised import claim_output_dir, fit, remove_checkpoints, start_run, trainer_arguments
    from yunque.distributed.trainers import AnswerTrainer, label_loss
    from yunque.metrics.bootstrap import bootstrap
    from yunque.metrics.rouge import rouge_scores
    from yunque.models.adapter import adapter_for
    from yunque.models.embedded import use_embedded
    from yunque.models.loading import load_model, load_tokenizer, save_model, trainable_parameters
    from yunque.models.scratch import new_model, train_tokenizer

    # ---- seed and logging ----
    use_embedded((model_args, "model_name_or_path"), (data_args, "dataset_name"))
    parents = [] if scratch_args.from_scratch else [model_args.model_name_or_path or ""]
    main_process = start_run(args, inputs=parents)
    console = Console(quiet=not main_process, soft_wrap=True)
    config = {name: value for group in groups for name, value in asdict(group).items()}

    # ---- data ----
    data = load_splits(data_args, args.seed)
    console.print(str(data))

    # ---- model ----
    if scratch_args.from_scratch:
        answers = [reference for references in data.train["references"] for reference in references]
        tokenizer = train_tokenizer([*data.train["text"], *answers], "t5", scratch_args.vocab_size, spaced=True)
        model = new_model(scratch_args, "t5", tokenizer, seed=args.seed)
    else:
        tokenizer = load_tokenizer(model_args)
        model = load_model(model_args, tokenizer)
    if not model.config.is_encoder_decoder:
        raise InputError(
            f"model_name_or_path: {model_args.model_name_or_path} is decoder-only; this recipe trains encoder-decoder "
            "models (T5, BART) for now"
        )
    console.print(trainable_parameters(model))
    limit = adapter_for(model.config, tokenizer).prompt_limit(target_args.max_new_tokens)
    train, test = (prepare_prompts(split, tokenizer, data_args, model_limit=limit) for split in (data.train, data.test))
    train_rows, train_targets = encode_targets(train.dataset, tokenizer, target_args.max_target_length)
    test_rows, test_targets = encode_targets(test.dataset, tokenizer, target_args.max_target_length)
    console.print(f"train {train.report}\ntrain {train_targets}\ntest {test.report}\ntest {test_targets}")

    # ---- trainer ----
    arguments = trainer_arguments(args, Seq2SeqTrainingArguments, predict_with_generate=True)
    claim_output_dir(args)
    trainer = AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),  # pads labels with -100, which the loss skips
        compute_loss_func=label_loss(args.label_smoothing_factor),
        processing_class=tokenizer,
    )

    # ---- train ----
    metrics = fit(trainer, args)

    # ---- evaluate ----
    output = trainer.answer(test_rows, max_new_tokens=target_args.max_new_tokens)
    if not main_process:
        return
    token_ids = output.predictions
    token_ids[token_ids < 0] = tokenizer.pad_token_id
    predictions = [text.strip() for text in tokenizer.batch_decode(token_ids, skip_special_tokens=True)]
    references = list(test.dataset["references"])
    scores = rouge_scores(predictions, references)["rougeL"]
    metrics |= {"eval_loss": output.metrics["test_loss"], "rougeL": bootstrap(scores, seed=args.seed).as_dict()}

    # ---- save ----
    folder = Path(args.output_dir)

    def write(staging: Path) -> None:
        save_model(trainer.model, tokenizer, staging, merge=model_args.merge_adapter)
        with (staging / "predictions.jsonl").open("w", encoding="utf-8") as file:
            for query, prediction, reference in zip(test.dataset["query"], predictions, references, strict=True):
                row = {"query": query, "prediction": prediction, "references": reference}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    save_model_folder(
        folder,
        write,
        stage="finetune",
        parents=parents,
        data=data.sources,
        prompt_template=data_args.prompt_template,
        seed=args.seed,
        config=config,
        metrics=metrics,
    )
    remove_checkpoints(args)
    console.print(
        f"test: loss {metrics['eval_loss']:.3f}, ROUGE-L {scores.mean():.3f} "
        f"[{metrics['rougeL']['low']:.3f}, {metrics['rougeL']['high']:.3f}], {len(scores):,} rows"
    )
    console.print(f"Model and answers (predictions.jsonl): {folder}")


if __name__ == "__main__":
    run(main)
