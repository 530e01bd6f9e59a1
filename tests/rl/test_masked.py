import pytest
import torch

from yunque.rl.masked import masked_mean, masked_var, masked_whiten

VALUES = torch.tensor([[1.0, 2.0, 99.0], [3.0, -99.0, 99.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_mean_leaves_padding_out():
    assert masked_mean(VALUES, MASK) == 2.0  # (1 + 2 + 3) / 3


def test_variance_has_bessel_s_correction_only_where_asked():
    assert masked_var(VALUES, MASK) == pytest.approx(1.0)  # (1 + 0 + 1) / 2
    assert masked_var(VALUES, MASK, unbiased=False) == pytest.approx(2 / 3)


def test_variance_of_one_token_is_zero_not_nan():
    assert masked_var(torch.tensor([[5.0, 7.0]]), torch.tensor([[True, False]])) == 0.0


def test_whitened_values_have_mean_0_and_variance_1_inside_the_mask():
    whitened = masked_whiten(VALUES, MASK)
    torch.testing.assert_close(whitened[MASK], torch.tensor([-1.0, 0.0, 1.0]))  # (v - 2) / 1


def test_whitening_can_keep_the_mean():
    whitened = masked_whiten(2 * VALUES, MASK, shift_mean=False)
    torch.testing.assert_close(whitened[MASK], torch.tensor([3.0, 4.0, 5.0]))  # (2v - 4) / 2 + 4


def test_whitening_equal_values_gives_zeros_not_nan():
    whitened = masked_whiten(torch.full((2, 3), 7.0), MASK)
    torch.testing.assert_close(whitened, torch.zeros(2, 3))


def test_an_integer_mask_counts_like_a_boolean_one():
    torch.testing.assert_close(masked_whiten(VALUES, MASK.long()), masked_whiten(VALUES, MASK))
