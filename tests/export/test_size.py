"""Bytes on the disk and in memory of a model large enough for its weights to be most of both."""

import subprocess
import sys

import tiny
import torch
from transformers import T5Config, T5ForConditionalGeneration

from yunque.export.arguments import ExportArguments
from yunque.export.folder import export

LOADED_BYTES = """
import os, sys
from pathlib import Path
from yunque.runtime import load

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

small = load(sys.argv[2], threads=1)  # what the libraries take whatever the model: 10 MB
before = resident()
model = load(sys.argv[1], threads=1)
print(resident() - before)
model.generate([[5, 6, 7]], max_new_tokens=4)
"""


def test_folder_and_process_hold_the_weights_once(tmp_path, exported):
    source, folder = tmp_path / "model", tmp_path / "onnx"
    config = T5Config(vocab_size=4000, d_model=256, d_kv=32, d_ff=1024, num_layers=5, num_heads=8, **tiny.SPECIAL)
    config.decoder_start_token_id = 0
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(source)
    tiny.tokenizer(size=4000).save_pretrained(source)
    export(ExportArguments(model_name_or_path=str(source), output_dir=str(folder), parity_prompts=2, parity_tokens=4))
    weights = (source / "model.safetensors").stat().st_size
    assert weights > 40e6
    tokenizer = ("tokenizer.json", "tokenizer_config.json")
    written = sum(path.stat().st_size for path in folder.iterdir() if path.name not in tokenizer)
    assert written <= 1.02 * weights
    command = [sys.executable, "-c", LOADED_BYTES, str(folder), str(exported("t5").folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 1.3 * weights
