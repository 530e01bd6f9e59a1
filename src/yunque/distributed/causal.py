"""TRL's SFTTrainer under the habits of our other supervised trainers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from trl import SFTTrainer

from yunque.distributed.trainers import LengthGrouping
from yunque.errors import InputError
from yunque.models.copying import eval_mode, whole_partitions

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

    eval_metrics = ("loss", "mean_token_accuracy", "entropy")

    def __init__(self, *, model: Any, **options: Any) -> None:
        head = model.get_output_embeddings()
        if isinstance(model, PeftModel) and isinstance(head, BaseTunerLayer):
            raise InputError(
                "lora_target_modules: fine-tuning computes its loss from the head's own weight and would not train "
                "an adapter on it; leave the head out"
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


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Check that a row packed behind another computes the same whatever stands in the other.

    Raises:
        InputError: it does not, or the model takes no packed rows.
    """
    device, size = next(model.parameters()).device, min(8, model.config.get_text_config(decoder=True).vocab_size - 1)
    row = torch.arange(size, device=device)
    positions = torch.cat([row, row]).unsqueeze(0)
    seen: list[torch.Tensor] = []
    try:
        with whole_partitions(model.parameters()), eval_mode(model):
            for first in (row, row.flip(0) + 1):
                packed = torch.cat([first, row]).unsqueeze(0)
                output = model(input_ids=packed, position_ids=positions, use_cache=False)
                seen.append(output.logits[:, size:].float().nan_to_num())
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        seen.clear()
    if not seen or not torch.allclose(seen[0], seen[1], rtol=1e-5, atol=1e-6):
        kind = model.config.model_type
        raise InputError(f"packing: {kind} does not keep rows of one sequence apart; leave packing out")
