"""Preference pairs of tiny.tokenizer's words (the chosen answer repeats the prompt), and a signal in mid-training."""

import json
import os
import random
import signal


def pairs(rows, seed=0):
    """Rows of prompt, chosen and rejected, of different lengths."""
    numbers = random.Random(seed)
    made = []
    for _ in range(rows):
        prompt = [f"w{numbers.randrange(8, 40)}" for _ in range(numbers.randrange(2, 7))]
        other = [f"w{numbers.randrange(40, 60)}" for _ in range(numbers.randrange(1, 6))]
        made.append(
            {"prompt": " ".join(prompt), "chosen": " " + " ".join(prompt[:4]), "rejected": " " + " ".join(other)}
        )
    return made


def write_pairs(folder, train=24, test=9):
    """A data folder with a train and a test split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows, seed in (("train", train, 0), ("test", test, 1)):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in pairs(rows, seed)))
    return folder


def signalled_at(step, compute_loss):
    """A trainer's compute_loss whose process is sent SIGTERM in a step."""

    def compute(trainer, *args, **options):
        if trainer.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(trainer, *args, **options)

    return compute
