"""Divergences of soft targets against torch's and TRL's."""

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from yunque.compression.divergences import divergence

STUDENT, TEACHER = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_forward_is_the_course_s_distillation_loss(temperature):
    targets = torch.softmax(TEACHER / temperature, dim=-1)
    wanted = kl_div(log_softmax(STUDENT / temperature, dim=-1), targets, reduction="none").sum(-1) * temperature**2
    torch.testing.assert_close(divergence(STUDENT, TEACHER, "forward", temperature, 0.5), wanted)


def test_reverse_swaps_them():
    wanted = divergence(TEACHER, STUDENT, "forward", 2.0, 0.5)
    torch.testing.assert_close(divergence(STUDENT, TEACHER, "reverse", 2.0, 0.5), wanted)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jsd_is_trl_s(beta):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    wanted = gkd.GKDTrainer.generalized_jsd_loss(STUDENT, TEACHER, beta=beta, temperature=3.0, reduction="none")
    torch.testing.assert_close(divergence(STUDENT, TEACHER, "jsd", 3.0, beta), wanted.sum(-1) * 9)


def test_the_square_of_the_temperature_keeps_the_gradient_s_size():
    # Hinton et al. (2015): at high temperatures T^2 KL tends to the mean square of centred logit differences / 2.
    def gradient(temperature):
        student = STUDENT.clone().requires_grad_(True)
        divergence(student, TEACHER, "forward", temperature, 0.5).sum().backward()
        return student.grad

    centred = (STUDENT - STUDENT.mean(-1, keepdim=True)) - (TEACHER - TEACHER.mean(-1, keepdim=True))
    torch.testing.assert_close(gradient(1000.0), centred / 11, rtol=0.05, atol=1e-2)
    assert gradient(1.0).norm() < 10 * gradient(1000.0).norm()


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_equal_distributions_are_at_no_distance(kind):
    # logits are free up to a constant
    assert divergence(STUDENT + 3.0, STUDENT, kind, 2.0, 0.3).abs().max() < 1e-5
