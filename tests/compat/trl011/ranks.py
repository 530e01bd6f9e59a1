"""A loop by TRL's interface on as many ranks as start it; writes what it reports and learns when run."""

import json
import os
import sys
from pathlib import Path

import tiny
import torch
from datasets import Dataset

from yunque.compat.trl011 import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOConfig
from yunque.compat.trl011 import PPOTrainer as Trainer

QUERIES = [[3, 9, 14, 20, 1], [5, 6, 7, 1], [22, 4, 1], [10, 13, 19, 1]]
RESPONSES = [[7, 15, 4, 1], [11, 9, 1], [3, 17, 22, 6, 8, 1], [16, 5]]
SCORES = [1.5, -0.7, 0.2, 2.1]
WRAPPER = {"t5": AutoModelForSeq2SeqLMWithValueHead, "gpt2": AutoModelForCausalLMWithValueHead}


def run(family, ranks):
    """Two steps; every rank gives its part of the batch, and batch sizes are those of one process."""
    torch.manual_seed(0)
    model = WRAPPER[family].from_pretrained(tiny.FAMILIES[family]())
    config = PPOConfig(
        batch_size=4 // ranks, mini_batch_size=2 // ranks, ppo_epochs=2, learning_rate=1e-2, use_score_scaling=True
    )
    dataset = Dataset.from_dict({"input_ids": QUERIES * 2, "query": ["q"] * 8}).with_format("torch")
    trainer = Trainer(
        config,
        model,
        None,
        tiny.tokenizer(),
        dataset,
        data_collator=lambda rows: {"input_ids": [r["input_ids"] for r in rows]},
    )
    assert trainer.accelerator.num_processes == ranks
    assert len(trainer.dataloader) == 2
    here = slice(trainer.accelerator.process_index * 4 // ranks, (trainer.accelerator.process_index + 1) * 4 // ranks)
    curve = []
    for _batch in trainer.dataloader:
        queries = [torch.tensor(row) for row in QUERIES[here]]
        answers = trainer.generate(queries, max_new_tokens=3, do_sample=False)
        assert len(answers) == 4 // ranks
        rewards = [torch.tensor(score) for score in SCORES[here]]
        stats = trainer.step(queries, [torch.tensor(row) for row in RESPONSES[here]], rewards)
        trainer.log_stats(stats, {"query": ["q"], "response": ["r"]}, rewards)
        scalars = {name: value for name, value in stats.items() if isinstance(value, float) and "time/" not in name}
        weights = sum(weight.double().abs().sum().item() for weight in model.parameters())
        curve.append(scalars | {"weights": weights, "coefficient": trainer.kl_ctl.value})
    return curve


if __name__ == "__main__":
    torch.set_num_threads(1)
    curves = {family: run(family, ranks=2) for family in WRAPPER}
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(curves))
