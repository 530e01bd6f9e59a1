"""Prune a model: heads, feed-forward neurons and layers cut out, or single weights masked.

    python compress/prune.py
    python compress/prune.py --model_name_or_path outputs/ppo_detox --dataset_name embedded --ffn_sparsity 0.3
    python compress/distill.py --student_name_or_path outputs/pruned --teacher_name_or_path outputs/ppo_detox ...

What is cut makes the model smaller and faster; a mask changes neither. The last command is the recovery training: the
pruned model learns from the whole one. Without arguments the embedded summariser is pruned. docs/pruning.md
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from yunque.arguments import parse
from yunque.compression.arguments import PruningArguments
from yunque.data.arguments import DataArguments, TemplateArguments
from yunque.errors import InputError, run
from yunque.models.arguments import ModelArguments

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "prune_embedded.yaml"

GROUPS = (PruningArguments, ModelArguments, DataArguments, TemplateArguments)
"""Dataclasses of the options."""


def main() -> None:
    """Measure importance, cut, save."""
    # ---- arguments ----
    groups = parse(*GROUPS, description=__doc__, default_config=DEFAULT_CONFIG)
    args, model_args, data_args, template_args = groups
    if model_args.load_in_4bit or model_args.use_peft:
        name = "load_in_4bit" if model_args.load_in_4bit else "use_peft"
        raise InputError(f"{name}: pruning takes the weights as they are; leave it out")
    if args.needs_data and data_args.dataset_name is None:
        raise InputError("dataset_name: importance is measured on calibration data; give some, or importance magnitude")

    from yunque.artifacts import check_output_dir, prepare_output_dir, save_model_folder
    from yunque.compression.calibration import calibration_batches
    from yunque.compression.pruning import prune
    from yunque.data.mixtures import Encoding, Task, prepare_task, prompt_template_of
    from yunque.models.adapter import adapter_for
    from yunque.models.embedded import use_embedded
    from yunque.models.loading import load_model, load_tokenizer, merge_loaded_adapter, save_model

    # ---- model ----
    use_embedded((model_args, "model_name_or_path"), (data_args, "dataset_name"))
    parents = [model_args.model_name_or_path or ""]
    check_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resume=args.resume, inputs=parents)
    config = {name: value for group in groups for name, value in asdict(group).items()}
    tokenizer = load_tokenizer(model_args)
    model = merge_loaded_adapter(load_model(model_args, tokenizer))

    # ---- data ----
    batches, sources, template = list, [], None
    if args.needs_data:
        adapter = adapter_for(model, tokenizer)
        encoder_decoder = model.config.is_encoder_decoder
        limit = adapter.prompt_limit(args.max_target_length)
        data_args.max_train_samples = min(
            args.calibration_samples, data_args.max_train_samples or args.calibration_samples
        )
        task = Task("test", data_args, template_args)
        encoding = Encoding(encoder_decoder, limit, args.max_target_length, adapter.eos_ids)
        prepared = prepare_task(task, tokenizer, encoding, args.seed)
        print(prepared.report)
        batches = calibration_batches(prepared.train, tokenizer, model, args.calibration_batch_size)
        sources, template = prepared.sources, prompt_template_of([task])

    # ---- prune ----
    pruned = prune(model, args, batches)

    # ---- save ----
    prepare_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resume=args.resume)
    folder = Path(args.output_dir)
    save_model_folder(
        folder,
        lambda staging: save_model(pruned.model, tokenizer, staging),
        stage="prune",
        parents=parents,
        data=sources,
        prompt_template=template,
        seed=args.seed,
        config=config,
        metrics=pruned.report,
    )
    for line in pruned.lines():
        print(line)
    print(f"Model: {folder}")


if __name__ == "__main__":
    run(main)
