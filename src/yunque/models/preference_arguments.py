"""Arguments of training on preference pairs, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from yunque.errors import InputError


@dataclass
class PairArguments:
    """How long prompts and answers may be, and whether dropout stays on.

    Raises:
        InputError: a length that leaves no text, a beta that is not positive.
    """

    beta: float = field(default=0.1, metadata={"help": "DPO: pull to the start model; ORPO: weight of the odds ratio."})
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Leave out pairs whose prompt has more tokens; unset, too long ones are errors."},
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={"help": "Cut answers to this many tokens; unset, to 256 or half of what a small model reads."},
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Train without dropout, so that policy and start model are compared as they are."},
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        if not self.beta > 0:
            raise InputError(f"beta: {self.beta} is not positive; 0.1 is usual")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise InputError(f"max_prompt_length: {self.max_prompt_length} leaves no prompt; give 1 or more")
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise InputError(f"max_completion_length: {self.max_completion_length} leaves no answer; give 1 or more")


@dataclass
class DPOArguments(PairArguments):
    """The loss of DPO and where the start model's log-probabilities come from.

    Raises:
        InputError: a smoothing outside [0, 0.5) or of a loss that has none, a negative weight, and as the base class.
    """

    loss_type: Literal["sigmoid", "hinge", "ipo"] = field(
        default="sigmoid", metadata={"help": "sigmoid: DPO; hinge: SLiC's margin; ipo: a squared margin per token."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of pairs thought to be labelled the wrong way round (sigmoid only)."}
    )
    sft_weight: float = field(
        default=0.0, metadata={"help": "Weight of the chosen answers' cross entropy beside the loss; 1 is RPO's."}
    )
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "Score all pairs with the start model once, and keep no copy of it."}
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(f"label_smoothing: {self.label_smoothing} is not a share in [0, 0.5)")
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise InputError(f"label_smoothing: loss_type {self.loss_type} has none; leave it out, or use sigmoid")
        if self.sft_weight < 0:
            raise InputError(f"sft_weight: {self.sft_weight} is negative; give 0 or more")
