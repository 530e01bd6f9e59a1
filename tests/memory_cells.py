"""Short training runs of every method and family on as many ranks as start it, metered; writes one JSON per rank."""

import json
import os
import sys
import tempfile
from pathlib import Path

import tiny
import torch
from datasets import Dataset

from yunque.distributed.accounting import Meter

METHODS = ("full", "lora", "ppo")
ROWS = 4  # per device
PROMPT, ANSWER = 12, 6


def build(family, method):
    from yunque.models.arguments import ModelArguments
    from yunque.models.loading import add_lora

    torch.manual_seed(0)
    model = tiny.FAMILIES[family]().train()
    return model if method == "full" else add_lora(model, ModelArguments(use_peft=True, lora_r=4))


def supervised(model, *, gradient_checkpointing=False):
    """Two steps of recipes/finetune.py's Trainers on rows of one length."""
    from yunque.distributed.supervised import SupervisedArguments, trainer_arguments

    args = SupervisedArguments(
        output_dir=tempfile.mkdtemp(), max_steps=2, mixed_precision="bf16", per_device_train_batch_size=ROWS,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    count = 2 * ROWS * int(os.environ.get("WORLD_SIZE", "1"))
    prompt, answer = [5 + index for index in range(PROMPT)], [9 + index for index in range(ANSWER)]
    if model.config.is_encoder_decoder:
        from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainingArguments

        from yunque.distributed.trainers import AnswerTrainer, label_loss

        tokenizer = tiny.tokenizer()
        trainer = AnswerTrainer(
            model=model, args=trainer_arguments(args, Seq2SeqTrainingArguments, save_strategy="no"),
            train_dataset=Dataset.from_dict({"input_ids": [prompt] * count, "labels": [answer] * count}),
            data_collator=DataCollatorForSeq2Seq(tokenizer, model), compute_loss_func=label_loss(0.0),
            processing_class=tokenizer,
        )  # fmt: skip
    else:
        from trl import SFTConfig

        from yunque.distributed.causal import PREPARED, ContinuationTrainer

        ids, labels = [*prompt, *answer], [-100] * PROMPT + answer
        trainer = ContinuationTrainer(
            model=model, args=trainer_arguments(args, SFTConfig, save_strategy="no", **PREPARED),
            train_dataset=Dataset.from_dict({"input_ids": [ids] * count, "labels": [labels] * count}),
            processing_class=tiny.tokenizer(),
        )  # fmt: skip
    trainer.train()


def ppo(model, *, gradient_checkpointing=False):
    """One PPO step of given responses."""
    from accelerate import Accelerator

    from yunque.models.adapter import adapter_for
    from yunque.models.policy import Policy, Reference
    from yunque.rl.config import PPOConfig
    from yunque.rl.trainer import PPOTrainer

    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "1"
    accelerator = Accelerator()
    if accelerator.state.deepspeed_plugin:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = ROWS
    rows = ROWS * accelerator.num_processes
    config = PPOConfig(batch_size=rows, mini_batch_size=rows, gradient_checkpointing=gradient_checkpointing)
    policy = Policy(model, adapter_for(model.config, tiny.tokenizer()))
    trainer = PPOTrainer(config, policy, Reference(policy), accelerator, seed=0, total_steps=1)
    queries, responses = [list(range(5, 5 + PROMPT))] * rows, [list(range(9, 9 + ANSWER))] * rows
    trainer.step(queries, responses, [float(row) for row in range(rows)])


def measure(family, method, **options):
    from accelerate.state import AcceleratorState, GradientState

    with Meter() as meter:
        (ppo if method == "ppo" else supervised)(build(family, method), **options)
    AcceleratorState._reset_state()  # the next cell fills in DeepSpeed's "auto" anew
    GradientState._reset_state()
    return meter.report()


def stand_in():
    os.environ |= {
        "ACCELERATE_BYPASS_DEVICE_MAP": "true", "ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "false",
        "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo",
    }
    from accelerate import DistributedType, PartialState

    PartialState._prepare_backend = lambda *args, **options: ("gloo", DistributedType.MULTI_GPU)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        DeepSpeedZeroConfig.model_fields["param_persistence_threshold"].default = 0
        DeepSpeedZeroConfig.model_rebuild(force=True)
    return PartialState()


if __name__ == "__main__":
    torch.set_num_threads(1)
    state = stand_in()
    cells = sys.argv[2:] or [f"{family}-{method}" for family in ("t5", "llama") for method in METHODS]
    found = {}
    for cell in cells:
        family, method, *checkpointed = cell.split("-")
        try:
            found[cell] = measure(family, method, gradient_checkpointing=bool(checkpointed))
        except Exception as error:
            import traceback; traceback.print_exc(); print(cell, error)
    Path(sys.argv[1], f"rank{state.process_index}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
