"""Yunque: from fine-tuning through alignment to a compressed model in production."""

__version__ = "0.1.0"
