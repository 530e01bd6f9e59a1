"""Make data by constitutional AI: critiques and revisions to fine-tune on, and preferences judged by a constitution.

    python recipes/constitutional.py --config recipes/configs/constitutional_stories260k.yaml     # no network
    python recipes/constitutional.py --config recipes/configs/constitutional_qwen2.5_1.5b.yaml
    python recipes/constitutional.py --config ... --generator_url http://127.0.0.1:8000/v1 --model_name_or_path NAME

Every step leaves a JSONL file in output_dir/steps. Stop it with Ctrl-C or SIGTERM and go on with --resume; edit a line
and --resume redoes what follows from it. Train on the results with

    python recipes/finetune.py --dataset_name OUTPUT_DIR/sft.jsonl --text_column instruction --target_column output ...
    python recipes/dpo.py --dataset_name OUTPUT_DIR/preferences.jsonl ...       # or recipes/reward_model.py
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from yunque.arguments import parse
from yunque.distributed.layouts import check_layout
from yunque.errors import InputError, run
from yunque.models.arguments import GenerationArguments
from yunque.rl.feedback_arguments import FeedbackArguments, WriterArguments

GROUPS = (FeedbackArguments, WriterArguments, GenerationArguments)
"""Dataclasses of the options."""


def main() -> None:
    """Write answers, critiques, revisions, candidates and judgements; save both data sets and the manifest."""
    # ---- arguments ----
    groups = parse(*GROUPS, description=__doc__)
    args, writer_args, generation = groups
    if args.constitution is None:
        raise InputError("constitution: give a YAML file, such as recipes/constitutions/english.yaml")
    if "preferences" in args.parts and generation.temperature == 0:
        raise InputError("temperature: 0 gives two equal answers, and no preference; raise it or leave preferences out")
    if writer_args.generator_url and (generation.top_k or generation.min_new_tokens):
        raise InputError("top_k, min_new_tokens: an OpenAI-compatible endpoint knows neither; leave them out")
    check_layout("data")

    from rich.console import Console

    from yunque.artifacts import LOG, check_output_dir, prepare_output_dir, save_model_folder
    from yunque.distributed.checkpoint import StopSignal
    from yunque.models.adapter_folders import adapter_config
    from yunque.rl.constitution import read_constitution
    from yunque.rl.critique import ConstitutionalData, load_prompts, write_rows
    from yunque.rl.generators import open_models

    # ---- constitution and prompts ----
    console = Console(soft_wrap=True)
    folder = Path(args.output_dir)
    models = [name for name in (writer_args.model_name_or_path, writer_args.judge_model_name_or_path) if name]
    models += [adapter["base_model_name_or_path"] for name in models if (adapter := adapter_config(name))]
    # a finished run may be resumed too: that is how edited lines reach the data
    overwrite = args.overwrite_output_dir or args.resume
    check_output_dir(folder, overwrite=overwrite, resume=args.resume, inputs=models)
    constitution = read_constitution(args.constitution)
    prompts, source = load_prompts(args)
    console.print(
        f"{len(prompts):,} prompts of {source['name']}; {len(constitution.principles)} principles in "
        f"{len(constitution.levels)} priorities, {args.constitution} ({constitution.sha256[:12]})"
    )

    with StopSignal() as signal:
        # ---- models ----
        generator, judging = open_models(writer_args, generation, stopped=lambda: signal.noted)

        # ---- steps and output folder ----
        def log(line: dict[str, Any]) -> None:
            with (folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

        data = ConstitutionalData(args, generation, constitution, prompts, folder / "steps", log)
        prepare_output_dir(folder, overwrite=overwrite, resume=args.resume)
        if not args.resume:
            shutil.rmtree(folder / "steps", ignore_errors=True)
        (folder / LOG).touch()  # marks an unfinished run

        # ---- critiques, revisions, preferences ----
        metrics: dict[str, Any] = {"prompts": len(prompts), "constitution_sha256": constitution.sha256}
        rows: dict[str, list[dict[str, str]]] = {}
        if "revisions" in args.parts:
            rows["sft.jsonl"], counts = data.revisions(generator)
            metrics |= counts
        if "preferences" in args.parts:
            rows["preferences.jsonl"], counts = data.preferences(generator, judging)
            metrics |= counts

    # ---- save ----
    def write(staging: Path) -> None:
        for name, content in rows.items():
            if content:  # a file without rows would be refused by every reader
                write_rows(staging / name, content)
        shutil.copyfile(args.constitution, staging / "constitution.yaml")

    save_model_folder(
        folder,
        write,
        stage="constitutional",
        parents=list(dict.fromkeys([generator.source, judging.source])),
        data=[source],
        prompt_template=constitution.frames.answer,
        seed=args.seed,
        config={name: value for group in groups for name, value in asdict(group).items()},
        metrics=metrics,
    )
    if "revisions" in args.parts:
        console.print(
            f"revisions: {metrics['sft_rows']:,} rows, {metrics['share_revised']:.0%} of them differ from the first "
            f"answer; {metrics['sft_dropped']:,} prompts without one"
        )
    if "preferences" in args.parts:
        console.print(
            f"preferences: {metrics['pairs']:,} pairs; {metrics['abstained']:,} of {metrics['pairs_judged']:,} judged "
            f"abstained ({metrics['share_abstained']:.0%}), {metrics['pairs_equal']:,} equal, "
            f"{metrics['pairs_empty']:,} with an empty answer"
        )
    console.print(f"Data (sft.jsonl, preferences.jsonl) and steps to read and edit (steps/): {folder}")


if __name__ == "__main__":
    run(main)
