"""Distances between the next-token distributions of teacher and student. Shapes: N answer tokens, V vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def divergence(student_NV: Tensor, teacher_NV: Tensor, kind: str, temperature: float, jsd_beta: float) -> Tensor:
    """Divergence (N,) of two rows of logits at ``temperature``, times its square.

    The square keeps the gradient's size as T grows (Hinton et al. 2015, section 2). ``kind``: "forward" is
    KL(teacher || student), "reverse" KL(student || teacher), "jsd" the generalised Jensen-Shannon divergence
    beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student (Agarwal et al. 2024,
    arXiv:2306.13649, equation 1).
    """
    student_NV = (student_NV.float() / temperature).log_softmax(dim=-1)
    teacher_NV = (teacher_NV.float() / temperature).log_softmax(dim=-1)
    if kind == "jsd" and 0 < jsd_beta < 1:
        parts = (teacher_NV + math.log(jsd_beta), student_NV + math.log1p(-jsd_beta))
        mixture_NV = torch.logaddexp(*parts)
        found_N = jsd_beta * _kl(teacher_NV, mixture_NV) + (1 - jsd_beta) * _kl(student_NV, mixture_NV)
    elif kind == "forward" or (kind == "jsd" and jsd_beta == 0):
        found_N = _kl(teacher_NV, student_NV)
    else:
        found_N = _kl(student_NV, teacher_NV)
    return found_N * temperature**2


def _kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """KL(p || q) (N,) of log-probabilities."""
    return (p_NV.exp() * (p_NV - q_NV)).sum(dim=-1)
