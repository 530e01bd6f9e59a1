import pytest
import torch

from yunque.rl.losses import policy_loss, row_weights, value_loss


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.5, 1.0, -1.2, True),  # max(-1.5, -1.2): no more to gain beyond 1 + clip
        (1.5, -1.0, 1.5, False),  # max(1.5, 1.2): a bad token that became likelier keeps its full loss
        (0.5, 1.0, -0.5, False),  # max(-0.5, -0.8): a good token that became rarer keeps its full loss
        (0.5, -1.0, 0.8, True),  # max(0.5, 0.8): no more to gain below 1 - clip
        (1.1, 2.0, -2.2, False),  # inside the clip range both are -2 * 1.1
    ],
)
def test_policy_loss_is_clipped_only_where_the_clip_makes_it_worse(ratio, advantage, loss, clipped):
    old = torch.tensor([[-1.0]])
    new = (old + torch.tensor(ratio).log()).requires_grad_()
    result = policy_loss(new, old, torch.tensor([[advantage]]), 0.2)
    assert result.per_token_BR.item() == pytest.approx(loss)
    assert result.clipped_BR.item() is clipped
    result.per_token_BR.sum().backward()
    # d(-A ratio)/d log p = -A ratio; the clipped side is a constant
    assert new.grad.item() == pytest.approx(0.0 if clipped else -advantage * ratio)


@pytest.mark.parametrize(
    ("value", "target", "loss", "clipped"),
    [
        (1.0, 2.0, 1.62, True),  # moved up to 1, held at 0.2: 0.5 * max(1, 1.8^2)
        (-1.0, -2.0, 1.62, True),  # the same downwards
        (1.0, 0.5, 0.125, False),  # overshot: 0.5 * max(0.5^2, 0.3^2)
        (0.1, 1.0, 0.405, False),  # within the clip range: 0.5 * 0.9^2
    ],
)
def test_value_loss_is_clipped_only_where_the_clip_makes_it_worse(value, target, loss, clipped):
    values = torch.tensor([[value]], requires_grad=True)
    result = value_loss(values, torch.zeros(1, 1), torch.tensor([[target]]), 0.2)
    assert result.per_token_BR.item() == pytest.approx(loss)
    assert result.clipped_BR.item() is clipped
    result.per_token_BR.sum().backward()
    assert values.grad.item() == pytest.approx(0.0 if clipped else value - target)


def test_losses_are_per_token_so_that_the_caller_normalises():
    shape = (2, 3)
    assert policy_loss(torch.zeros(shape), torch.zeros(shape), torch.ones(shape), 0.2).per_token_BR.shape == shape
    assert value_loss(torch.zeros(shape), torch.zeros(shape), torch.ones(shape), 0.2).per_token_BR.shape == shape


# --- how an optimizer step's loss is averaged ---

TOKENS = torch.tensor([2, 4, 6, 8, 100])  # the last row belongs to another step
MINIBATCHES, GROUPS = [[0, 1], [2, 3]], torch.tensor([0, 1, 0, 1, 2])


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("tokens", [1 / 20] * 4),
        ("sequences", [1 / 8, 1 / 16, 1 / 24, 1 / 32]),
        ("minibatches", [1 / 12, 1 / 12, 1 / 28, 1 / 28]),
        ("groups", [0.75 / 8, 0.25 / 12, 0.75 / 8, 0.25 / 12]),
    ],
)
def test_row_weights(normalization, expected):
    weights = row_weights(normalization, TOKENS, MINIBATCHES, GROUPS, torch.tensor([3.0, 1.0, 50.0]))
    torch.testing.assert_close(weights, torch.tensor([*expected, 0.0]))
    assert (weights * TOKENS).sum().item() == pytest.approx(1.0)  # a mean: equal losses keep their size


def test_groups_of_equal_weight_count_alike_however_many_tokens_they_have():
    weights = row_weights("groups", TOKENS, [[0, 4]], GROUPS, torch.ones(3))
    torch.testing.assert_close((weights * TOKENS)[[0, 4]], torch.tensor([0.5, 0.5]))
