"""The exported tiny models."""

from exported import exported, prompts  # noqa: F401  # fixtures
