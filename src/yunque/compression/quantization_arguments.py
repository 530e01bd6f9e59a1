"""Arguments of ``compress/quantize.py``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from yunque.compression.schemes import SCHEMES, TORCH_SCHEMES, LayerScheme, layer_scheme
from yunque.errors import InputError


@dataclass
class QuantizationArguments:
    """Which model becomes smaller by which scheme, and on which prompts that is calibrated and judged.

    Raises:
        InputError: a missing model, folder or scheme, an unknown one, options that the scheme has no use for.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or local folder: model, PEFT adapter, classifier, or 'embedded'."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes from the hub."})
    scheme: str | None = field(default=None, metadata={"help": f"One of {', '.join(SCHEMES)}."})
    plan: str | None = field(
        default=None, metadata={"help": "JSON file with a scheme for every layer, instead of one for all."}
    )
    skip_layers: str | None = field(
        default=None, metadata={"help": "Layers left in float32: a regular expression found in their names."}
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Inputs that share a scale: 16 to 256, of 4 bits, nf4 and int8 weights."}
    )
    activations: Literal["weights_only", "weights_and_activations"] = field(
        default="weights_and_activations",
        metadata={"help": "Whether inputs are int8 too, where the kernel can: faster, and less exact."},
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a finished folder."})
    resume: bool = field(
        default=False, metadata={"help": "Start again after a stop: nothing had been written, all is made anew."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of what is random."})

    # calibration
    calibration_dataset: str | None = field(
        default=None, metadata={"help": "Prompts: hub id, folder, file or 'embedded'; onnx_int8_static needs them."}
    )
    calibration_split: str = field(default="train", metadata={"help": "Its split, where it is a folder or hub id."})
    calibration_text_column: str | None = field(
        default=None, metadata={"help": "Its column with the text; unset: the one the model was trained on."}
    )
    calibration_samples: int = field(default=64, metadata={"help": "Number of prompts."})
    calibration_max_tokens: int | None = field(
        default=None, metadata={"help": "Longer prompts are left out, and counted; unset: what the model takes."}
    )
    calibration_new_tokens: int = field(
        default=32, metadata={"help": "Tokens of the model's own answer to each, which are calibrated on too."}
    )
    calibration_method: Literal["minmax", "entropy", "percentile"] = field(
        default="minmax", metadata={"help": "How a range comes from the values: all of them, least KL, all but a few."}
    )
    calibration_percentile: float = field(
        default=99.99, metadata={"help": "Per cent of the values that lie in the range, by method percentile."}
    )

    # proof
    parity_dataset: str | None = field(
        default=None,
        metadata={"help": "Prompts to compare on; unset: the model's own data, if it is there, else a few built in."},
    )
    parity_split: str = field(default="test", metadata={"help": "Its split, where it is a folder or hub id."})
    parity_text_column: str | None = field(
        default=None, metadata={"help": "Its column with the text; unset: the one the model was trained on."}
    )
    parity_prompts: int = field(default=16, metadata={"help": "Number of prompts."})
    parity_tokens: int = field(default=64, metadata={"help": "Tokens of the float model's answer to each."})

    def __post_init__(self) -> None:
        """Check what can be checked without the model."""
        for name in ("model_name_or_path", "output_dir"):
            if not getattr(self, name):
                raise InputError(f"{name}: is missing; give a {'model' if name.startswith('model') else 'folder'}")
        self._check_scheme()
        if self.skip_layers is not None:
            try:
                re.compile(self.skip_layers)
            except re.error as error:
                raise InputError(f"skip_layers: {self.skip_layers!r} is no regular expression: {error}") from error
        counts = ("calibration_samples", "calibration_new_tokens", "parity_prompts", "parity_tokens")
        for name in (*counts, *(["calibration_max_tokens"] if self.calibration_max_tokens is not None else [])):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is too small; give 1 or more")
        if not 50 < self.calibration_percentile <= 100:
            raise InputError(f"calibration_percentile: {self.calibration_percentile} is not in (50, 100]")

    def _check_scheme(self) -> None:
        if (self.scheme is None) == (self.plan is None):
            given = "is missing" if self.scheme is None else f"{self.scheme} and a plan are two answers"
            raise InputError(f"scheme: {given}; give one of {', '.join(SCHEMES)}, or a --plan")
        if self.scheme is not None and self.scheme not in SCHEMES:
            raise InputError(f"scheme: {self.scheme!r} is unknown; give one of {', '.join(SCHEMES)}")
        if self.block_size is not None and (self.scheme in (*TORCH_SCHEMES, None) or not self.default_layer.block_size):
            raise InputError(f"block_size: {self.scheme or 'a plan'} takes none; leave it out")
        if self.scheme == "onnx_int8_static" and self.activations != "weights_only" and not self.calibration_dataset:
            raise InputError("calibration_dataset: onnx_int8_static measures its ranges on prompts; give some")

    @property
    def default_layer(self) -> LayerScheme:
        """What ``scheme``, one that makes ONNX folders, does to a layer."""
        weights_only = self.activations == "weights_only"
        return layer_scheme(str(self.scheme), block_size=self.block_size, weights_only=weights_only)
