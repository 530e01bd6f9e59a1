"""Arguments of ``compress/to_onnx.py``."""

from __future__ import annotations

from dataclasses import dataclass, field

from yunque.errors import InputError


@dataclass
class ExportArguments:
    """Which model to export, where to, and on which prompts to prove that the result is the same model.

    Raises:
        InputError: a missing model or folder, a number of prompts or tokens below 1.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or local folder: model, PEFT adapter, classifier, or 'embedded'."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes from the hub."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a finished folder."})
    resume: bool = field(
        default=False, metadata={"help": "Start again after a stop: nothing had been written, all is made anew."}
    )
    optimum_layout: bool = field(
        default=False, metadata={"help": "Write the files that optimum-onnx loads, instead of our runtime's."}
    )
    parity_dataset: str | None = field(
        default=None,
        metadata={"help": "Prompts of the proof: hub id, folder or file; unset: the model's own data, if it is there."},
    )
    parity_split: str = field(default="test", metadata={"help": "Its split, where it is a folder or hub id."})
    parity_text_column: str | None = field(
        default=None, metadata={"help": "Its column with the text; unset: the one the model was trained on."}
    )
    parity_prompts: int = field(default=16, metadata={"help": "Number of prompts of the proof."})
    parity_tokens: int = field(default=64, metadata={"help": "Greedy tokens compared for each prompt."})
    parity_tolerance: float = field(
        default=1e-3, metadata={"help": "Largest difference of a logit that passes, over the size of torch's logits."}
    )

    def __post_init__(self) -> None:
        """Check what every export needs."""
        for name in ("model_name_or_path", "output_dir"):
            if not getattr(self, name):
                raise InputError(f"{name}: is missing; give a {'model' if name.startswith('model') else 'folder'}")
        for name in ("parity_prompts", "parity_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} proves nothing; give 1 or more")
        if not self.parity_tolerance > 0:
            raise InputError(f"parity_tolerance: {self.parity_tolerance} is not above 0")
