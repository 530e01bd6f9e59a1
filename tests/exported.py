"""Tiny models exported to ONNX folders, each when a test first asks for it."""

import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config, Qwen2Tokenizer, Qwen3Config

from yunque.compression.schemes import PrecisionPlan, layer_scheme
from yunque.export.arguments import ExportArguments
from yunque.export.folder import export, write_folder
from yunque.export.source import load_source
from yunque.runtime import load

MANY_WORDS = 40


def t5_gated():
    return tiny.t5(feed_forward_proj="gated-gelu", is_gated_act=True, dense_act_fn="gelu_new")


def t5_untied():
    model = tiny.t5(scale_decoder_outputs=False)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(64, 16, generator=torch.Generator().manual_seed(1)) * 0.3)
    model.config.tie_word_embeddings = False
    return model


def t5_deep_encoder():
    return tiny.t5(num_layers=3, num_decoder_layers=2)


def llama_grouped():
    """Heads of 16, which the fused rotary kernel takes, two queries to one key; the head is its own matrix."""
    return tiny.llama(num_key_value_heads=1, head_dim=16, tie_word_embeddings=False)


def llama_scaled():
    parameters = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    return tiny.llama(rope_parameters=parameters, max_position_embeddings=128, tie_word_embeddings=True)


def mistral():
    """Looks back 6 tokens."""
    config = MistralConfig(
        vocab_size=64, max_position_embeddings=128, sliding_window=6, num_key_value_heads=1, head_dim=16,
        **tiny.SMALL, **tiny.SPECIAL,
    )  # fmt: skip
    return tiny._build(AutoModelForCausalLM, config, {})


def qwen2():
    config = Qwen2Config(
        vocab_size=64, max_position_embeddings=128, num_key_value_heads=1, **tiny.SMALL, **tiny.SPECIAL
    )
    return _with_biases(tiny._build(AutoModelForCausalLM, config, {}))


def qwen3():
    config = Qwen3Config(
        vocab_size=64, max_position_embeddings=128, num_key_value_heads=1, head_dim=16, **tiny.SMALL, **tiny.SPECIAL
    )
    return _with_biases(tiny._build(AutoModelForCausalLM, config, {}))


def _with_biases(model):
    """Biases away from 0 and gains away from 1, so that a graph without them would show."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def bart_untied():
    """A tied one only ever repeats its start token; one with a head of its own and strong layers does not."""
    model = tiny.bart(tie_word_embeddings=False, scale_embedding=True)
    for layer in model.model.decoder.layers:
        layer.fc2.weight.data *= 3
    return model


GENERATORS = {
    "t5": tiny.t5, "t5_gated": t5_gated, "t5_untied": t5_untied, "t5_deep_encoder": t5_deep_encoder,
    "bart_untied": bart_untied, "gpt2": lambda: _with_biases(tiny.gpt2()),
    "llama": tiny.llama, "llama_grouped": llama_grouped, "llama_scaled": llama_scaled,
    "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3,
}  # fmt: skip
REPEATING = {"bart": lambda: _with_biases(tiny.bart())}
"""What says the same token for ever."""
CLASSIFIERS = {
    "roberta": lambda: _with_biases(tiny.roberta()),
    "bert": lambda: _with_biases(tiny.bert()),
    "distilbert": lambda: _with_biases(tiny.distilbert()),
}


def tokenizer(name):
    """The tiny tokenizer, or for Qwen, whose class transformers insists on, one of single characters."""
    if not name.startswith("qwen"):
        return tiny.tokenizer()
    tokens = ["<pad>", "</s>", "<unk>", "w", "Ġ", *"0123456789"]
    tokens += [chr(0x100 + index) for index in range(64 - len(tokens))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


@dataclass(frozen=True)
class Exported:
    """A tiny model, its folder and the ONNX folder made from it."""

    model: Any
    source: Path
    folder: Path
    manifest: Any

    @functools.cached_property
    def runtime(self):
        return load(self.folder, threads=1)

    def as_int8(self, folder):
        """The runtime of its graphs in int8, written to ``folder``."""
        plan = PrecisionPlan(layer_scheme("onnx_int8_dynamic"))
        write_folder(load_source(str(self.source), "main", False), folder, plan)
        return load(folder, threads=1, verify="none")


def sentence(rng, longest=12):
    return " ".join(f"w{rng.randrange(3, 64)}" for _ in range(rng.randrange(1, longest + 1)))


@pytest.fixture(scope="session")
def prompts():
    """Twelve prompts of 1 to 12 words."""
    rng = random.Random(0)
    return [sentence(rng) for _ in range(12)]


@pytest.fixture(scope="session")
def exported(tmp_path_factory, prompts):
    """A function from a name in GENERATORS or CLASSIFIERS to its ``Exported``."""
    root = tmp_path_factory.mktemp("exported")
    data = root / "prompts.jsonl"
    data.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts))

    @functools.cache
    def make(name):
        model, source, folder = (GENERATORS | REPEATING | CLASSIFIERS)[name](), root / name, root / f"{name}_onnx"
        model.save_pretrained(source)
        tokenizer(name).save_pretrained(source)
        manifest = export(
            ExportArguments(
                model_name_or_path=str(source),
                output_dir=str(folder),
                parity_dataset=str(data),
                parity_text_column="text",
                parity_prompts=6,
                parity_tokens=MANY_WORDS,
            )
        )
        return Exported(model, source, folder, manifest)

    return make
