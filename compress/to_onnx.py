"""Export a model folder to an ONNX folder that runs without torch, and prove that it is the same model.

    python compress/to_onnx.py --model_name_or_path outputs/ppo_detox --output_dir outputs/onnx
    python compress/to_onnx.py --model_name_or_path google/flan-t5-base --output_dir out --parity_dataset rows.jsonl
    python compress/to_onnx.py --model_name_or_path outputs/ppo_detox --output_dir out --optimum_layout

Encoder-decoder models (T5, BART), decoder-only models (GPT-2, Llama, Mistral, Qwen2, Qwen3) and sequence classifiers
(BERT, RoBERTa, DistilBERT); LoRA adapters are merged first. The export fails, and leaves nothing behind, when a logit
differs from torch's by more than --parity_tolerance or a greedy choice differs.
"""

from __future__ import annotations

from yunque.arguments import parse
from yunque.errors import run
from yunque.export.arguments import ExportArguments

GROUPS = (ExportArguments,)
"""Dataclasses of the options."""


def main() -> None:
    """Export, prove, save."""
    (args,) = parse(*GROUPS, description=__doc__)

    from yunque.export.folder import export
    from yunque.export.parity import Parity

    manifest = export(args)
    print(Parity(**manifest.metrics["parity"]))
    total = sum(file["bytes"] for file in manifest.files.values())
    print(f"saved {args.output_dir}: {len(manifest.files)} files, {total:,} bytes")


if __name__ == "__main__":
    run(main)
