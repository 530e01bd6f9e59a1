"""Odds-ratio preference optimisation: fine-tune on the better answer of each pair and away from the worse, in one run.

    python recipes/orpo.py --config recipes/configs/orpo_flan_t5_base_hh.yaml
    python recipes/orpo.py --config recipes/configs/orpo_hh_stories_local.yaml
    accelerate launch --config_file launch/ddp.yaml --num_processes 4 recipes/orpo.py --config ...
    accelerate launch --config_file launch/fsdp2.yaml --num_processes 8 recipes/orpo.py --config ...

For decoder-only and encoder-decoder models; no reference model is kept. Ends with margins and accuracies per token on
held-out pairs, before and after. Stop it with Ctrl-C or SIGTERM and go on with --resume.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from yunque.arguments import parse
from yunque.data.arguments import PreferenceArguments
from yunque.distributed.supervised import SupervisedArguments
from yunque.errors import run
from yunque.models.arguments import ModelArguments
from yunque.models.preference_arguments import PairArguments

GROUPS = (SupervisedArguments, ModelArguments, PreferenceArguments, PairArguments)
"""Dataclasses of the options."""


def main() -> None:
    """Load pairs and model, train, compare on held-out pairs, save the model folder."""
    # ---- arguments ----
    groups = parse(*GROUPS, description=__doc__)
    args, model_args, data_args, orpo_args = groups

    import numpy as np
    from transformers import TrainingArguments

    from yunque.artifacts import save_model_folder
    from yunque.data.preferences import load_preferences
    from yunque.distributed.preferences import PreferenceTrainer
    from yunque.distributed.saving import gathered_weights
    from yunque.distributed.start import split_while_loading, start_run
    from yunque.distributed.supervised import claim_output_dir, fit, remove_checkpoints, trainer_arguments
    from yunque.metrics.preferences import change_line, preference_metrics
    from yunque.models.adapter import adapter_for
    from yunque.models.loading import load_model, load_tokenizer, save_model, trainable_parameters
    from yunque.models.preference_losses import ORPO
    from yunque.models.preference_pairs import encode_pairs

    # ---- seed and logging ----
    parents = [model_args.model_name_or_path or ""]
    console = start_run(args, parents, "preferences", model_args)
    config = {name: value for group in groups for name, value in asdict(group).items()}

    # ---- data ----
    data = load_preferences(data_args, args.seed)
    console.print(str(data))

    # ---- model ----
    split_while_loading(args)
    tokenizer = load_tokenizer(model_args)
    model = load_model(model_args, tokenizer)
    console.print(trainable_parameters(model))
    adapter = adapter_for(model, tokenizer)
    train_rows, train_report = encode_pairs(data.train, tokenizer, adapter, orpo_args)
    test_rows, test_report = encode_pairs(data.test, tokenizer, adapter, orpo_args)
    console.print(f"train {train_report}\ntest {test_report}")

    # ---- trainer ----
    arguments = trainer_arguments(
        args,
        TrainingArguments,
        remove_unused_columns=False,  # they are the pairs
        ddp_find_unused_parameters=False,  # log-probabilities are taken inside the head, where DDP does not look
    )
    claim_output_dir(args)
    trainer = PreferenceTrainer(
        model,
        arguments,
        adapter=adapter,
        objective=ORPO(orpo_args.beta),
        train_dataset=train_rows,
        tokenizer=tokenizer,
        keep_dropout=not orpo_args.disable_dropout,
    )

    # ---- train ----
    metrics, start = fit(trainer, args, config, lambda: trainer.log_probabilities(test_rows, per_token=True).tolist())
    before = np.array(start)

    # ---- evaluate ----
    after = trainer.log_probabilities(test_rows, per_token=True)
    weights = gathered_weights(trainer.accelerator, model, trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    metrics |= preference_metrics(before, after, seed=args.seed)

    # ---- save ----
    folder = Path(args.output_dir)

    def write(staging: Path) -> None:
        save_model(model, tokenizer, staging, merge=model_args.merge_adapter, weights=weights)
        with (staging / "margins.jsonl").open("w", encoding="utf-8") as file:
            for number, old, new in zip(test_rows["row"], before.tolist(), after.tolist(), strict=True):
                row = {"margin_before": old[0] - old[1], "margin_after": new[0] - new[1], **data.test[number]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    save_model_folder(
        folder,
        write,
        stage="orpo",
        parents=parents,
        data=data.sources,
        seed=args.seed,
        config=config,
        metrics=metrics,
    )
    remove_checkpoints(args)
    console.print(f"{metrics['num_pairs']:,} held-out pairs, log-probability per token, chosen less rejected answer:")
    console.print(f"  {change_line('margin', metrics)} nats\n  {change_line('accuracy', metrics)}")
    console.print(f"Model and margins (margins.jsonl): {folder}")


if __name__ == "__main__":
    run(main)
