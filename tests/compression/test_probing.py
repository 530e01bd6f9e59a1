"""Estimators against exact expectations; passes against the model asked directly."""

import itertools

import numpy as np
import pytest
import tiny
import torch

from yunque.compression.probing import Probe, ProbeTexts, effective_share, expected_changes, first_order_changes
from yunque.errors import InputError
from yunque.models.adapter import adapter_for
from yunque.models.arguments import GenerationArguments
from yunque.rl.rollout import generate

CPU = torch.device("cpu")


def two_token_policies():
    """Probabilities of the sequences of two tokens of {0, 1} under two policies, and a reward of each sequence."""
    first, second = {"p": 0.3, "q": 0.45}, {"p": (0.8, 0.4), "q": (0.7, 0.55)}
    sequences = list(itertools.product((0, 1), repeat=2))
    found = {}
    for name in "pq":
        start = (1 - first[name], first[name])
        then = [(1 - chance, chance) for chance in second[name]]
        found[name] = np.array([start[a] * then[a][b] for a, b in sequences])
    return found["p"], found["q"], np.array([0.0, 1.0, 0.3, -2.0])


@pytest.mark.parametrize("num_answers", [2, 3])
def test_expected_change_is_unbiased(num_answers):
    """Over all ways to draw the answers, the estimate's mean is the change, although each uses the others' scores."""
    p, q, reward = two_token_policies()
    mean = 0.0
    for drawn in itertools.product(range(4), repeat=num_answers):
        numbers = np.array(drawn)[None]
        chance = p[numbers].prod()
        mean += chance * expected_changes(np.log(q / p)[numbers], reward[numbers])[0]
    assert mean == pytest.approx(q @ reward - p @ reward, abs=1e-12)
    assert abs(q @ reward - p @ reward) > 0.1


def test_the_first_order_is_the_limit_of_small_steps():
    p, q, reward = two_token_policies()
    pairs = np.array(list(itertools.product(range(4), repeat=2)))
    chances = p[pairs].prod(axis=1)
    for step in (1e-3, 1e-5):
        near = p + step * (q - p)
        ratios = np.log(near / p)[pairs]
        first = chances @ first_order_changes(ratios, reward[pairs])
        assert first / step == pytest.approx((q - p) @ reward, rel=2 * step)


def test_effective_share():
    assert effective_share(np.zeros((3, 2))) == pytest.approx(1)
    assert effective_share(np.log([[1.0, 1.0], [1e-9, 1e-9]])) == pytest.approx(0.5, abs=1e-6)
    assert effective_share(np.array([[-2000.0, -2000.0]])) == pytest.approx(1)


def probe_of(model, temperature=1.0):
    adapter = adapter_for(model, tiny.tokenizer())
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13], [20, 3]]

    def answers(number, temperature):
        options = GenerationArguments(temperature=temperature, max_new_tokens=5)
        found = generate(
            model, adapter, prompts, options, seed=0, samples=[10 * row + number for row in range(3)], device=CPU
        )
        return [response.tokens for response in found]

    sampled = list(zip(*(answers(number, temperature) for number in range(3)), strict=True))
    texts = ProbeTexts(prompts, [[4, 5, 1], [], [30, 31, 1]], answers(0, 0.0), sampled, temperature)
    return Probe(model, adapter, texts, CPU), lambda: answers(0, 0.0)


def direct(model, prompt, answer, temperature):
    """Log-probabilities [tokens, vocabulary] of an answer's tokens, one text at a time."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            start = torch.tensor([[model.config.decoder_start_token_id, *answer[:-1]]])
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=start).logits[0]
        else:
            logits = model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
    return (logits.double() / temperature).log_softmax(dim=-1)


@pytest.mark.parametrize(("name", "temperature"), [("t5", 0.7), ("gpt2", 1.0), ("bart", 1.0)])
def test_a_pass_says_what_the_model_says(name, temperature):
    model = tiny.FAMILIES[name]()
    probe, greedy_answers = probe_of(model, temperature)
    texts, first = probe.texts, probe.unchanged
    assert first.kept.all()
    assert np.abs(first.kl).max() == 0
    before = [[direct(model, p, a, temperature) for a in texts.sampled[row]] for row, p in enumerate(texts.prompts)]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    after = probe()
    now = greedy_answers()
    for row, prompt in enumerate(texts.prompts):
        divergences = []
        for number, answer in enumerate(texts.sampled[row]):
            theirs = direct(model, prompt, answer, temperature)
            chosen = theirs[range(len(answer)), list(answer)].sum().item()
            assert after.logprobs[row, number] == pytest.approx(chosen, abs=1e-4)
            ours = before[row][number]
            divergences.append((ours.exp() * (ours - theirs)).sum().item())
        assert after.kl[row] == pytest.approx(np.mean(divergences), abs=1e-4)
        assert after.kept[row] == (now[row] == texts.greedy[row])
        if texts.references[row]:
            reference = texts.references[row]
            nats = -direct(model, prompt, reference, 1.0)[range(len(reference)), reference].sum().item()
            assert after.nats[row] == pytest.approx(nats, abs=1e-4)
    assert after.kl.max() > 1e-3
    assert not np.allclose(after.logprobs, first.logprobs)


def test_too_few_answers_are_refused():
    with pytest.raises(InputError, match="2 answers"):
        ProbeTexts([[1]], [[]], [[1]], [[[1]]])
