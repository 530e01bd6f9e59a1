"""Short supervised runs of tiny models under whatever profile starts this; writes what one rank held and computed.

python tests/sharded.py FOLDER CELL...; a cell is FAMILY-METHOD, such as t5-full or llama-lora.
"""

import json
import os
import sys
from pathlib import Path

import datasets
import tiny
import torch
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainingArguments, set_seed

from yunque.distributed.accounting import Meter
from yunque.distributed.rehearsal import leave_fused_losses_alone
from yunque.distributed.saving import gathered_weights
from yunque.distributed.start import split_while_loading, start_run
from yunque.distributed.supervised import SupervisedArguments, fit, trainer_arguments
from yunque.models.arguments import ModelArguments, PromptTuningArguments
from yunque.models.loading import load_model, load_tokenizer, save_model

STEPS = 4
ROWS = 16
GLOBAL_BATCH = 4
METHODS = {
    "full": {},
    "lora": {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0},
    "qlora": {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "load_in_4bit": True},
    "prompt": {},
}


def rows(encoder_decoder):
    """Answers of different lengths, so that means over ranks are not the mean over tokens."""
    numbers = torch.Generator().manual_seed(0)
    for row in range(ROWS):
        prompt = torch.randint(3, tiny.VOCABULARY, (4 + row % 5,), generator=numbers).tolist()
        answer = [*prompt[: 1 + row % 4], 1]
        if encoder_decoder:
            yield {"input_ids": prompt, "labels": answer}
        else:
            yield {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def train(family, method, folder, ranks):
    """Loss trace of STEPS steps, and the trainer."""
    from yunque.distributed.causal import PREPARED, ContinuationTrainer
    from yunque.distributed.trainers import AnswerTrainer, label_loss

    args = SupervisedArguments(
        output_dir=str(folder / "out"), overwrite_output_dir=True, max_steps=STEPS, logging_steps=1,
        per_device_train_batch_size=GLOBAL_BATCH // ranks, learning_rate=1e-2, save_steps=100,
    )  # fmt: skip
    model_args = ModelArguments(model_name_or_path=str(folder / family), **METHODS[method])
    prompt = PromptTuningArguments(prompt_tuning_tokens=4 if method == "prompt" else None)
    start_run(args, [], "finetune", model_args, prompt)
    split_while_loading(args)
    tokenizer = load_tokenizer(model_args)
    set_seed(0)
    model = load_model(model_args, tokenizer, prompt)
    encoder_decoder = model.config.is_encoder_decoder
    train_rows = datasets.Dataset.from_list(list(rows(encoder_decoder)))
    if encoder_decoder:
        trainer = AnswerTrainer(
            model=model, args=trainer_arguments(args, Seq2SeqTrainingArguments), train_dataset=train_rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model), compute_loss_func=label_loss(0.0),
            processing_class=tokenizer,
        )  # fmt: skip
    else:
        from trl import SFTConfig

        arguments = trainer_arguments(args, SFTConfig, **PREPARED)
        trainer = ContinuationTrainer(model=model, args=arguments, train_dataset=train_rows, processing_class=tokenizer)
    fit(trainer, args)
    weights = gathered_weights(trainer.accelerator, model, trainer.model_wrapped)
    if trainer.is_world_process_zero():
        save_model(model, tokenizer, folder / f"{family}-{method}-{ranks}", weights=weights)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main():
    folder, *cells = sys.argv[1:]
    torch.set_num_threads(1)
    from yunque.distributed.layouts import data_ranks

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    _, ranks = data_ranks(rank, world)
    found = {}
    for cell in cells:
        with Meter() as meter:
            if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
                leave_fused_losses_alone()
            try:
                losses = train(*cell.split("-"), Path(folder), ranks)
            except Exception as error:  # noqa: BLE001
                import traceback
                traceback.print_exc()
                found[cell] = {"error": f"{type(error).__name__}: {error}"[:300]}
                print("FAILED", cell, flush=True)
                continue
        found[cell] = meter.report() | {"losses": losses}
        if rank == 0:
            print(cell, {k: v for k, v in found[cell].items()}, flush=True)
    (Path(folder) / f"{world}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
