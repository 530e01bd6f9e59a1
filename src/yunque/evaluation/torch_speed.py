"""The torch side of ``yunque.runtime.speed``: a torch folder of any kind, measured in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch

from yunque.errors import run
from yunque.evaluation.loading import load_generator
from yunque.evaluation.settings import Setting
from yunque.models.arguments import GenerationArguments, ModelArguments
from yunque.runtime.speed import Answer, measure, peak_memory_bytes, read_request


def main() -> None:
    """Measure the folder that the standard input names."""
    request, given = read_request()
    torch.set_num_threads(request.threads)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None

    def load() -> Answer:
        generator = load_generator(ModelArguments(**given["model"]), device or torch.device("cpu"))

        def answer(prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
            options = GenerationArguments(temperature=0.0, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
            generator.answers(prompts, Setting(options, 1, None, None), seed=0, samples=range(len(prompts)))

        return answer

    on_gpu = device is not None and device.type == "cuda"
    peak = torch.cuda.max_memory_allocated if on_gpu else peak_memory_bytes
    sys.stdout.write(json.dumps(measure(request, load, peak)) + "\n")


if __name__ == "__main__":
    run(main)
