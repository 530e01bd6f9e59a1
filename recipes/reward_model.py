"""Train a classifier that serves as reward model: texts with labels in, a classifier folder with its scores out.

    python recipes/reward_model.py --config recipes/configs/reward_hate_roberta_base.yaml
    accelerate launch --config_file launch/ddp.yaml --num_processes 4 recipes/reward_model.py --config ...

Ends with accuracy and macro-F1 on the test split and, with --eval_dataset_name, on an independent second set.
Stop it with Ctrl-C or SIGTERM and go on with --resume.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from yunque.arguments import parse
from yunque.data.arguments import LabelledDataArguments
from yunque.distributed.supervised import SupervisedArguments
from yunque.errors import InputError, run
from yunque.models.arguments import ModelArguments
from yunque.models.scratch import ScratchArguments


@dataclass
class ClassifierArguments:
    """What the classifier reads, and the independent set it is tested on beside the test split."""

    max_length: int = field(default=256, metadata={"help": "Cut texts to this many tokens."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Second set to test on, never trained on: hub id, folder or file."}
    )
    eval_split: str = field(default="train", metadata={"help": "Its split; one file is the split `train`."})
    eval_text_column: str = field(default="text", metadata={"help": "Its column with the text."})
    eval_label_column: str = field(default="label", metadata={"help": "Its column with the label."})
    eval_label_values: list[str] | None = field(
        default=None, metadata={"help": "What it says for each of label_names, such as `non-hateful hateful`."}
    )
    eval_group_column: str | None = field(
        default=None, metadata={"help": "Its column to report accuracy by, such as HateCheck's functionality."}
    )

    def __post_init__(self) -> None:
        """Check the length."""
        if self.max_length < 8:
            raise InputError(f"max_length: {self.max_length} tokens hold no text; give 8 or more")


def main() -> None:
    """Train the classifier, test it, save its folder."""
    # ---- arguments ----
    groups = parse(
        SupervisedArguments,
        ModelArguments,
        ScratchArguments,
        LabelledDataArguments,
        ClassifierArguments,
        description=__doc__,
    )
    args, model_args, scratch_args, data_args, classifier_args = groups
    if model_args.use_peft:
        raise InputError("use_peft: classifiers train all their weights for now; leave it out")
    if scratch_args.model_type not in (None, "roberta"):
        raise InputError(f"model_type: {scratch_args.model_type} is no classifier; give roberta or leave it out")

    from rich.console import Console
    from transformers import DataCollatorWithPadding, TrainingArguments

    from yunque.artifacts import save_model_folder
    from yunque.data.labels import load_labelled_split, load_labelled_splits
    from yunque.distributed.supervised import claim_output_dir, fit, remove_checkpoints, start_run, trainer_arguments
    from yunque.distributed.trainers import ClassifierTrainer, label_loss
    from yunque.metrics.classification import accuracy_by_group, classification_scores
    from yunque.models.classifier import encode_texts, load_to_classify
    from yunque.models.loading import load_tokenizer, save_model, trainable_parameters
    from yunque.models.scratch import new_model, train_tokenizer

    # ---- seed and logging ----
    parents = [] if scratch_args.from_scratch else [model_args.model_name_or_path or ""]
    main_process = start_run(args, inputs=parents)
    console = Console(quiet=not main_process, soft_wrap=True)
    config = {name: value for group in groups for name, value in asdict(group).items()}

    # ---- data ----
    data = load_labelled_splits(data_args, args.seed)
    console.print(str(data))
    tests, sources = {"test": data.test}, list(data.sources)
    if classifier_args.eval_dataset_name:
        second = LabelledDataArguments(
            dataset_name=classifier_args.eval_dataset_name,
            train_split=classifier_args.eval_split,
            text_column=classifier_args.eval_text_column,
            label_column=classifier_args.eval_label_column,
            label_names=data_args.label_names,
            label_values=classifier_args.eval_label_values,
            group_column=classifier_args.eval_group_column,
        )
        try:
            independent = load_labelled_split(second)
        except InputError as error:
            raise InputError(f"eval_{str(error).removeprefix('train_')}") from error
        tests["eval"] = independent.rows
        sources.append(independent.source)

    # ---- model ----
    if scratch_args.from_scratch:
        tokenizer = train_tokenizer(
            data.train["text"], "roberta", scratch_args.vocab_size, max_length_tokens=classifier_args.max_length
        )
        model = new_model(scratch_args, "roberta", tokenizer, seed=args.seed, label_names=data_args.label_names)
    else:
        tokenizer = load_tokenizer(model_args)
        model = load_to_classify(model_args, tokenizer, data_args.label_names)
    console.print(trainable_parameters(model))
    encoded = {}
    for name, rows in {"train": data.train, **tests}.items():
        encoded[name], truncation = encode_texts(rows, tokenizer, classifier_args.max_length)
        console.print(f"{name} {truncation}")

    # ---- trainer ----
    arguments = trainer_arguments(args, TrainingArguments)
    claim_output_dir(args)
    trainer = ClassifierTrainer(
        model=model,
        args=arguments,
        train_dataset=encoded["train"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_loss_func=label_loss(args.label_smoothing_factor),
        processing_class=tokenizer,
    )

    # ---- train ----
    metrics = fit(trainer, args)

    # ---- evaluate ----
    report = {}
    for name, rows in tests.items():
        output = trainer.predict(encoded[name])
        labels, predictions = rows["label"], output.predictions.argmax(axis=-1)
        scores = classification_scores(labels, predictions, seed=args.seed).as_dict()
        report[name] = {"eval_loss": output.metrics["test_loss"], **scores}
        if "group" in rows.column_names:
            by_group = accuracy_by_group(labels, predictions, rows["group"])
            report[name]["accuracy_by_group"] = {group: asdict(score) for group, score in by_group.items()}
    metrics |= report.pop("test") | report

    # ---- save ----
    if not main_process:
        return
    folder = Path(args.output_dir)

    def write(staging: Path) -> None:
        save_model(trainer.model, tokenizer, staging)
        (staging / "classification.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")

    save_model_folder(
        folder,
        write,
        stage="reward",
        parents=parents,
        data=sources,
        seed=args.seed,
        config=config,
        metrics=metrics,
    )
    remove_checkpoints(args)
    for name, scores in (("test", metrics), ("eval", metrics.get("eval"))):
        if scores:
            console.print(
                f"{name}: accuracy {scores['accuracy']['mean']:.3f} "
                f"[{scores['accuracy']['low']:.3f}, {scores['accuracy']['high']:.3f}], "
                f"macro-F1 {scores['macro_f1']['mean']:.3f} "
                f"[{scores['macro_f1']['low']:.3f}, {scores['macro_f1']['high']:.3f}], {scores['num_rows']:,} rows"
            )
    console.print(f"Classifier and scores (classification.json): {folder}")


if __name__ == "__main__":
    run(main)
