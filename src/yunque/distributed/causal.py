"""TRL's SFTTrainer under the habits of our other supervised trainers."""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from trl import SFTTrainer

from yunque.distributed.trainers import LengthGrouping
from yunque.errors import InputError

PREPARED: dict[str, Any] = {
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "max_length": None,
    "gradient_checkpointing": False,
}
"""Arguments of SFTConfig for rows that are tokenized, labelled and cut already, and one whose default is not ours."""


class ContinuationTrainer(LengthGrouping, SFTTrainer):
    """SFTTrainer for rows of "input_ids" and "labels", whose batches may be grouped by length.

    Its loss is divided by the labels of all ranks and accumulated batches, and takes no logits of a whole batch.
    """

    def __init__(self, *, model: Any, **options: Any) -> None:
        head = model.get_output_embeddings()
        if isinstance(model, PeftModel) and isinstance(head, BaseTunerLayer):
            raise InputError(
                "lora_target_modules: TRL's fine-tuning computes its loss from the head's own weight and would not "
                "train an adapter on it; leave the head out"
            )
        trained = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of label smoothing, which it will drop in 2.0
            super().__init__(model=model, **options)
        # On nf4 weights it has made the adapter bfloat16: small updates would be lost, and the reloaded adapter, which
        # PEFT keeps in float32, would compute other logits.
        for name, weight in model.named_parameters():
            if name in trained:
                weight.data = trained[name].to(weight.device)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Write none: the Trainer's folder holds checkpoints only, which are removed."""
