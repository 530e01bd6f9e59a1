"""Short supervised runs of tiny models under whatever profile starts this: what each rank held and computed.

    sharded.py FOLDER RESULTS CELL...

FOLDER holds the models; a cell is MODEL-METHOD, such as t5-full or llama-lora. Every rank writes RESULTS/RANK.json, and
the first the trained model as RESULTS/CELL.
"""

import json
import os
import sys
from pathlib import Path

import datasets
import tiny
import torch
from transformers import Seq2SeqTrainingArguments, set_seed

from yunque.data.targets import AnswerCollator
from yunque.distributed.accounting import Meter
from yunque.distributed.layouts import data_ranks
from yunque.distributed.saving import gathered_weights
from yunque.distributed.start import split_while_loading, start_run
from yunque.distributed.supervised import SupervisedArguments, claim_output_dir, fit, trainer_arguments
from yunque.models.arguments import ModelArguments, PromptTuningArguments
from yunque.models.loading import load_model, load_tokenizer, save_model

STEPS = 3
ROWS = 16
GLOBAL_BATCH = 4
LEARNING_RATE = float(os.environ.get("LEARNING_RATE", "1e-2"))
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}
METHODS = {"full": {}, "lora": LORA, "qlora": LORA | {"load_in_4bit": True}, "prompt": {}, "adapter": {}}


def rows(encoder_decoder):
    """Answers of different lengths: a mean over ranks is not the mean over their tokens."""
    numbers = torch.Generator().manual_seed(0)
    for row in range(ROWS):
        prompt = torch.randint(3, tiny.VOCABULARY, (4 + row % 5,), generator=numbers).tolist()
        answer = [*prompt[: 1 + row % 4], 1]
        if encoder_decoder:
            yield {"input_ids": prompt, "labels": answer}
        else:
            yield {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def trainer_of(model, tokenizer, args):
    """The trainer that recipes/finetune.py would take."""
    train_rows = datasets.Dataset.from_list(list(rows(model.config.is_encoder_decoder)))
    if model.config.is_encoder_decoder:
        from yunque.distributed.trainers import AnswerTrainer, label_loss

        return AnswerTrainer(
            model=model, args=trainer_arguments(args, Seq2SeqTrainingArguments), train_dataset=train_rows,
            data_collator=AnswerCollator(tokenizer, model), compute_loss_func=label_loss(0.0),
            processing_class=tokenizer,
        )  # fmt: skip
    from trl import SFTConfig

    from yunque.distributed.causal import PREPARED, ContinuationTrainer

    arguments = trainer_arguments(args, SFTConfig, **PREPARED)
    return ContinuationTrainer(model=model, args=arguments, train_dataset=train_rows, processing_class=tokenizer)


def train(cell, folder, results, ranks):
    """Losses and norms of gradients of a few steps; the trained model in a folder."""
    name, method = cell.split("-")
    args = SupervisedArguments(
        output_dir=str(results / f"run-{cell}"), max_steps=STEPS, logging_steps=1, learning_rate=LEARNING_RATE,
        save_steps=100, per_device_train_batch_size=GLOBAL_BATCH // ranks, report_to=[],
    )  # fmt: skip
    model_args = ModelArguments(model_name_or_path=str(folder / name), **METHODS[method])
    prompt = PromptTuningArguments(prompt_tuning_tokens=4 if method == "prompt" else None)
    start_run(args, [], "finetune", model_args, prompt)
    split_while_loading(args)
    tokenizer = load_tokenizer(model_args)
    set_seed(0)
    model = load_model(model_args, tokenizer, prompt)
    claim_output_dir(args)  # as recipes do: no rank writes before all have looked
    trainer = trainer_of(model, tokenizer, args)
    fit(trainer, args, {})
    weights = gathered_weights(trainer.accelerator, model, trainer.model_wrapped)
    if trainer.is_world_process_zero():
        save_model(model, tokenizer, results / cell, weights=weights)
    steps = [line for line in trainer.state.log_history if "loss" in line]
    return {"losses": [line["loss"] for line in steps], "norms": [line["grad_norm"] for line in steps]}


def main():
    folder, results, *cells = sys.argv[1:]
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    _, ranks = data_ranks(rank, int(os.environ["WORLD_SIZE"]))
    found = {}
    for cell in cells:
        with Meter() as meter:
            found[cell] = train(cell, Path(folder), Path(results), ranks)
        found[cell] |= meter.report()
    (Path(results) / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
