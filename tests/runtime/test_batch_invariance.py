"""What a text's neighbours must not change: not one bit of its logits."""

import random

import numpy as np
import pytest

from yunque.runtime import Batch, GenerationOptions, sampling

NEW = 24


def logits_by_request(model, ids, joins, monkeypatch):
    """Logits [steps, vocabulary] of every request, whose joins are lists of requests, one list per step."""
    seen = {}
    choose = Batch._choose

    def note(self, plan, logits, *more):
        for request, row in zip(plan.requests.tolist(), logits, strict=True):
            seen.setdefault(request, []).append(row.copy())
        return choose(self, plan, logits, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "_choose", note)
        batch, waiting = model.new_batch(), list(joins)
        while waiting or len(batch):
            if waiting and (group := waiting.pop(0)):
                options = [GenerationOptions(max_new_tokens=NEW - request % 5, eos_token_ids=()) for request in group]
                batch.add(group, [ids[request] for request in group], options)
            if len(batch):
                batch.step()
    return {request: np.stack(rows) for request, rows in seen.items()}


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("name", ["t5_gated", "bart_untied", "gpt2", "llama_grouped"])
def test_logits_are_the_same_bits_in_any_batch(exported, name, precision, tmp_path, monkeypatch):
    made = exported(name)
    model = made.as_int8(tmp_path) if precision == "int8" else made.runtime
    rng = random.Random(0)
    # Widths around whole vectors: 15, 16, 17 and the like.
    lengths = [1, 40, 15, 2, 16, 17, 5, 33, 31, 8, 3, 30]
    ids = [[rng.randrange(3, 64) for _ in range(length)] for length in lengths]
    alone = {}
    for request in range(len(ids)):
        alone |= logits_by_request(model, ids, [[request]], monkeypatch)
    joins = [[0], [1, 2], [], [3, 4, 5, 6], [7], [8, 9, 10], [], [11]]
    together = logits_by_request(model, ids, joins, monkeypatch)
    assert len({rows.tobytes() for rows in alone.values()}) == len(ids)
    for request, rows in alone.items():
        np.testing.assert_array_equal(rows, together[request])


def test_a_sampled_token_does_not_depend_on_the_options_of_others():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((40, 64)).astype(np.float32)
    temperature = rng.uniform(0.5, 2, 40).astype(np.float32)
    top_k = np.where(np.arange(40) % 2, 7, 0).astype(np.int64)
    top_p = np.where(np.arange(40) % 3, 1, 0.8).astype(np.float32)
    draws = rng.uniform(size=40)
    together = sampling.sample(logits, temperature, top_k, top_p, draws)
    alone = [
        sampling.sample(*(values[row : row + 1] for values in (logits, temperature, top_k, top_p, draws)))[0]
        for row in range(40)
    ]
    assert together.tolist() == alone
    assert len(set(alone)) > 10


def test_top_log_probabilities_are_the_largest():
    logits = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    tokens, values = sampling.top_log_probabilities(logits, 4)
    wanted = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(tokens, np.argsort(-logits, axis=1)[:, :4])
    np.testing.assert_allclose(values, np.take_along_axis(wanted, tokens, axis=1), rtol=1e-5)
