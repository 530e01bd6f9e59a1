"""Arguments of distillation (the teacher, the student, the losses) and of pruning."""

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


@dataclass
class PruningArguments:
    """What is cut, how much of it, and by what measure.

    Heads, FFN neurons and layers make the model really smaller. Masks (``weight_sparsity``, ``semi_structured``) only
    set weights to zero: bytes and speed stay, unless hardware or a format makes use of zeros.

    Raises:
        InputError: shares out of range, nothing to prune, both kinds of mask.
    """

    head_sparsity: float = field(default=0.0, metadata={"help": "Share of attention heads (key-value groups) cut."})
    ffn_sparsity: float = field(default=0.0, metadata={"help": "Share of feed-forward neurons cut."})
    ffn_multiple_of: int = field(default=8, metadata={"help": "Keep so many neurons or multiples: kernels like it."})
    drop_layers: int = field(
        default=0, metadata={"help": "Layers cut from every stack: those that change states least."}
    )
    weight_sparsity: float = field(default=0.0, metadata={"help": "Mask: share of each row's weights set to zero."})
    semi_structured: bool = field(default=False, metadata={"help": "Mask: 2 of 4 neighbouring weights set to zero."})
    importance: Literal["magnitude", "activation", "taylor"] = field(
        default="taylor",
        metadata={"help": "Weights' norm; Wanda's score of weights and inputs; gradient times weight of the loss."},
    )
    prune_iterations: int = field(default=1, metadata={"help": "Rounds of heads and neurons, importance anew in each."})
    calibration_samples: int = field(default=128, metadata={"help": "Train rows that importance is measured on."})
    calibration_batch_size: int = field(default=16, metadata={"help": "Rows per forward pass."})
    max_target_length: int = field(default=128, metadata={"help": "Cut their answers to this many tokens."})
    output_dir: str = field(default="outputs/pruned", metadata={"help": "Folder for the pruned model."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a former run in output_dir."})
    resume: bool = field(
        default=False, metadata={"help": "Start again after a stop: nothing had been written, all is made anew."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of phrasings, where the prompts have several."})

    @property
    def needs_data(self) -> bool:
        """Whether importance is measured on data."""
        units = self.head_sparsity or self.ffn_sparsity or self.weight_sparsity or self.semi_structured
        return bool(self.drop_layers or (units and self.importance != "magnitude"))

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("head_sparsity", "ffn_sparsity", "weight_sparsity"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is not a share in [0, 1)")
        for name in ("ffn_multiple_of", "prune_iterations", "calibration_samples", "calibration_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is too small; give 1 or more")
        if self.drop_layers < 0:
            raise InputError(f"drop_layers: {self.drop_layers} is negative")
        if self.weight_sparsity and self.semi_structured:
            raise InputError("semi_structured: sets half of the weights to zero by itself; leave weight_sparsity out")
        wanted = (self.head_sparsity, self.ffn_sparsity, self.drop_layers, self.weight_sparsity, self.semi_structured)
        if not any(wanted):
            raise InputError("ffn_sparsity: nothing to prune; give ffn_sparsity, head_sparsity, drop_layers or a mask")
        if (self.weight_sparsity or self.semi_structured) and self.importance == "taylor":
            raise InputError("importance: masks go by magnitude or activation (Wanda); give one of them")
