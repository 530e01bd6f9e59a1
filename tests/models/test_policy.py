import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from yunque.errors import InputError
from yunque.models.adapter import adapter_for
from yunque.models.policy import Policy, Reference

CPU = torch.device("cpu")
QUERIES, RESPONSES = [[3, 4, 5], [6, 7]], [[8, 9, 1], [10, 11]]


def with_lora(family):
    model = tiny.FAMILIES[family]()
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, task_type="SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"))


def move(model, names=("lora_B.default",)):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.add_(0.3)


@pytest.fixture(params=["t5", "llama"])
def family(request):
    return request.param


def test_reference_of_a_fresh_adapter_is_the_base(family):
    model = with_lora(family)
    policy = Policy(model, adapter_for(model, tiny.tokenizer())).eval()
    batch = policy.adapter.scoring_batch(QUERIES, RESPONSES, CPU)
    reference, base = Reference(policy), policy(batch).logprobs_BR
    move(model)
    assert not torch.allclose(policy(batch).logprobs_BR, base, atol=1e-2)
    torch.testing.assert_close(reference.score(batch).logprobs_BR, base)


def test_reference_of_a_trained_adapter_is_that_adapter_not_the_base(family):
    model = with_lora(family)
    batch_of = adapter_for(model, tiny.tokenizer()).scoring_batch
    policy = Policy(model, adapter_for(model, tiny.tokenizer())).eval()
    batch = batch_of(QUERIES, RESPONSES, CPU)
    base = policy(batch).logprobs_BR
    move(model)  # as if a fine-tuning run had trained it
    start = policy(batch).logprobs_BR
    reference = Reference(policy, adapter_is_trained=True)
    torch.testing.assert_close(reference.score(batch).logprobs_BR, start)
    move(model)
    torch.testing.assert_close(reference.score(batch).logprobs_BR, start)
    assert not torch.allclose(reference.score(batch).logprobs_BR, base, atol=1e-2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".default" in name for name in trained)


def test_reference_of_a_full_model_is_a_frozen_copy(family):
    model = tiny.FAMILIES[family]()
    policy = Policy(model, adapter_for(model, tiny.tokenizer())).eval()
    batch = policy.adapter.scoring_batch(QUERIES, RESPONSES, CPU)
    reference, start = Reference(policy), policy(batch).logprobs_BR
    move(model, names=("weight",))
    torch.testing.assert_close(reference.score(batch).logprobs_BR, start)
    with reference.model() as copy:
        assert not any(parameter.requires_grad for parameter in copy.parameters())


def test_values_come_from_the_state_before_each_token():
    model = tiny.llama()
    policy = Policy(model, adapter_for(model, tiny.tokenizer())).eval()
    scores = policy(policy.adapter.scoring_batch([[3, 4, 5]], [[8, 9, 1]], CPU))
    hidden = model(input_ids=torch.tensor([[3, 4, 5, 8, 9]]), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(scores.values_BR, policy.v_head.summary(hidden[:, 2:]).squeeze(-1), rtol=1e-4, atol=1e-5)


def test_a_reference_of_weights_that_are_split_and_sharded_is_refused(monkeypatch):
    layout = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}
    for name, value in layout.items():
        monkeypatch.setenv(name, value)
    model = tiny.llama()
    policy = Policy(model, adapter_for(model, tiny.tokenizer()))
    Reference(policy)  # under tp alone it can be had
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "2")
    with pytest.raises(InputError, match="launch profile fsdp2_tp: rl: the reference cannot be copied"):
        Reference(policy)
