"""Where the launch profile wants weights when they are loaded: tensor parallelism splits them as they are read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from yunque.errors import InputError


@dataclass(frozen=True)
class TensorParallel:
    """Ranks over which every matrix is split, and groups of such ranks over which the weights are sharded again."""

    ranks: int
    groups: int


def tensor_parallel() -> TensorParallel | None:
    """The tensor parallelism that ``accelerate launch`` was asked for; None without any."""
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") != "true":
        return None
    ranks, groups = (int(os.environ.get(f"PARALLELISM_CONFIG_{name}", "1")) for name in ("TP_SIZE", "DP_SHARD_SIZE"))
    return TensorParallel(ranks, groups) if ranks > 1 else None


def is_split_while_read() -> bool:
    """Whether ``from_pretrained`` leaves each rank its part of the weights only: tensor parallelism, ZeRO-3."""
    if tensor_parallel() is not None:
        return True
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def loading_options(config: Any) -> dict[str, Any]:
    """Options for ``from_pretrained``: each rank then reads its part of the weights only.

    Raises:
        InputError: the architecture has no plan for it, or heads that do not divide by the ranks.
    """
    layout = tensor_parallel()
    if layout is None:
        return {}
    if not config.base_model_tp_plan:
        raise InputError(
            f"launch profile: transformers has no tensor-parallel plan for {config.model_type}; take fsdp2 or zero3"
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        if (heads := getattr(config, name, None)) and heads % layout.ranks:
            raise InputError(
                f"launch profile: {name} = {heads} does not divide over {layout.ranks} tensor-parallel ranks; "
                "change --parallelism_config_tp_size"
            )
    from transformers.distributed import DistributedConfig

    # With FSDP beside it, weights are gathered in the type they compute in, as accelerate's FSDP2 does.
    mixed = layout.groups > 1 and os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    return {
        "distributed_config": DistributedConfig(
            tp_size=layout.ranks, fsdp_size=layout.groups, fsdp_mixed_precision=mixed
        )
    }


def check_adapter(model: Any) -> None:
    """Check that tensor parallelism carries a LoRA adapter: PEFT's fails on matrices that are split by their inputs.

    Raises:
        InputError: it has one on such a matrix, or weights are sharded over groups besides, which it does not know.
    """
    layout = tensor_parallel()
    if layout is not None and layout.groups > 1 and hasattr(model, "peft_config"):
        raise InputError(
            "use_peft: PEFT's LoRA does not carry weights that are split and sharded too; take fsdp2 or tp"
        )
    split = {name.split(".")[-2] for name, layer in model.named_modules() if _split_by_inputs(layer)}
    if split:
        raise InputError(
            f"lora_target_modules: {', '.join(sorted(split))} are split by their inputs under tensor parallelism, "
            "which PEFT's LoRA does not carry; leave them out, or take fsdp2"
        )


def _split_by_inputs(layer: Any) -> bool:
    return vars(layer).get("_hf_tp_plan") == "rowwise"


def share_embedding(model: Any) -> None:
    """Let stacks that share the embedding's weight (T5's) share its module too, where FSDP2 is to split it.

    FSDP2 groups modules: of two with one weight it would refuse the second.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return
    embedding = model.get_input_embeddings()
    for parent in model.modules():
        for name, layer in parent.named_children():
            if type(layer) is type(embedding) and layer.weight is embedding.weight:
                setattr(parent, name, embedding)


def freeze_unused_embedding(model: Any) -> None:
    """Let an embedding not train that neither stack takes: BART's shared one, where it is not tied.

    DDP waits for the gradient of everything that trains.
    """
    if model.config.is_encoder_decoder:
        embedding, stacks = model.get_input_embeddings(), (model.get_encoder(), model.get_decoder())
        if all(stack.get_input_embeddings().weight is not embedding.weight for stack in stacks):
            embedding.requires_grad_(False)


@contextmanager
def weights_left_whole(model: Any) -> Iterator[None]:
    """While entered, models are read whole, whatever the launch profile, and ``model`` is saved without gathering it.

    For the one rank that writes the model folder, which would wait for the others in vain; or, where it is not the
    first (of several that may build the embedded default), would write none.
    """
    from transformers.integrations import deepspeed

    config, named = getattr(model.config, "distributed_config", None), deepspeed._hf_deepspeed_config_weak_ref
    fsdp = os.environ.pop("ACCELERATE_USE_FSDP", None)
    deepspeed.unset_hf_deepspeed_config()
    if config is not None:
        del model.config.distributed_config  # of this run, not of the model
    model.should_save_on_this_rank = lambda is_main_process: True
    try:
        yield
    finally:
        del model.should_save_on_this_rank
        deepspeed._hf_deepspeed_config_weak_ref = named
        if fsdp is not None:
            os.environ["ACCELERATE_USE_FSDP"] = fsdp
        if config is not None:
            model.config.distributed_config = config
