"""TRL 0.11's trainers: change ``from trl import ...`` to ``from yunque.compat.trl011 import ...``.

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
from yunque.compat.trl011.trainers import (
    DPOConfig,
    DPOTrainer,
    ORPOConfig,
    ORPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "DPOConfig",
    "DPOTrainer",
    "LengthSampler",
    "ORPOConfig",
    "ORPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "PreTrainedModelWrapper",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "create_reference_model",
    "set_seed",
]
