"""Twins of modules, here with weights that are whole anyway; sharded ones are in tests/rl/test_sharded.py."""

import os

import pytest
import tiny
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers.integrations import is_deepspeed_zero3_enabled

from yunque.distributed.gathering import Twin, compute_dtype, is_sharded
from yunque.models.copying import copy_module, read_whole, skeleton

IDS = torch.tensor([[3, 4, 5, 1]])


def devices(module):
    return {parameter.device.type for parameter in module.parameters()}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, decoder_input_ids=IDS).logits


@pytest.fixture
def twin_and_source():
    source = tiny.t5()
    return Twin(source, Accelerator(cpu=True)), source


def test_a_twin_has_weights_inside_its_context_only(twin_and_source):
    twin, source = twin_and_source
    assert devices(twin.twin) == {"meta"}
    with twin.gathered() as whole:
        assert torch.equal(logits(whole), logits(source))
        with twin.gathered() as again:  # and does not lose them at the end of the inner one
            assert again is whole
        assert torch.equal(logits(whole), logits(source))
    assert devices(twin.twin) == {"meta"}


def test_a_twin_follows_its_source(twin_and_source):
    twin, source = twin_and_source
    with torch.no_grad():
        source.shared.weight.add_(1.0)
    with twin.gathered() as whole:
        assert torch.equal(whole.shared.weight, source.shared.weight)


def test_what_a_twin_of_tied_weights_keeps_is_tied_and_its_own(twin_and_source):
    twin, source = twin_and_source
    expected = logits(source)
    kept = twin.kept(on_this_rank=True)
    with torch.no_grad():
        source.shared.weight.zero_()
    assert kept.lm_head.weight is kept.shared.weight
    assert torch.equal(logits(kept), expected)


def test_a_rank_that_does_not_save_keeps_nothing(twin_and_source):
    twin, _ = twin_and_source
    assert devices(twin.kept(on_this_rank=False)) == {"meta"}


def test_a_skeleton_copies_no_weight_and_an_adapter_s_state():
    model = get_peft_model(tiny.llama(), LoraConfig(r=4, task_type="CAUSAL_LM"))
    copy = skeleton(model)
    assert devices(copy) == {"meta"}
    assert [name for name, _ in copy.named_parameters()] == [name for name, _ in model.named_parameters()]
    with copy.disable_adapter():  # of the copy alone
        assert not model.base_model.model.model.layers[0].self_attn.q_proj.disable_adapters


def test_a_copy_has_weights_of_its_own():
    source = tiny.t5()
    copy = copy_module(source)
    with torch.no_grad():
        source.shared.weight.zero_()
    assert copy.shared.weight.any()


def test_one_process_is_not_sharded():
    accelerator = Accelerator(cpu=True)
    assert not is_sharded(tiny.t5(), accelerator)
    assert compute_dtype(accelerator) is None


def test_models_that_no_engine_wraps_are_read_whole_under_an_engine(monkeypatch):
    from transformers.integrations import deepspeed

    class Engine:
        def is_zero3(self):
            return True

    engine = Engine()
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: engine)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert is_deepspeed_zero3_enabled()
    with read_whole():
        assert not is_deepspeed_zero3_enabled()
        assert "ACCELERATE_USE_FSDP" not in os.environ
    assert is_deepspeed_zero3_enabled()
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
