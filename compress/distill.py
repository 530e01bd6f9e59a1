"""Distil a teacher into a smaller student that keeps its task and its alignment.

    python compress/distill.py
    python compress/distill.py --config compress/configs/distill_flan_t5_base.yaml
    accelerate launch --config_file launch/ddp.yaml --num_processes 4 compress/distill.py --config ...

The student is made of the teacher's layers unless told otherwise; without arguments the embedded summariser is taught.
Ends with teacher and student on the test split. Stop it with Ctrl-C or SIGTERM and go on with --resume. What the losses
are and which to take: docs/distillation.md
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from yunque.arguments import parse
from yunque.compression.arguments import DistillationArguments, StudentArguments, TeacherArguments
from yunque.data.arguments import DataArguments, TemplateArguments
from yunque.distributed.supervised import SupervisedArguments
from yunque.errors import run

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "distill_embedded.yaml"

GROUPS = (
    SupervisedArguments,
    TeacherArguments,
    StudentArguments,
    DistillationArguments,
    DataArguments,
    TemplateArguments,
)
"""Dataclasses of the options."""


def main() -> None:
    """Distil, answer the test split with teacher and student, save the student's folder."""
    # ---- arguments ----
    groups = parse(*GROUPS, description=__doc__, default_config=DEFAULT_CONFIG)
    args, teacher_args, student_args, losses, data_args, template_args = groups

    from transformers import TrainingArguments

    from yunque.artifacts import save_model_folder
    from yunque.compression.distillation import DistillationTrainer, frozen
    from yunque.compression.students import make_student
    from yunque.compression.teacher_answers import TeacherAnswers
    from yunque.compression.teachers import load_teacher, use_embedded_teacher
    from yunque.data.mixtures import Encoding, Task, prepare_task, prompt_template_of
    from yunque.distributed.held_out import HeldOut, answer_rows, change, show_change
    from yunque.distributed.saving import gathered_weights
    from yunque.distributed.start import start_run
    from yunque.distributed.supervised import claim_output_dir, fit, remove_checkpoints, trainer_arguments
    from yunque.models.adapter import adapter_for
    from yunque.models.embedded import use_embedded
    from yunque.models.loading import save_model

    # ---- seed and logging ----
    use_embedded_teacher(teacher_args)
    use_embedded((data_args, "dataset_name"))
    names = [teacher_args.teacher_name_or_path, teacher_args.aligned_teacher_name_or_path]
    parents = [name for name in [*names, student_args.student_name_or_path] if name]
    console = start_run(args, parents, "distill")
    config = {name: value for group in groups for name, value in asdict(group).items()}

    # ---- models ----
    tokenizer, teacher = load_teacher(teacher_args, "teacher_name_or_path")
    aligned = None
    if teacher_args.aligned_teacher_name_or_path:
        _, aligned = load_teacher(teacher_args, "aligned_teacher_name_or_path", like=tokenizer)
    student = make_student(student_args, teacher, tokenizer, seed=args.seed)
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in (teacher, student.model)]
    console.print(f"teacher {sizes[0]:,} parameters, student {sizes[1]:,} ({sizes[1] / sizes[0]:.0%})")
    for path, layers in (student.origins or {}).items():
        console.print(f"{path}: the teacher's layers {', '.join(map(str, layers))}")

    # ---- data ----
    adapter = adapter_for(student.model, tokenizer)
    encoder_decoder = student.model.config.is_encoder_decoder
    longest = losses.max_new_tokens if encoder_decoder else max(losses.max_new_tokens, losses.max_target_length)
    encoding = Encoding(encoder_decoder, adapter.prompt_limit(longest), losses.max_target_length, adapter.eos_ids)
    task = Task("test", data_args, template_args)
    prepared = prepare_task(task, tokenizer, encoding, args.seed)
    console.print(prepared.report)

    # ---- trainer ----
    arguments = trainer_arguments(args, TrainingArguments)
    claim_output_dir(args)
    trainer = DistillationTrainer(
        student,
        teacher,
        arguments,
        losses=losses,
        adapter=adapter,
        tokenizer=tokenizer,
        train_dataset=prepared.train,
        aligned=aligned,
    )
    if losses.sequence_level:
        answers = TeacherAnswers(
            trainer.accelerator,
            adapter,
            Path(args.output_dir),
            batch_size=args.per_device_eval_batch_size,
            max_new_tokens=losses.max_target_length,
        )
        beams = losses.teacher_num_beams
        trainer.train_dataset = answers.relabel(prepared.train, trainer.teacher, tokenizer, num_beams=beams)

    # ---- train ----
    metrics, _ = fit(trainer, args, config)

    # ---- evaluate ----
    held_out = HeldOut(
        trainer.accelerator,
        adapter,
        tokenizer,
        batch_size=args.per_device_eval_batch_size,
        max_new_tokens=losses.max_new_tokens,
    )
    taught = held_out.scores(frozen(trainer.teacher), prepared.test)
    after = held_out.scores(trainer.model, prepared.test)
    weights = gathered_weights(trainer.accelerator, student.model, trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    report = change(taught, after, args.seed)
    metrics |= after.as_dict(args.seed) | {
        "teacher": taught.as_dict(args.seed),
        "change": report,
        "parameters": sizes[1],
        "teacher_parameters": sizes[0],
        "layers": student.origins,
    }

    # ---- save ----
    folder = Path(args.output_dir)

    def write(staging: Path) -> None:
        save_model(student.model, tokenizer, staging, weights=weights)
        with (staging / "predictions.jsonl").open("w", encoding="utf-8") as file:
            for row, other in zip(answer_rows(prepared.test, after), taught.predictions, strict=True):
                file.write(json.dumps({**row, "teacher": other}, ensure_ascii=False) + "\n")

    save_model_folder(
        folder,
        write,
        stage="distill",
        parents=parents,
        data=prepared.sources,
        prompt_template=prompt_template_of([task]),
        seed=args.seed,
        config=config,
        metrics=metrics,
    )
    remove_checkpoints(args)
    console.print(show_change("teacher -> student", report))
    console.print(f"Model and answers (predictions.jsonl): {folder}")


if __name__ == "__main__":
    run(main)
