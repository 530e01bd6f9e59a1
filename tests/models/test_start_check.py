"""The start check: the same model passes, and whatever changes its logits ends the run in one line that names it."""

from __future__ import annotations

import pytest
import tiny
import torch
from accelerate import Accelerator
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from yunque.errors import CheckFailed
from yunque.models import start_check
from yunque.models.start_check import check_start, plain_start


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def untied(family):
    model = tiny.FAMILIES[family](**({} if family == "t5" else {"tie_word_embeddings": False}))
    if family == "t5":
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


def check(start, model, accelerator, sign=1):
    return check_start(start, model, accelerator, lambda inputs: sign * model(**inputs).logits)


@pytest.mark.parametrize("make", [untied, lambda family: tiny.FAMILIES[family]()], ids=["untied", "tied"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_that_is_the_same_passes(family, make, accelerator):
    model = make(family)
    assert check(start_check._measured(model), model, accelerator) < 1e-6


def test_rounding_passes(accelerator):
    model = untied("llama")
    start = start_check._measured(model)
    assert 1e-4 < check(start, model.bfloat16(), accelerator) < start_check.TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_head_that_has_become_the_embedding_is_named(family, accelerator):
    model = untied(family)
    start = start_check._measured(model)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    with pytest.raises(CheckFailed, match=r"^launch profile: the model computes other logits .*lm_head\.weight$"):
        check(start, model, accelerator)


def test_a_weight_that_was_drawn_anew_is_named(accelerator):
    model = tiny.llama()
    start = start_check._measured(model)
    torch.nn.init.normal_(model.model.layers[1].mlp.up_proj.weight, std=0.3)
    with pytest.raises(CheckFailed, match=r"other weights are model\.layers\.1\.mlp\.up_proj\.weight$"):
        check(start, model, accelerator)


def test_a_forward_pass_that_uses_the_same_weights_otherwise_is_told_apart(accelerator):
    model = tiny.gpt2()
    with pytest.raises(CheckFailed, match="its weights are the same, their use is not"):
        check(start_check._measured(model), model, accelerator, sign=-1)
    with pytest.raises(CheckFailed, match="nan"):
        check(start_check._measured(model), model, accelerator, sign=float("nan"))


def test_a_classifier_is_checked_with_its_head(accelerator):
    model = tiny.roberta()
    start = start_check._measured(model)
    assert check(start, model, accelerator) < 1e-6
    torch.nn.init.normal_(model.classifier.out_proj.weight, std=0.3)
    with pytest.raises(CheckFailed, match=r"classifier\.out_proj\.weight"):
        check(start, model, accelerator)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_checked_as_a_classifier_too(family, accelerator):
    config = tiny.FAMILIES[family]().config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert check(start_check._measured(model), model, accelerator) < 1e-6


def test_virtual_tokens_that_are_drawn_do_not_count(accelerator):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    first, second = (get_peft_model(tiny.llama(), config) for _ in range(2))
    assert check(start_check._measured(first), second, accelerator) < 1e-6


def test_a_plain_process_has_nothing_to_compare_with(accelerator):
    assert plain_start(tiny.llama(), accelerator) is None
