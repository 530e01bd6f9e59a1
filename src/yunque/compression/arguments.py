"""Arguments of distillation: the teacher, the student, the losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from yunque.errors import InputError


@dataclass
class TeacherArguments:
    """The model to learn from, and the aligned one to stay close to where that is another."""

    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id, local folder (model or LoRA adapter, merged), or 'embedded'."}
    )
    aligned_teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "Model of the alignment term, where it is not the teacher."}
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Precision of the teachers, which are frozen and whole on every rank."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel of teachers and student, for example sdpa."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes from the hub."})
    pad_token: str | None = field(
        default=None, metadata={"help": "Token of the vocabulary to pad with, where the tokenizer names none."}
    )


@dataclass
class StudentArguments:
    """What the student is: layers of the teacher, a changed configuration with random weights, or a given model.

    Raises:
        InputError: two of these at once, no layer, a layer twice.
    """

    student_num_layers: int | None = field(
        default=None,
        metadata={
            "help": "Keep so many layers of every stack, evenly spread, first and last among them; default half."
        },
    )
    student_layers: list[int] | None = field(
        default=None, metadata={"help": "Keep these layers, from 0; of the encoder where there is one."}
    )
    student_decoder_layers: list[int] | None = field(
        default=None, metadata={"help": "Keep these layers of an encoder-decoder model's decoder."}
    )
    student_config_overrides: str | None = field(
        default=None,
        metadata={"help": "Random weights, the teacher's configuration changed, for example d_model=64,num_layers=2"},
    )
    student_name_or_path: str | None = field(
        default=None, metadata={"help": "A model of its own, with the teacher's vocabulary: hub id or local folder."}
    )

    def __post_init__(self) -> None:
        """Check that one way is chosen."""
        ways = {
            "student_num_layers": self.student_num_layers,
            "student_layers": self.student_layers or self.student_decoder_layers,
            "student_config_overrides": self.student_config_overrides,
            "student_name_or_path": self.student_name_or_path,
        }
        chosen = [name for name, value in ways.items() if value is not None]
        if len(chosen) > 1:
            raise InputError(f"{chosen[1]}: {chosen[0]} says already what the student is; leave one of them out")
        if self.student_num_layers is not None and self.student_num_layers < 1:
            raise InputError(f"student_num_layers: {self.student_num_layers} is too small; give 1 or more")
        for name in ("student_layers", "student_decoder_layers"):
            layers = getattr(self, name)
            if layers is not None and (not layers or len(set(layers)) < len(layers)):
                raise InputError(f"{name}: give at least one layer, each of them once")


@dataclass
class DistillationArguments:
    """The loss per answer token: soft_weight T^2 D_T + hard_weight CE + hidden_weight MSE + alignment_weight KL.

    D_T compares teacher and student at temperature T (Hinton et al. 2015, arXiv:1503.02531); KL is that of the student
    from the aligned teacher at temperature 1, on the student's own answers where ``on_policy_share`` gives some.

    Raises:
        InputError: weights that leave no loss, values out of range.
    """

    distill_temperature: float = field(default=2.0, metadata={"help": "Softmax temperature T of the soft targets."})
    soft_weight: float = field(default=0.5, metadata={"help": "Weight of the distillation loss (soft targets)."})
    hard_weight: float = field(default=0.5, metadata={"help": "Weight of the student loss (cross entropy to labels)."})
    hidden_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the mean squared difference of kept layers' states, equal widths only."},
    )
    alignment_weight: float = field(
        default=0.0, metadata={"help": "Weight of KL(student || aligned teacher) at temperature 1."}
    )
    divergence: Literal["forward", "reverse", "jsd"] = field(
        default="forward",
        metadata={"help": "D: KL(teacher || student), KL(student || teacher), or between them (GKD)."},
    )
    jsd_beta: float = field(
        default=0.5, metadata={"help": "With divergence jsd: near 0 as forward, near 1 as reverse."}
    )
    sequence_level: bool = field(
        default=False, metadata={"help": "Labels are the teacher's answers to the train prompts, not the references."}
    )
    teacher_num_beams: int = field(default=1, metadata={"help": "Beams of the teacher's answers; 1 is greedy."})
    on_policy_share: float = field(
        default=0.0,
        metadata={"help": "Share of batches whose answers the student samples; soft and alignment terms only."},
    )
    on_policy_temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of these answers."})
    max_target_length: int = field(default=128, metadata={"help": "Cut reference answers to this many tokens."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer of teacher and student, in tokens."})

    def __post_init__(self) -> None:
        """Check ranges, and that something is learnt from every batch."""
        for name in ("soft_weight", "hard_weight", "hidden_weight", "alignment_weight"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name}: {getattr(self, name)} is not a weight; give 0 or more")
        if self.soft_weight + self.hard_weight + self.hidden_weight + self.alignment_weight == 0:
            raise InputError("soft_weight: all weights are 0; there is nothing to learn")
        for name in ("distill_temperature", "on_policy_temperature"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}: {getattr(self, name)} is not positive")
        for name in ("jsd_beta", "on_policy_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: {getattr(self, name)} is not in [0, 1]")
        if self.on_policy_share and self.soft_weight + self.alignment_weight == 0:
            raise InputError("on_policy_share: the student's own answers have no labels; set soft_weight too")
        if self.teacher_num_beams < 1:
            raise InputError(f"teacher_num_beams: {self.teacher_num_beams} is too small; give 1 or more")
        for name in ("max_target_length", "max_new_tokens"):
            if getattr(self, name) < 2:
                raise InputError(f"{name}: {getattr(self, name)} leaves no answer; give 2 or more")
