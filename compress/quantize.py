"""Quantize a model: nf4 or int8 for transformers, int8, 4 bits or nf4 for ONNX Runtime.

    python compress/quantize.py
    python compress/quantize.py --model_name_or_path outputs/ppo_detox --scheme onnx_int8_dynamic --output_dir out
    python compress/quantize.py --model_name_or_path outputs/ppo_detox --scheme onnx_int8_static --output_dir out \
        --calibration_dataset embedded --calibration_method percentile

Schemes: bnb_nf4 and bnb_int8 write a torch folder; onnx_int8_dynamic, onnx_int8_static, onnx_int8_weights, onnx_int4
and onnx_nf4 an ONNX folder, straight from the float model. LoRA adapters are merged first. What each is for, and what
the report says: docs/quantization.md
"""

from __future__ import annotations

from pathlib import Path

from yunque.arguments import parse
from yunque.compression.quantization_arguments import QuantizationArguments
from yunque.errors import run

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "quantize_embedded.yaml"


def main() -> None:
    """Quantize, measure, save."""
    (args,) = parse(QuantizationArguments, description=__doc__, default_config=DEFAULT_CONFIG)

    from yunque.export.quantizing import quantize, summary
    from yunque.models.embedded import EMBEDDED, ensure_embedded, use_embedded
    from yunque.models.loading import adapter_config

    use_embedded((args, "model_name_or_path"))
    for name in ("calibration_dataset", "parity_dataset"):
        if getattr(args, name) == EMBEDDED:
            setattr(args, name, str(ensure_embedded().dataset))
    if adapter := adapter_config(str(args.model_name_or_path)):
        print(f"merging the adapter into {adapter['base_model_name_or_path']}")
    manifest = quantize(args)
    for line in summary(manifest.metrics):
        print(line)
    total = sum(file["bytes"] for file in manifest.files.values())
    print(f"saved {args.output_dir}: {len(manifest.files)} files, {total:,} bytes")


if __name__ == "__main__":
    run(main)
