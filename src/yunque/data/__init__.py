"""Data: loading and naming columns, prompts, labels, the embedded corpus."""
