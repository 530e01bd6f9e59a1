"""Train a reward model: on texts with labels (a classifier), or on pairs of answers (one reward, Bradley-Terry).

    python recipes/reward_model.py --config recipes/configs/reward_hate_roberta_base.yaml     # labels
    python recipes/reward_model.py --config recipes/configs/reward_gpt2_medium_hh.yaml        # pairs
    accelerate launch --config_file launch/ddp.yaml --num_processes 4 recipes/reward_model.py --config ...
    accelerate launch --config_file launch/fsdp2.yaml --num_processes 8 recipes/reward_model.py --config ...

The columns of the data decide which. Ends with accuracy and macro-F1, or with pair accuracy and calibration, on the
test split and, with --eval_dataset_name, on an independent second set; the folder serves as --reward_funcs FOLDER.
Stop it with Ctrl-C or SIGTERM and go on with --resume.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from yunque.arguments import parse
from yunque.data.arguments import LabelledDataArguments, PreferenceArguments
from yunque.distributed.supervised import SupervisedArguments
from yunque.errors import InputError, run
from yunque.models.arguments import ModelArguments
from yunque.models.scratch import ScratchArguments


@dataclass
class RewardDataArguments(LabelledDataArguments, PreferenceArguments):
    """Texts with one label each, or answers of which people preferred one; the columns say which it is."""


@dataclass
class ReaderArguments:
    """What the model reads, how pairs train it, and the independent set it is tested on beside the test split."""

    max_length: int = field(
        default=256,
        metadata={"help": "Cut texts to this many tokens: the first of a labelled text, the last of a pair."},
    )
    reward_text: str = field(
        default="query_response",
        metadata={"help": "Pairs: what the model reads, query_response or response; give PPO the same."},
    )
    center_rewards_coefficient: float | None = field(
        default=None, metadata={"help": "Pairs: weight of (r_chosen + r_rejected)^2, which keeps rewards around 0."}
    )
    disable_dropout: bool = field(
        default=False, metadata={"help": "Pairs: train without dropout, so that both answers meet the same model."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Second set to test on, never trained on: hub id, folder or file."}
    )
    eval_split: str = field(default="train", metadata={"help": "Its split; one file is the split `train`."})
    eval_text_column: str = field(default="text", metadata={"help": "Labels: its column with the text."})
    eval_label_column: str = field(default="label", metadata={"help": "Labels: its column with the label."})
    eval_label_values: list[str] | None = field(
        default=None, metadata={"help": "Labels: what it says for each of label_names, such as `non-hateful hateful`."}
    )
    eval_group_column: str | None = field(
        default=None, metadata={"help": "Its column to report accuracy by, such as HateCheck's functionality."}
    )

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.max_length < 8:
            raise InputError(f"max_length: {self.max_length} tokens hold no text; give 8 or more")
        if self.reward_text not in ("query_response", "response"):
            raise InputError(f"reward_text: '{self.reward_text}' is unknown; give query_response or response")
        if self.center_rewards_coefficient is not None and self.center_rewards_coefficient <= 0:
            raise InputError(f"center_rewards_coefficient: {self.center_rewards_coefficient} is not above 0")


GROUPS = (SupervisedArguments, ModelArguments, ScratchArguments, RewardDataArguments, ReaderArguments)
"""Dataclasses of the options."""


def main() -> None:
    """Train the reward model, test it, save its folder."""
    # ---- arguments ----
    groups = parse(*GROUPS, description=__doc__)
    args, model_args, scratch_args, data_args, reader_args = groups
    if scratch_args.from_scratch and model_args.use_peft:
        raise InputError("use_peft: an adapter needs a trained model under it; leave it or from_scratch out")
    if model_args.load_in_4bit:
        raise InputError("load_in_4bit: reward models train on plain weights; leave it out (use_peft saves memory too)")
    if scratch_args.model_type not in (None, "roberta"):
        raise InputError(f"model_type: {scratch_args.model_type} is no classifier; give roberta or leave it out")

    from transformers import DataCollatorWithPadding, TrainingArguments
    from trl import RewardConfig

    from yunque.artifacts import save_model_folder
    from yunque.data.labels import load_labelled_split, load_labelled_splits
    from yunque.data.preferences import holds_pairs, load_preference_split, load_preferences
    from yunque.distributed.reward_trainer import PairTrainer
    from yunque.distributed.saving import gathered_weights
    from yunque.distributed.start import split_while_loading, start_run
    from yunque.distributed.supervised import claim_output_dir, fit, remove_checkpoints, trainer_arguments
    from yunque.distributed.trainers import ClassifierTrainer, label_loss
    from yunque.evaluation.reward_plots import plot_pair_scores
    from yunque.metrics.classification import accuracy_by_group, classification_scores
    from yunque.metrics.pairs import bradley_terry_loss, pair_calibration, pair_scores
    from yunque.models.classifier import encode_pairs, encode_texts, load_to_classify, pair_texts, save_classifier
    from yunque.models.loading import load_tokenizer, trainable_parameters
    from yunque.models.scratch import new_model, train_tokenizer

    # ---- seed and logging ----
    parents = [] if scratch_args.from_scratch else [model_args.model_name_or_path or ""]
    console = start_run(args, parents, "reward", model_args)
    config = {name: value for group in groups for name, value in asdict(group).items()}

    # ---- data ----
    pairs = holds_pairs(data_args)
    if pairs and args.label_smoothing_factor:
        raise InputError("label_smoothing_factor: is for labels, and the data hold pairs; leave it out")
    data = (load_preferences if pairs else load_labelled_splits)(data_args, args.seed)
    console.print(str(data))
    tests, sources = {"test": data.test}, list(data.sources)
    if reader_args.eval_dataset_name:
        second = replace(
            data_args,
            dataset_name=reader_args.eval_dataset_name,
            dataset_config=None,
            train_split=reader_args.eval_split,
            test_split=None,
            text_column=reader_args.eval_text_column,
            label_column=reader_args.eval_label_column,
            label_values=reader_args.eval_label_values,
            group_column=reader_args.eval_group_column,
        )
        try:
            independent = (load_preference_split if pairs else load_labelled_split)(second)
        except InputError as error:
            message = str(error).removeprefix("train_").removeprefix("dataset_name: " if pairs else "")
            raise InputError(f"eval_dataset_name: {message}" if pairs else f"eval_{message}") from error
        tests["eval"] = independent.rows
        sources.append(independent.source)

    # ---- model ----
    label_names = ["reward"] if pairs else data_args.label_names
    if scratch_args.from_scratch:
        texts = pair_texts(data.train, "chosen", reader_args.reward_text) if pairs else data.train["text"]
        tokenizer = train_tokenizer(texts, "roberta", scratch_args.vocab_size, max_length_tokens=reader_args.max_length)
        model = new_model(scratch_args, "roberta", tokenizer, seed=args.seed, label_names=label_names)
    else:
        split_while_loading(args)
        tokenizer = load_tokenizer(model_args)
        model = load_to_classify(model_args, tokenizer, label_names)
    console.print(trainable_parameters(model))
    encoded = {}
    for name, rows in {"train": data.train, **tests}.items():
        if pairs:
            encoded[name], truncation = encode_pairs(rows, tokenizer, reader_args.max_length, reader_args.reward_text)
        else:
            encoded[name], truncation = encode_texts(rows, tokenizer, reader_args.max_length)
        console.print(f"{name} {truncation}")

    # ---- trainer ----
    if pairs:
        arguments = trainer_arguments(
            args,
            RewardConfig,
            max_length=None,  # cut above, where TRL would leave long pairs out
            disable_dropout=reader_args.disable_dropout,
            center_rewards_coefficient=reader_args.center_rewards_coefficient,
        )
    else:
        arguments = trainer_arguments(args, TrainingArguments)
    claim_output_dir(args)
    if pairs:
        trainer: Any = PairTrainer(
            model=model, args=arguments, train_dataset=encoded["train"], processing_class=tokenizer
        )
    else:
        trainer = ClassifierTrainer(
            model=model,
            args=arguments,
            train_dataset=encoded["train"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_loss_func=label_loss(args.label_smoothing_factor),
            processing_class=tokenizer,
        )

    # ---- train ----
    metrics: dict[str, Any] = fit(trainer, args, config)[0]

    # ---- evaluate ----
    kinds = ("accuracy", "longer_accuracy", "above_longer") if pairs else ("accuracy", "macro_f1")
    report: dict[str, Any] = {}
    lines, plotted = [], ()
    for name, rows in tests.items():
        if pairs:
            chosen, rejected = trainer.rewards(encoded[name]).T
            lengths = [[len(text) for text in rows[answer]] for answer in ("chosen", "rejected")]
            scores: Any = pair_scores(chosen, rejected, *lengths, seed=args.seed)
            calibration = pair_calibration(chosen, rejected)
            margin = rows["margin"] if "margin" in rows.column_names else None
            further = {"loss": bradley_terry_loss(chosen, rejected, margin), "calibration": calibration.as_dict()}
            labels, predictions = [1] * len(rows), (chosen > rejected).astype(int)
            plotted = (chosen, rejected, calibration) if name == "test" else plotted
        else:
            output = trainer.predict(encoded[name])
            labels, predictions = rows["label"], output.predictions.argmax(axis=-1)
            scores = classification_scores(labels, predictions, seed=args.seed)
            further = {"loss": output.metrics["test_loss"]}
        report[name] = {"eval_loss": further.pop("loss"), **scores.as_dict(), **further}
        if "group" in rows.column_names:
            by_group = accuracy_by_group(labels, predictions, rows["group"])
            report[name]["accuracy_by_group"] = {group: asdict(score) for group, score in by_group.items()}
        shares = ", ".join(f"{kind} {getattr(scores, kind)}" for kind in kinds)
        lines.append(f"{name}: {shares}, {len(rows):,} rows")
    metrics |= report.pop("test") | report

    # ---- save ----
    weights = gathered_weights(trainer.accelerator, model, trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    folder = Path(args.output_dir)
    report_name = "pairs.json" if pairs else "classification.json"

    def write(staging: Path) -> None:
        save_classifier(model, tokenizer, staging, merge=model_args.merge_adapter, weights=weights)
        (staging / report_name).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        if pairs:
            plot_pair_scores(*plotted, staging)

    save_model_folder(
        folder, write, stage="reward", parents=parents, data=sources, seed=args.seed, config=config, metrics=metrics
    )
    remove_checkpoints(args)
    for line in [*lines, *([str(plotted[2])] if pairs else [])]:
        console.print(line)
    console.print(f"Model and scores ({report_name}): {folder}")


if __name__ == "__main__":
    run(main)
