"""Quantize a model: nf4 or int8 for transformers, int8, 4 bits or nf4 for ONNX Runtime.

    python compress/quantize.py
    python compress/quantize.py --model_name_or_path outputs/ppo_detox --scheme onnx_int8_dynamic --output_dir out
    python compress/quantize.py --model_name_or_path outputs/ppo_detox --scheme onnx_int8_static --output_dir out \
        --calibration_dataset embedded --calibration_method percentile
    python compress/quantize.py --model_name_or_path outputs/ppo_detox --scheme mixed --output_dir out \
        --toxicity_model_name_or_path embedded --keep_gate "toxicity<=+0.01" "rougeL>=-1.0"

Schemes: bnb_nf4 and bnb_int8 write a torch folder; onnx_int8_dynamic, onnx_int8_static, onnx_int8_weights, onnx_int4
and onnx_nf4 an ONNX folder, straight from the float model. LoRA adapters are merged first. What each is for, and what
the report says: docs/quantization.md. Scheme mixed searches the cheapest scheme of every layer with which the gates of
--keep_gate pass, and proves it: docs/sensitivity.md
"""

from __future__ import annotations

from pathlib import Path

from yunque.arguments import parse
from yunque.compression.mixed_arguments import MIXED, KeepGateArguments
from yunque.compression.quantization_arguments import QuantizationArguments
from yunque.errors import InputError, run

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "quantize_embedded.yaml"

GROUPS = (QuantizationArguments, KeepGateArguments)
"""Dataclasses of the options."""


def main() -> None:
    """Quantize, measure, save."""
    args, gate_args = parse(*GROUPS, description=__doc__, default_config=DEFAULT_CONFIG, repeatable=("keep_gate",))
    if gate_args.keep_gate and args.scheme != MIXED:
        raise InputError(f"keep_gate: is for scheme {MIXED}; gate the result of another with yunque compare")

    from yunque.export.quantizing import quantize, summary
    from yunque.export.source import float_model
    from yunque.models.adapter_folders import adapter_config
    from yunque.models.embedded import EMBEDDED, ensure_embedded, use_embedded

    use_embedded((args, "model_name_or_path"))
    for name in ("calibration_dataset", "parity_dataset"):
        if getattr(args, name) == EMBEDDED:
            setattr(args, name, str(ensure_embedded().dataset))
    given, args.model_name_or_path = args.model_name_or_path, float_model(str(args.model_name_or_path))
    if given != args.model_name_or_path:
        print(f"{given} is an ONNX folder; quantizing {args.model_name_or_path}, which it was made from")
    if adapter := adapter_config(str(args.model_name_or_path)):
        print(f"merging the adapter into {adapter['base_model_name_or_path']}")
    if args.scheme == MIXED:
        from yunque.evaluation.keep_gate import keep_gate

        manifest = keep_gate(args, gate_args)
    else:
        manifest = quantize(args)
        for line in summary(manifest.metrics):
            print(line)
    total = sum(file["bytes"] for file in manifest.files.values())
    print(f"saved {args.output_dir}: {len(manifest.files)} files, {total:,} bytes")


if __name__ == "__main__":
    run(main)
