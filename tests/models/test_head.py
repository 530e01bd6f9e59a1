"""Chunked log-probabilities against those of whole logits, forward and backward."""

import pytest
import tiny
import torch
from torch import nn

from yunque.models import head as head_module
from yunque.models.adapter import adapter_for
from yunque.models.head import HeadWeights, head_scores
from yunque.models.policy import Policy, has_plain_head

N, D, V = 13, 6, 40
CPU = torch.device("cpu")


@pytest.fixture(params=[1, 3 * V, 10**6], ids=["chunks of 1", "chunks of 3", "one chunk"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(head_module, "_CHUNK_ELEMENTS", {"cpu": request.param})


def inputs(*, bias, trains):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, requires_grad=True)
    weight = (3 * torch.randn(V, D, generator=generator)).requires_grad_(trains)
    bias_V = torch.randn(V, generator=generator).requires_grad_(trains) if bias else None
    return hidden, HeadWeights(weight, bias_V), torch.randint(0, V, (N,), generator=generator)


def plain(hidden, head, targets, temperature):
    logits = nn.functional.linear(hidden, *head) / (temperature or 1.0)
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), entropy


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_scores_and_gradients_are_those_of_whole_logits(bias, trains, temperature):
    upstream = torch.linspace(-1, 2, N)
    results = []
    for scores in (head_scores, plain):
        hidden, head, targets = inputs(bias=bias, trains=trains)
        logprobs, entropy = scores(hidden, head, targets, temperature)
        (logprobs * upstream).sum().backward()
        results.append([logprobs, entropy, *(part.grad for part in (hidden, *head) if part is not None)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_agree_with_finite_differences():
    hidden, head, targets = inputs(bias=True, trains=True)
    wide = [part.detach().double().requires_grad_() for part in (hidden, *head)]

    def logprobs(hidden, weight, bias):
        return head_scores(hidden.float(), HeadWeights(weight.float(), bias.float()), targets, 1.0)[0].double()

    assert torch.autograd.gradcheck(logprobs, wide, eps=1e-2, atol=2e-2, rtol=2e-2)


def test_the_entropy_has_no_gradient_and_costs_nothing_without_one():
    hidden, head, targets = inputs(bias=False, trains=False)
    assert not head_scores(hidden, head, targets, 1.0)[1].requires_grad
    with torch.no_grad():
        assert not head_scores(hidden, head, targets, 1.0)[1].any()


def test_nothing_vocabulary_sized_waits_for_the_backward_pass():
    hidden, head, targets = inputs(bias=False, trains=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        head_scores(hidden, head, targets, 1.0)
    assert kept == [(N, D)]


def test_extreme_logits_stay_finite():
    hidden = torch.full((2, D), 1e3)
    head = HeadWeights(torch.stack([torch.full((D,), 1.0), torch.full((D,), -1.0)]), None)
    logprobs, _ = head_scores(hidden, head, torch.tensor([0, 1]), 1.0)
    assert logprobs[0] == 0.0
    assert torch.isfinite(logprobs).all()


def test_autocast_computes_in_its_precision():
    hidden, head, targets = inputs(bias=True, trains=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, _ = head_scores(hidden, head, targets, 1.0)
    logprobs.sum().backward()
    expected, _ = plain(hidden, head, targets, 1.0)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, rtol=0.05, atol=0.2)
    assert hidden.grad.dtype == torch.float32
    assert not torch.equal(logprobs, expected)


# --- which heads may be taken over ---


class Capped(nn.Module):
    """A model that bends its logits after the head, as Gemma 2 does."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, **batch):
        output = self.inner(**batch)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_plain_heads_are_recognised(family):
    model = tiny.FAMILIES[family]()
    assert has_plain_head(model, adapter_for(model, tiny.tokenizer()))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_capped_logits_are_left_to_the_model(family):
    model = tiny.FAMILIES[family]()
    adapter = adapter_for(model, tiny.tokenizer())
    policy = Policy(Capped(model), adapter)
    assert not policy.plain_head
    batch = adapter.scoring_batch([[3, 4]], [[5, 6, 1]], CPU)
    expected = policy.model(**batch.inputs, use_cache=False).logits.log_softmax(-1)
    tokens = torch.tensor([5, 6, 1])
    torch.testing.assert_close(policy(batch).logprobs_BR[0], expected[0, -3:].gather(1, tokens[:, None]).squeeze(1))


def test_a_bias_that_bart_adds_after_its_head_is_noticed():
    model = tiny.bart()
    model.final_logits_bias += torch.linspace(-1, 1, model.final_logits_bias.shape[1])
    assert not has_plain_head(model, adapter_for(model, tiny.tokenizer()))


def test_the_head_is_its_own_again_after_scoring():
    model = tiny.llama()
    policy = Policy(model, adapter_for(model, tiny.tokenizer()))
    batch = policy.adapter.scoring_batch([[3, 4]], [[5, 6, 1]], CPU)
    policy(batch)
    assert "forward" not in vars(model.lm_head)
    assert model(**batch.inputs).logits.shape[-1] == tiny.VOCABULARY
