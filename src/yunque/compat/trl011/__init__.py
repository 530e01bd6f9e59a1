"""TRL 0.11's PPO: change ``from trl import ...`` to ``from yunque.compat.trl011 import ...``.

``docs/from_trl.md`` lists what differs, and what ``PPOConfig(strict=True)`` brings back.
"""

from yunque.compat.trl011.config import PPOConfig
from yunque.compat.trl011.core import LengthSampler, set_seed
from yunque.compat.trl011.models import (
    SUPPORTED_ARCHITECTURES,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
    create_reference_model,
)
from yunque.compat.trl011.trainer import PPOTrainer

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "LengthSampler",
    "PPOConfig",
    "PPOTrainer",
    "PreTrainedModelWrapper",
    "create_reference_model",
    "set_seed",
]
