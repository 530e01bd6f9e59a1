import warnings

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from yunque.compat.trl011 import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
)


@pytest.fixture(autouse=True)
def without_the_switch(monkeypatch):
    monkeypatch.delenv("YUNQUE_TRL011_STRICT", raising=False)


def _lora(model, *, trained):
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.05, task_type=task))
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.3)
    return model


def _wrap(family, *, lora=None, **options):
    """A tiny model with value head; lora="fresh" or "trained" (as a fine-tuning run leaves it)."""
    model = tiny.FAMILIES[family](**options)
    if lora:
        model = _lora(model, trained=lora == "trained")
    encoder_decoder = model.config.is_encoder_decoder
    wrapper = AutoModelForSeq2SeqLMWithValueHead if encoder_decoder else AutoModelForCausalLMWithValueHead
    torch.manual_seed(0)
    return wrapper.from_pretrained(model, is_trainable=True) if lora else wrapper.from_pretrained(model)


def _trainer(model, *, cls=PPOTrainer, ref_model=None, tokenizer=None, arguments=None, **options):
    settings = {"batch_size": 4, "mini_batch_size": 2, "learning_rate": 1e-2, "ppo_epochs": 2} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # there is no dataset
        return cls(
            config=PPOConfig(**settings),
            model=model,
            ref_model=ref_model,
            tokenizer=tokenizer or tiny.tokenizer(),
            **(arguments or {}),
        )


@pytest.fixture
def wrap():
    """Builds a wrapped tiny model: wrap(family, lora=)."""
    return _wrap


@pytest.fixture
def trainer_of():
    """Builds a trainer: trainer_of(wrapped model, ref_model=, arguments={of PPOTrainer}, **options of PPOConfig)."""
    return _trainer


@pytest.fixture
def batch_of():
    """Queries, responses (after ``start``) and scores of 4 samples, as step takes them."""

    def build(start=()):
        queries = [[3, 9, 14, 20, 1], [5, 6, 7, 1], [22, 4, 1], [10, 13, 19, 1]]
        responses = [[7, 15, 4, 1], [11, 9, 1], [3, 17, 22, 6, 8, 1], [16, 5]]
        scores = [torch.tensor(score) for score in (1.5, -0.7, 0.2, 2.1)]
        return [torch.tensor(row) for row in queries], [torch.tensor([*start, *row]) for row in responses], scores

    return build
