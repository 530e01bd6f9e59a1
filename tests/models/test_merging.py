import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from yunque.models.merging import merged_adapters

FAMILIES = {"t5": "SEQ_2_SEQ_LM", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}


def adapted(family, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=4, task_type=FAMILIES[family], init_lora_weights=False, **options)
    return get_peft_model(tiny.FAMILIES[family](), config).eval()


def logits(model, family):
    ids = torch.tensor([[3, 4, 5, 6]])
    extra = {"decoder_input_ids": ids} if family == "t5" else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


def state(model):
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    return weights, {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def calls_of_adapters(model):
    """Counts the adapter products a forward pass computes."""
    counts = []
    for name, layer in model.named_modules():
        if name.endswith("lora_A.default"):
            layer.register_forward_hook(lambda *_: counts.append(1))
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_weights_carry_the_adapter_and_come_back_bit_for_bit(family):
    model = adapted(family)
    expected, (weights, trains) = logits(model, family), state(model)
    counts = calls_of_adapters(model)
    with merged_adapters(model):
        torch.testing.assert_close(logits(model, family), expected, rtol=1e-4, atol=1e-5)
        assert not counts
    after, trains_after = state(model)
    assert trains_after == trains
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
    assert torch.equal(logits(model, family), expected)
    assert counts


def test_the_active_adapter_is_merged_not_the_trained_one():
    model = adapted("llama")
    torch.manual_seed(1)
    model.add_adapter("reference", LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    trained = logits(model, "llama")
    model.set_adapter("reference")
    expected = logits(model, "llama")
    with merged_adapters(model):
        torch.testing.assert_close(logits(model, "llama"), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits(model, "llama"), trained, atol=1e-2)


def test_a_switched_off_adapter_stays_off():
    model = adapted("t5")
    with model.disable_adapter():
        expected = logits(model, "t5")
        with merged_adapters(model):
            assert torch.equal(logits(model, "t5"), expected)


@pytest.mark.parametrize("case", ["half precision", "dora", "saved whole"])
def test_what_cannot_be_folded_exactly_is_left_alone(case):
    options = {"dora": {"use_dora": True}, "saved whole": {"modules_to_save": ["lm_head"]}}.get(case, {})
    model = adapted("llama", **options)
    if case == "half precision":
        model = model.bfloat16()
    expected, counts = logits(model, "llama"), calls_of_adapters(model)
    with merged_adapters(model):
        before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
        assert torch.equal(logits(model, "llama"), expected)
    assert before == {name: weight.data_ptr() for name, weight in model.named_parameters()}
    if case != "dora":  # whose layers apply the adapter's weights without a forward pass
        assert counts


def test_the_weights_come_back_after_an_error():
    model = adapted("gpt2")
    weights, _ = state(model)
    with pytest.raises(ZeroDivisionError), merged_adapters(model):
        1 / 0  # noqa: B018
    after, _ = state(model)
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())


def test_a_plain_model_passes_through():
    model = tiny.t5()
    with merged_adapters(model):
        assert model.training is False
