"""Two ranks train tiny models by every method under every profile in turn, metered; writes one JSON per rank.

memory_cells.py FOLDER: models lie there by family, and profiles.json with the variables accelerate launch would set.
"""

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from datasets import Dataset

ROWS = 4  # per device
PROMPT, ANSWER = 12, 6
LORA_R = 4


def load(folder, family, method):
    from yunque.models.arguments import ModelArguments
    from yunque.models.loading import load_model, load_tokenizer

    args = ModelArguments(model_name_or_path=f"{folder}/{family}", use_peft=method != "full", lora_r=LORA_R)
    tokenizer = load_tokenizer(args)
    return load_model(args, tokenizer), tokenizer


def supervised(folder, family, method, checkpointing):
    """Two steps of recipes/finetune.py's Trainers on rows of one length."""
    from yunque.distributed.start import split_while_loading
    from yunque.distributed.supervised import SupervisedArguments, trainer_arguments

    args = SupervisedArguments(
        output_dir=tempfile.mkdtemp(), max_steps=2, per_device_train_batch_size=ROWS,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    split_while_loading(args)
    model, tokenizer = load(folder, family, method)
    count = 4 * ROWS
    prompt, answer = [5 + index for index in range(PROMPT)], [9 + index for index in range(ANSWER)]
    if model.config.is_encoder_decoder:
        from transformers import Seq2SeqTrainingArguments

        from yunque.data.targets import AnswerCollator
        from yunque.distributed.trainers import AnswerTrainer, label_loss

        trainer = AnswerTrainer(
            model=model, args=trainer_arguments(args, Seq2SeqTrainingArguments, save_strategy="no"),
            train_dataset=Dataset.from_dict({"input_ids": [prompt] * count, "labels": [answer] * count}),
            data_collator=AnswerCollator(tokenizer, model), compute_loss_func=label_loss(0.0),
            processing_class=tokenizer,
        )  # fmt: skip
    else:
        from trl import SFTConfig

        from yunque.distributed.causal import PREPARED, ContinuationTrainer

        ids, labels = [*prompt, *answer], [-100] * PROMPT + answer
        trainer = ContinuationTrainer(
            model=model, args=trainer_arguments(args, SFTConfig, save_strategy="no", **PREPARED),
            train_dataset=Dataset.from_dict({"input_ids": [ids] * count, "labels": [labels] * count}),
            processing_class=tokenizer,
        )  # fmt: skip
    trainer.train()


def ppo(folder, family, method, checkpointing):
    """One PPO step of given responses."""
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    from yunque.models.adapter import adapter_for
    from yunque.models.policy import Policy, Reference
    from yunque.rl.config import PPOConfig
    from yunque.rl.trainer import PPOTrainer

    accelerator = Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))
    rows = ROWS * accelerator.num_processes
    config = PPOConfig(batch_size=rows, mini_batch_size=rows, gradient_checkpointing=checkpointing)
    model, tokenizer = load(folder, family, method)
    policy = Policy(model, adapter_for(model, tokenizer))
    trainer = PPOTrainer(config, policy, Reference(policy), accelerator, seed=0, total_steps=1)
    queries, responses = [list(range(5, 5 + PROMPT))] * rows, [list(range(9, 9 + ANSWER))] * rows
    trainer.step(queries, responses, [float(row) for row in range(rows)])


def measure(folder, cell):
    from yunque.distributed.accounting import Meter
    from yunque.models import start_check

    start_check.plain_start = lambda *_: None  # what it sends before training is no part of the plan
    family, method, *checkpointing = cell.split("-")
    with Meter() as meter:
        (ppo if method == "ppo" else supervised)(folder, family, method, bool(checkpointing))
    return meter.report()


def enter(variables, known):
    """What a fresh process under that profile would find."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from yunque.distributed.rehearsal import stand_in_for_gpus

    for name in known:
        os.environ.pop(name, None)
    os.environ.update(variables)
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    stand_in_for_gpus()


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    profiles = json.loads((folder / "profiles.json").read_text())
    known = {name for variables, _ in profiles.values() for name in variables}
    found = {}
    for profile, (variables, cells) in profiles.items():
        for cell in cells:
            enter(variables, known)
            try:
                found[f"{profile}-{cell}"] = measure(folder, cell)
            except Exception as error:  # one cell that fails must not hide the others
                traceback.print_exc()
                found[f"{profile}-{cell}"] = {"error": f"{type(error).__name__}: {error}"[:300]}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
