"""Tiny model folders of every kind, rows to evaluate them on, and `yunque evaluate` in this process."""

from __future__ import annotations

import json
import random
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from evaluating import options
from warm import ON_CPU

NUM_ROWS = 23


@pytest.fixture(scope="session")
def kinds(tmp_path_factory):
    """Folders t5, llama, adapter (LoRA on t5), nf4, int8, onnx (of t5), virtual, onnx_llama, classifier,
    onnx_classifier; file rows."""
    root = tmp_path_factory.mktemp("kinds")
    from yunque.artifacts import save_model_folder
    from yunque.export.folder import write_folder
    from yunque.export.source import load_source

    tokenizer = tiny.tokenizer(("Sum:",), bos_token=None)
    for name, build in (("t5", tiny.t5), ("llama", tiny.llama), ("classifier", tiny.roberta)):
        build().save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    _save_adapters(root, tokenizer)
    _save_quantized(root, tokenizer)
    for name, source in (("onnx", "t5"), ("onnx_llama", "llama"), ("onnx_classifier", "classifier")):
        loaded = load_source(str(root / source), "main", False)
        save_model_folder(root / name, partial(write_folder, loaded), stage="onnx", parents=[str(root / source)])
    draw = random.Random(0)
    with (root / "rows.jsonl").open("w") as file:
        for number in range(NUM_ROWS):
            words = [f"w{draw.randrange(8, tiny.VOCABULARY)}" for _ in range(draw.randint(3, 20))]
            row = {"id": f"r{number}", "dialogue": " ".join(words), "summary": " ".join(words[:4])}
            file.write(json.dumps(row) + "\n")
    names = ("t5", "llama", "adapter", "virtual", "nf4", "int8", "onnx", "onnx_llama", "classifier", "onnx_classifier")
    return SimpleNamespace(**{name: root / name for name in names}, rows=root / "rows.jsonl")


def _save_adapters(root, tokenizer):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    base = AutoModelForSeq2SeqLM.from_pretrained(root / "t5")
    lora = get_peft_model(base, LoraConfig(r=4, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"]))
    with torch.no_grad():
        for name, weight in lora.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    lora.save_pretrained(root / "adapter")
    tokenizer.save_pretrained(root / "adapter")
    base = AutoModelForCausalLM.from_pretrained(root / "llama")
    virtual = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    virtual.save_pretrained(root / "virtual")
    tokenizer.save_pretrained(root / "virtual")


def _save_quantized(root, tokenizer):
    from transformers import AutoModelForSeq2SeqLM, BitsAndBytesConfig

    from yunque.models.arguments import ModelArguments
    from yunque.models.loading import load_base

    packed = load_base(str(root / "t5"), ModelArguments(load_in_4bit=True))  # with `wo`, which T5 keeps in float32
    packed.save_pretrained(root / "nf4")
    stock = AutoModelForSeq2SeqLM.from_pretrained(
        root / "t5", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    stock.save_pretrained(root / "int8")
    for name in ("nf4", "int8"):
        tokenizer.save_pretrained(root / name)


@pytest.fixture
def evaluate(monkeypatch, capsys, kinds, tmp_path):
    """Run `yunque evaluate FOLDER` in this process: evaluate("t5", temperature=[0.7]); code, output and the folder."""
    from accelerate.state import AcceleratorState, GradientState

    from yunque import cli

    for name, value in ON_CPU.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(folder, output_dir=tmp_path / "out", **given):
        chosen = {"dataset_name": kinds.rows, "prompt_template": "Sum: {text}", "max_new_tokens": 6} | given
        place = vars(kinds).get(folder, folder)
        argv = ["yunque", "evaluate", str(place), *options(**chosen, output_dir=output_dir)]
        monkeypatch.setattr(sys, "argv", argv)
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        output, errors = capsys.readouterr()
        return SimpleNamespace(code=left.value.code, output=output, errors=errors, folder=Path(output_dir))

    yield run
    torch.set_num_threads(threads)
