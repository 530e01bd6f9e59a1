"""The loss and the order of rows that the supervised recipes give to transformers' Trainer."""

import math
from types import SimpleNamespace

import pytest
import torch

from yunque.distributed.trainers import LengthGroupedSampler, label_loss

LENGTHS = torch.randint(1, 200, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
LOGITS = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0]]])  # probabilities (1/4, 3/4) and (1/2, 1/2)


def order(epoch=0, seed=0, batch_size=10):
    sampler = LengthGroupedSampler(LENGTHS, batch_size, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def batches(rows, batch_size=10):
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def test_every_row_comes_once_an_epoch():
    assert sorted(order()) == list(range(len(LENGTHS)))


def test_the_odd_rows_make_the_last_batch():
    assert [len(batch) for batch in batches(order())] == [10] * 100 + [3]


def test_a_batch_holds_similar_lengths():
    spreads = [max(LENGTHS[row] for row in batch) - min(LENGTHS[row] for row in batch) for batch in batches(order())]
    # 50 batches share lengths 1 to 199 almost evenly: 4 each
    assert sum(spreads[:-1]) / 100 < 8


def test_batches_do_not_come_sorted_by_length():
    first = torch.tensor([float(LENGTHS[batch[0]]) for batch in batches(order())[:50]])
    place = torch.arange(50.0)
    assert abs(torch.corrcoef(torch.stack([first, place]))[0, 1]) < 0.4  # four times the chance deviation, 1/sqrt(50)


def test_seed_and_epoch_choose_the_order():
    assert order(epoch=1, seed=5) == order(epoch=1, seed=5)
    assert order(epoch=0) != order(epoch=1)
    assert order(seed=0) != order(seed=7)


def test_fewer_rows_than_a_batch_are_one_batch():
    assert sorted(LengthGroupedSampler([3, 1, 2], 8, 0)) == [0, 1, 2]


def test_loss_is_the_mean_over_the_labels_that_count():
    outputs = SimpleNamespace(logits=LOGITS)
    both = (-math.log(0.75) - math.log(0.5)) / 2
    assert label_loss(0)(outputs, torch.tensor([[1, 0]])).item() == pytest.approx(both)
    assert label_loss(0)(outputs, torch.tensor([[1, -100]])).item() == pytest.approx(-math.log(0.75))


def test_loss_is_divided_by_the_count_of_all_ranks():
    outputs = SimpleNamespace(logits=LOGITS)
    total = -math.log(0.75) - math.log(0.5)
    assert label_loss(0)(outputs, torch.tensor([[1, 0]]), num_items_in_batch=8).item() == pytest.approx(total / 8)


def test_loss_of_a_classifier_and_smoothing():
    outputs = SimpleNamespace(logits=LOGITS[0])
    # 0.8 of the target on the label, 0.1 more on each class
    first = -0.9 * math.log(0.75) - 0.1 * math.log(0.25)
    expected = (first - math.log(0.5)) / 2
    assert label_loss(0.2)(outputs, torch.tensor([1, 0])).item() == pytest.approx(expected)
