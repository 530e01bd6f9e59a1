"""Rotary embeddings of every kind, over all the positions that they are made for."""

import numpy as np
import pytest
import tiny
import torch

from yunque.errors import InputError
from yunque.export.folder import write_folder
from yunque.export.source import load_source
from yunque.models.positions import position_limit
from yunque.runtime import load

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 32, "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip

KINDS = {  # parameters, max_position_embeddings, positions of the export
    "default": ({"rope_type": "default"}, 64, 64),
    "yarn": (YARN, 32, 128),  # as Qwen2.5's card says
    "yarn, already raised": (YARN, 128, 128),
    "yarn, original left out": ({"rope_type": "yarn", "factor": 2.0}, 32, 64),
    "linear": ({"rope_type": "linear", "factor": 2.5}, 32, 80),
    "llama3": (LLAMA3, 128, 128),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, 32, 32),
    "longrope": ({**LONG, "short_factor": [1.0, 1.5] * 2, "long_factor": [2.0, 4.0] * 2}, 64, 32),
}


@pytest.mark.parametrize("heads", [8, 16])  # rotated by elementary operators, and by the attention kernel
@pytest.mark.parametrize("kind", KINDS)
def test_logits_at_all_positions_are_transformers(tmp_path, kind, heads):
    parameters, original, expected = KINDS[kind]
    parameters = {"rope_theta": 100.0, **parameters}
    if "short_factor" in parameters:
        parameters |= {name: parameters[name] * (heads // 8) for name in ("short_factor", "long_factor")}
    model = tiny.llama(rope_parameters=parameters, max_position_embeddings=original, head_dim=heads)
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    source = load_source(str(tmp_path / "model"), "main", False)
    (tmp_path / "onnx").mkdir()
    write_folder(source, tmp_path / "onnx")
    exported = load(tmp_path / "onnx", verify="none")
    assert exported.spec.max_positions == expected
    tokens = [3 + (7 * place) % 50 for place in range(expected)]
    with torch.no_grad():
        theirs = source.model(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(exported.logits([tokens])[0] - theirs).max() < 1e-4
    answer = exported.generate([tokens[: expected - 8]], max_new_tokens=20, eos_token_ids=())[0].tokens
    text = torch.tensor([tokens[: expected - 8]])
    written = source.model.generate(text, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert answer == written[0, -8:].tolist()
    with pytest.raises(InputError, match=f"{expected} positions"):
        exported.generate([tokens], max_new_tokens=1)


def test_training_reads_what_is_exported():
    for parameters, original, expected in KINDS.values():
        config = tiny.llama(
            rope_parameters={"rope_theta": 100.0, **parameters}, max_position_embeddings=original
        ).config
        assert position_limit(config) >= expected
    assert position_limit(tiny.t5().config) is None
    assert position_limit(tiny.gpt2().config) == 64
