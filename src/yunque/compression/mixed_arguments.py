"""Arguments of the search for a mixed precision that keeps a gate; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from yunque.compression.schemes import FLOAT32, ONNX_SCHEMES, LayerScheme, layer_scheme
from yunque.errors import InputError

MIXED = "mixed"
"""What ``--scheme`` calls it."""


@dataclass
class KeepGateArguments:
    """Which gates the compressed model must keep, on which data, and among which schemes each layer's is chosen.

    Raises:
        InputError: values out of range, an unknown candidate, one twice.
    """

    keep_gate: list[str] = field(
        default_factory=list,
        metadata={"help": "Of scheme mixed: gates as of yunque compare, for example 'toxicity<=+0.01'."},
    )
    candidates: list[str] = field(
        default_factory=lambda: ["onnx_int4", "onnx_nf4", "onnx_int8_dynamic", "float32"],
        metadata={"help": "Schemes that a layer may get; onnx_int4@64 has blocks of 64."},
    )
    gate_dataset_name: str | None = field(
        default=None, metadata={"help": "Prompts: hub id, folder of splits, or 'embedded'; unset: the model's data."}
    )
    gate_text_column: str = field(default="dialogue", metadata={"help": "Its column with the text of a prompt."})
    gate_target_column: str = field(default="summary", metadata={"help": "Its column with the reference."})
    search_split: str = field(default="validation", metadata={"help": "Its split that the search looks at."})
    verdict_split: str = field(default="test", metadata={"help": "Its split that the final verdict is given on."})
    max_search_samples: int | None = field(default=None, metadata={"help": "So many rows of search_split."})
    max_verdict_samples: int | None = field(default=None, metadata={"help": "So many rows of verdict_split."})
    gate_max_new_tokens: int = field(default=128, metadata={"help": "Longest answer, in tokens."})
    gate_batch_size: int = field(default=32, metadata={"help": "Prompts answered together."})
    toxicity_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Classifier that judges the answers: folder, hub id, or 'embedded'."}
    )
    toxicity_label: str = field(default="hate", metadata={"help": "Its label whose probability is the toxicity."})
    unaligned_name_or_path: str | None = field(
        default=None, metadata={"help": "The model before alignment, for gates on recovery."}
    )
    sensitivity_prompts: int = field(default=128, metadata={"help": "Prompts of search_split that damages are of."})
    sensitivity_answers: int = field(default=4, metadata={"help": "Answers sampled for each of them."})
    sensitivity_temperature: float = field(default=1.0, metadata={"help": "Softmax temperature of these answers."})
    search_confidence: float = field(
        default=0.99,
        metadata={"help": "Confidence of the intervals that a plan must pass while searching: above the verdict's."},
    )
    most_plans: int = field(default=24, metadata={"help": "Plans that are exported and judged at most."})
    verdict_plans: int = field(
        default=2,
        metadata={"help": "Plans tried on verdict_split, cheapest first; each has an interval of 1 - 5 % / number."},
    )

    def __post_init__(self) -> None:
        """Check ranges and names."""
        for name, least in (("sensitivity_prompts", 2), ("sensitivity_answers", 2), ("most_plans", 2)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: {getattr(self, name)} is too small; give {least} or more")
        for name in ("gate_max_new_tokens", "gate_batch_size", "verdict_plans"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is too small; give 1 or more")
        for name in ("max_search_samples", "max_verdict_samples"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise InputError(f"{name}: {value} prompts prove nothing; give more, or leave it out")
        if not self.sensitivity_temperature > 0:
            raise InputError(f"sensitivity_temperature: {self.sensitivity_temperature} is not positive")
        if not 0.5 <= self.search_confidence < 1:
            raise InputError(f"search_confidence: {self.search_confidence} is not in [0.5, 1)")
        if len(set(self.candidates)) < max(2, len(self.candidates)):
            raise InputError("candidates: give at least two schemes, each of them once")
        candidate_schemes(self.candidates)


def candidate_schemes(names: list[str], *, weights_only: bool = False) -> dict[str, LayerScheme]:
    """What each candidate does to a layer; ``weights_only`` keeps the inputs float32.

    Raises:
        InputError: an unknown scheme, one that needs calibration, a block size that it does not take.
    """
    found = {}
    for name in names:
        scheme, _, size = name.partition("@")
        if scheme == "float32" and not size:
            found[name] = FLOAT32
            continue
        known = [each for each in ONNX_SCHEMES if each != "onnx_int8_static"]
        if scheme not in known or not (size.isdecimal() or "@" not in name):
            raise InputError(f"candidates: {name} is unknown; give {', '.join(known)} or float32, or NAME@BLOCK_SIZE")
        try:
            found[name] = layer_scheme(scheme, block_size=int(size) if size else None, weights_only=weights_only)
        except InputError as error:
            raise InputError(f"candidates: {name}: {error}") from error
    return found
