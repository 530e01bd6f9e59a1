import random

import numpy as np
import pytest
import torch

from yunque.compat.trl011 import core


def test_lengths_leave_the_upper_end_out():
    sampler = core.LengthSampler(4, 8)
    core.set_seed(0)
    drawn = {sampler() for _ in range(200)}
    assert drawn == {4, 5, 6, 7}
    assert {type(length) for length in drawn} == {int}
    with pytest.raises(ValueError, match="max_value"):
        core.LengthSampler(4, 4)


def test_set_seed_sets_all_three():
    draws = []
    for _ in range(2):
        core.set_seed(3)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_masked_var_of_nothing():
    with pytest.raises(ValueError, match="mask"):
        core.masked_var(torch.ones(2), torch.zeros(2))


def test_logprobs_of_all_tokens():
    logits = torch.randn(2, 3, 5)
    everything = core.logprobs_from_logits(logits, None, gather=False)
    torch.testing.assert_close(everything.exp().sum(-1), torch.ones(2, 3))
    labels = torch.tensor([[0, 1, 2], [3, 4, 0]])
    torch.testing.assert_close(
        core.logprobs_from_logits(logits, labels), everything.gather(2, labels[..., None])[..., 0]
    )


def test_clip_by_value():
    low, high = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])
    assert core.clip_by_value(torch.tensor([-1.0, 1.5, 9.0]), low, high).tolist() == [0.0, 1.5, 3.0]


def test_filtering():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert core.top_k_top_p_filtering(logits, top_k=2).isinf().tolist() == [[True, True, False, False]]
    assert core.top_k_top_p_filtering(logits, top_p=0.5).isinf().tolist() == [[True, True, True, False]]
    assert torch.equal(core.top_k_top_p_filtering(logits), logits)


def test_respond_to_batch(wrap):
    model, queries = wrap("gpt2"), torch.tensor([[5, 6, 7], [8, 9, 10]])
    answers = core.respond_to_batch(model, queries, txt_len=4, top_k=1)
    assert answers.shape == (2, 4)
    greedy = model.generate(
        queries, attention_mask=torch.ones_like(queries), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert answers.tolist() == greedy[:, 3:].tolist()


def test_dictionaries():
    assert core.flatten_dict({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a/b": 1, "a/c/d": 2, "e": 3}
    with pytest.raises(ValueError, match="separator"):
        core.flatten_dict({"a/b": 1})
    stacked = core.stack_dicts([{"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor(3.0)}])
    assert stacked["x"].tolist() == [[1, 2], [3, core.WANDB_PADDING]]
    arrays = core.stats_to_np({"b": torch.tensor([1.5], dtype=torch.bfloat16), "n": 3, "t": torch.ones(2, 2)})
    assert arrays["b"].dtype == np.float32
    assert isinstance(arrays["n"], float)
    scalars = core.convert_to_scalar(arrays)
    assert (scalars["b"], scalars["n"], scalars["t"].shape) == (1.5, 3.0, (2, 2))
