"""Opening what an evaluation asks for answers."""

from __future__ import annotations

import torch

from yunque.evaluation.generators import Generator, TorchGenerator
from yunque.evaluation.onnx_generator import OnnxGenerator
from yunque.models.arguments import ModelArguments
from yunque.models.inference import load_for_inference
from yunque.runtime.spec import is_onnx


def load_generator(args: ModelArguments, device: torch.device) -> Generator:
    """Load the model folder ``args.model_name_or_path`` of whatever kind.

    Raises:
        InputError: as ``load_for_inference``; an ONNX folder that the runtime cannot read.
    """
    if is_onnx(str(args.model_name_or_path)):
        return OnnxGenerator(args)
    return TorchGenerator(load_for_inference(args), str(args.model_name_or_path), device)
