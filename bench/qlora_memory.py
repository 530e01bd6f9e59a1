"""Bytes of a model's weights as bfloat16 and as QLoRA trains them, on FLAN-T5 base's shape with random weights.

    OMP_NUM_THREADS=1 python bench/qlora_memory.py
    python bench/qlora_memory.py --lora-r 8 --layers 2      # a smaller shape, in seconds

Prints one JSON line for each variant: bytes by part, and the ratio to the same model in bfloat16. No network.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--layers", type=int, default=12, help="of the encoder, and of the decoder")
    return parser.parse_args()


def write_model(folder: Path, layers: int) -> None:
    """FLAN-T5 base: 768 wide, 12 heads of 64, gated feed-forward layers of 2048, an untied head of 32128."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=768, d_kv=64, d_ff=2048, num_layers=layers, num_heads=12, vocab_size=32128,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).to(torch.bfloat16)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() + 1)
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)


def part_of(name: str) -> str:
    if "lora_" in name:
        return "adapter"
    if name.endswith("shared.weight"):
        return "embedding"
    return "head" if "lm_head" in name else "layers"


def measure(folder: Path, lora_r: int, full_bytes: int, **options: bool) -> dict[str, object]:
    """Load as a recipe does, with a LoRA adapter on every q and v, and count."""
    from yunque.models.arguments import ModelArguments
    from yunque.models.loading import add_lora, load_base
    from yunque.models.quantized import parameter_bytes

    args = ModelArguments(
        model_name_or_path=str(folder), use_peft=True, lora_r=lora_r, lora_target_modules=["q", "v"], **options
    )
    model = add_lora(load_base(str(folder), args), args)
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parts[part_of(name)] = parts.get(part_of(name), 0) + parameter_bytes(parameter)
    total = sum(parts.values())
    return {"variant": options, "bytes": total, **parts, "ratio_to_bf16": round(total / full_bytes, 4)}


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, options.layers)
        from yunque.models.arguments import ModelArguments
        from yunque.models.loading import load_base
        from yunque.models.quantized import weight_bytes

        full = weight_bytes(load_base(name, ModelArguments(model_name_or_path=name, dtype="bfloat16")))
        print(json.dumps({"variant": "bf16, all weights", "bytes": full}))
        for variant in ({"load_in_4bit": True}, {"load_in_4bit": True, "quantize_head": True}):
            print(json.dumps(measure(folder, options.lora_r, full, **variant)))


if __name__ == "__main__":
    main()
