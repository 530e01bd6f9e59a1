"""DoLa against its definition, written once more in NumPy over whole forward passes."""

import numpy as np
import pytest
import tiny
import torch

from yunque.errors import InputError
from yunque.models.adapter import adapter_for
from yunque.models.arguments import GenerationArguments
from yunque.models.dola import DolaModel, candidate_layers, contrasted
from yunque.rl.rollout import generate

PROMPTS = [[9, 10, 11, 12], [30, 31], [5, 40, 41, 42, 43, 44]]


def log_softmax(logits):
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())


def divergence(p, q):
    """Jensen-Shannon divergence of two distributions."""
    middle = (p + q) / 2
    return sum(0.5 * (part * np.log(part / middle)).sum() for part in (p, q))


def expected_token(model, ids, candidates):
    """The likeliest token after ``ids`` by the paper, and the inner layer it was contrasted with."""
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_hidden_states=True)
        inner = [model.lm_head(output.hidden_states[layer][0, -1]).double().numpy() for layer in candidates]
    last = log_softmax(output.logits[0, -1].double().numpy())
    layers = [log_softmax(logits) for logits in inner]
    distances = [divergence(np.exp(last), np.exp(layer)) for layer in layers]
    farthest = int(np.argmax(distances))
    scores = np.where(np.exp(last) >= 0.1 * np.exp(last).max(), last - layers[farthest], -np.inf)
    return int(scores.argmax()), candidates[farthest]


@pytest.mark.parametrize("layers", ["low", "high"])
def test_greedy_dola_is_the_paper_s_in_a_padded_batch(layers):
    model = tiny.llama(num_hidden_layers=6)
    candidates = candidate_layers(6, layers, tied=False)
    assert candidates == {"low": [0, 2], "high": [3, 5]}[layers]
    adapter = adapter_for(model, tiny.tokenizer())
    options = GenerationArguments(temperature=0, max_new_tokens=8)
    common = {"seed": 0, "samples": range(3), "device": torch.device("cpu")}
    dola = DolaModel(model, layers, plain_head=True).eval()
    answers = generate(dola, adapter, PROMPTS, options, **common)
    chosen = set()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = list(prompt)
        for token in answer.tokens:
            wanted, layer = expected_token(model, ids, candidates)
            assert token == wanted
            chosen.add(layer)
            ids.append(token)
    assert len(chosen) > 1, "the layer is chosen anew for every token"
    plain = generate(model, adapter, PROMPTS, options, **common)
    assert [row.tokens for row in plain] != [row.tokens for row in answers]


def test_only_likely_tokens_are_contrasted():
    last = torch.tensor([[2.0, 1.9, -4.0]])
    inner = torch.tensor([[[2.0, 0.0, -9.0]]])
    scores = contrasted(last, inner)
    assert scores.argmax().item() == 1  # gained most, among the likely
    assert scores[0, 2] == -torch.inf  # gained more still, but is unlikely


def test_layers_follow_depth_and_tying():
    assert candidate_layers(32, "low", tied=False) == list(range(0, 16, 2))
    assert candidate_layers(32, "high", tied=True) == list(range(16, 32, 2))
    assert candidate_layers(80, "high", tied=False) == list(range(60, 80, 2))
    assert candidate_layers(12, "low", tied=True) == [2, 4]
    with pytest.raises(InputError, match="2 layers has no low ones"):
        candidate_layers(2, "low", tied=True)


def test_other_models_are_refused():
    with pytest.raises(InputError, match="t5 is an encoder-decoder"):
        DolaModel(tiny.t5(), "low", plain_head=True)
    with pytest.raises(InputError, match="not those of its head alone"):
        DolaModel(tiny.llama(), "low", plain_head=False)
