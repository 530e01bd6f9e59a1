"""Sampling against the distributions that transformers' filters leave."""

import numpy as np
import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from yunque.runtime import sampling

DRAWS = 15_000


def wanted(logits, temperature, top_k, top_p):
    scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits)[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(dim=-1)[0].numpy()


@pytest.mark.parametrize("size", [40, 700])  # more than the head that top-p looks at first, and fewer
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.5, 0, 0.8), (1.2, 9, 0.6)]
)
def test_draws_follow_the_filtered_distribution(size, flat, temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=size).astype(np.float32) * (0.05 if flat else 2)
    expected = wanted(logits, temperature, top_k, top_p)
    rows = 500
    counts = np.zeros(size)
    for step in range(DRAWS // rows):
        uniforms = sampling.uniform(np.arange(rows, dtype=np.uint64), np.full(rows, step))
        full = [np.full(rows, value, dtype) for value, dtype in ((temperature, "f4"), (top_k, "i8"), (top_p, "f4"))]
        counts += np.bincount(sampling.sample(np.tile(logits, (rows, 1)), *full, uniforms), minlength=size)
    assert not counts[expected == 0].any()
    error = np.abs(counts / DRAWS - expected)
    assert (error <= 5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-9).all()


def test_rows_keep_their_own_settings():
    logits = np.tile(np.linspace(0, 3, 30, dtype=np.float32), (4, 1))
    top_k, top_p = np.array([1, 0, 3, 0]), np.array([1, 1e-6, 1, 1], np.float32)
    seen = [set() for _ in range(4)]
    for step in range(300):
        uniforms = sampling.uniform(np.zeros(4, np.uint64), np.full(4, step))
        for row, token in enumerate(sampling.sample(logits, np.ones(4, np.float32), top_k, top_p, uniforms)):
            seen[row].add(int(token))
    assert seen[0] == seen[1] == {29}
    assert seen[2] == {27, 28, 29}
    assert len(seen[3]) > 20


def test_uniform_numbers_are_even_and_independent():
    seeds, steps = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200))
    numbers = sampling.uniform(seeds.ravel(), steps.ravel()).reshape(200, 200)
    counts = np.bincount((numbers * 50).astype(int).ravel(), minlength=50)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert ((counts - 800) ** 2 / 800).sum() < 100  # chi-square with 49 degrees of freedom
    for first, second in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02
    assert len(np.unique(numbers)) == numbers.size


def test_log_probabilities():
    logits = np.random.default_rng(1).normal(size=(3, 50)).astype(np.float32) * 20
    tokens = np.array([4, 0, 49])
    wanted = torch.from_numpy(logits).log_softmax(dim=-1)[torch.arange(3), tokens].numpy()
    np.testing.assert_allclose(sampling.log_probabilities(logits, tokens), wanted, rtol=1e-5, atol=1e-5)


def test_no_row_repeats_a_sequence_of_its_own_size():
    random = np.random.default_rng(2)
    context, lengths = random.integers(0, 4, size=(40, 30)), random.integers(1, 31, size=40)
    sizes = np.arange(40) % 5
    logits = random.normal(size=(40, 4)).astype(np.float32)
    wanted = logits.copy()
    for row, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
        if size:
            tokens, scores = torch.from_numpy(context[row, :length])[None], torch.from_numpy(logits[row].copy())[None]
            wanted[row] = NoRepeatNGramLogitsProcessor(int(size))(tokens, scores)[0]
    sampling.forbid_repeated_ngrams(logits, context, lengths, sizes)
    np.testing.assert_array_equal(logits, wanted)
    assert 0 < np.isinf(logits).sum() < logits.size
