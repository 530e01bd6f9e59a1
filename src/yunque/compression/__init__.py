"""Smaller models that stay aligned: distillation, pruning, quantization and what they cost."""
