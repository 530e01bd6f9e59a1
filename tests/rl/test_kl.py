import math

import pytest
import torch

from yunque.rl.kl import AdaptiveKLController, FixedKLController, full_kl, kl_per_token

LOGITS = torch.tensor([1.0, 0.0, -1.0, 0.5, 2.0])
REF_LOGITS = torch.tensor([0.5, 0.3, -1.2, 1.0, 1.2])


@pytest.mark.parametrize(
    ("estimator", "above", "below"),
    [
        ("k1", 0.5, -0.5),
        ("k2", 0.125, 0.125),  # 0.5^2 / 2
        ("k3", math.exp(-0.5) - 1 + 0.5, math.exp(0.5) - 1 - 0.5),
        ("abs", 0.5, 0.5),
    ],
)
def test_estimators_by_hand(estimator, above, below):
    # log p - log r is 0.5 at the first token and -0.5 at the second
    kl = kl_per_token(estimator, torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.5]]))
    assert kl[0].tolist() == pytest.approx([above, below])


def test_an_unknown_estimator_is_named():
    with pytest.raises(ValueError, match=r"kl_estimator: k4 .* k1, k2, k3, abs, full"):
        kl_per_token("k4", torch.zeros(1, 1), torch.zeros(1, 1))


def test_k3_is_never_negative():
    difference = torch.cat([torch.linspace(-20, 20, 2001), torch.tensor([1e-6, -1e-6, 1e-4, -1e-4])])
    assert (kl_per_token("k3", difference, torch.zeros_like(difference)) >= 0).all()


def test_full_kl_by_hand():
    # p = (1/2, 1/2), r = (1/4, 3/4): 1/2 log 2 + 1/2 log(2/3)
    logits = torch.tensor([[[0.0, 0.0]]])
    ref_logits = torch.tensor([[[0.25, 0.75]]]).log()
    assert full_kl(logits, ref_logits).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert full_kl(logits, logits).item() == pytest.approx(0.0, abs=1e-7)


def test_full_kl_does_not_change_with_a_shift_of_the_logits():
    torch.testing.assert_close(full_kl(LOGITS + 30, REF_LOGITS - 7), full_kl(LOGITS, REF_LOGITS), rtol=1e-4, atol=1e-6)


def samples_of(estimator):
    log_p, log_r = LOGITS.log_softmax(-1).double(), REF_LOGITS.log_softmax(-1).double()
    tokens = torch.multinomial(log_p.exp(), 100_000, replacement=True, generator=torch.Generator().manual_seed(0))
    return kl_per_token(estimator, log_p[tokens], log_r[tokens])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_on_samples_of_the_policy(estimator):
    samples = samples_of(estimator)
    standard_error = samples.std() / len(samples) ** 0.5
    assert abs(samples.mean() - full_kl(LOGITS, REF_LOGITS)) < 3 * standard_error


def test_k3_varies_less_than_k1():
    assert samples_of("k3").std() < 0.5 * samples_of("k1").std()


@pytest.mark.parametrize(
    ("kl", "value"),
    [
        (6.0, 0.2),  # on target
        (6.6, 0.2 * (1 + 0.1 * 0.05)),  # 10 % above, over a twentieth of the horizon
        (5.4, 0.2 * (1 - 0.1 * 0.05)),
        (7.2, 0.2 * (1 + 0.2 * 0.05)),  # exactly at the clip
        (600.0, 0.2 * (1 + 0.2 * 0.05)),  # clipped above
        (4.8, 0.2 * (1 - 0.2 * 0.05)),
        (0.0, 0.2 * (1 - 0.2 * 0.05)),  # clipped below
        (-50.0, 0.2 * (1 - 0.2 * 0.05)),
    ],
)
def test_adaptive_controller_follows_the_clipped_error(kl, value):
    controller = AdaptiveKLController(0.2, target=6.0, horizon=10_000)
    controller.update(kl, samples=500)
    assert controller.value == pytest.approx(value, rel=1e-12)


def test_fixed_controller_stays():
    controller = FixedKLController(0.2)
    controller.update(600.0, samples=500)
    assert controller.value == 0.2
