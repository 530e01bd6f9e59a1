"""The meter on one process: activations, weights and steps; what several ranks send is in test_plan_measured."""

import pytest
import tiny
import torch
from accelerate import Accelerator
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from yunque.distributed.accounting import Meter, SavedActivations, held_bytes

ROWS, WIDTH = 4, 8
MATRIX = ROWS * WIDTH * 4


@pytest.fixture
def block():
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    return lambda states: layer(layer(states).relu()).relu()


@pytest.fixture
def states():
    return torch.randn(ROWS, WIDTH, requires_grad=True)


def test_saved_tensors_count_once_and_weights_not(block, states):
    with SavedActivations() as saved:
        out = block(block(states))
        assert saved.bytes == 5 * MATRIX  # the input and four outputs of relu, each also the next layer's input
        out.sum().backward()
        del out
    assert saved.bytes == 0
    assert saved.peak_bytes == 5 * MATRIX


def test_gradients_are_those_of_an_uncounted_run(block, states):
    (plain,) = torch.autograd.grad(block(states).sum(), states)
    with SavedActivations():
        (counted,) = torch.autograd.grad(block(states).sum(), states)
    assert torch.equal(plain, counted)


def test_checkpointing_counts_what_it_computes_again(block, states):
    with SavedActivations() as saved:
        out = states
        for _ in range(3):
            out = checkpoint(block, out, use_reentrant=False)
        assert saved.bytes == 3 * MATRIX  # one input for each block
        out.sum().backward()
        del out
    assert saved.peak_bytes == 5 * MATRIX  # two more while the last block is computed again
    assert saved.bytes == 0


def test_views_hold_their_whole_storage():
    whole = torch.zeros(100)
    assert held_bytes([whole[:10], whole[10:], None, 3]) == 400


def test_meter_finds_model_and_optimizer():
    model = tiny.llama()
    held = sum(weight.numel() for weight in model.parameters()) * 4
    stranger = nn.Linear(100, 100)
    with Meter() as meter:
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        ids = torch.ones(2, 5, dtype=torch.long)
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        unprepared = torch.optim.AdamW(stranger.parameters())
        stranger(torch.ones(1, 100)).sum().backward()
        unprepared.step()
    report = meter.report()
    assert report["parameter_bytes"] == report["gradient_bytes"] == held
    assert report["optimizer_bytes"] == 2 * held + 4 * len(list(model.parameters()))
    assert report["optimizer_steps"] == 1
    assert report["activation_peak_bytes"] > 0
    assert report["communication_bytes"] == {}


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states):
        return 2 * states

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_meter_leaves_no_trace():
    def patched():
        owners = ((Accelerator, "prepare"), (torch.autograd.Function, "apply"), (saved_tensors_hooks, "__enter__"))
        return [vars(owner)[name] for owner, name in owners]

    before = patched()
    with Meter():
        assert all(now is not then for now, then in zip(patched(), before, strict=True))
    assert all(now is then for now, then in zip(patched(), before, strict=True))
    assert Doubled.apply(torch.ones(2)).tolist() == [2, 2]
