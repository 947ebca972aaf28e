"""D, the distance of two feature maps t (target) and m [N, C, H, W] that residual distillation minimises.

    mse             mean of (t - m)^2 over all elements
    normalised_mse  mean over images of |t - m|^2 / |t|^2: every image counts the same, however strong its target is
    smooth_l1       mean over elements of d^2 / 2 where d = |t - m| < 1, and d - 1/2 elsewhere
    cosine          mean over images of 1 - <t, m> / (|t| max(|m|, |t| / 10))

Norms are over all elements of an image. In normalised_mse the error is normalised, not the map: then m learns its
length, which the sum S + A needs. cosine teaches directions only: lengths are left to chance, or to the cross-entropy
of end_to_end. Assistants start at m = 0, where a cosine has no gradient: a map shorter than a tenth of its target
counts as that long, so that D is linear in m there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, smooth_l1_loss

from rkd_deploy.train.methods.base_loss import promoted

Distance = Callable[[Tensor, Tensor], Tensor]

_TINY = 1e-12  # |t|^2 of a target that is nothing but zeros


def mse(t_NCHW: Tensor, m_NCHW: Tensor) -> Tensor:
    """Mean squared error over all elements."""
    return mse_loss(m_NCHW, t_NCHW)


def normalised_mse(t_NCHW: Tensor, m_NCHW: Tensor) -> Tensor:
    """Squared error of each image over its target's square."""
    t_NCHW, m_NCHW = promoted(t_NCHW), promoted(m_NCHW)
    error_N = (t_NCHW - m_NCHW).square().flatten(1).sum(1)
    return (error_N / t_NCHW.square().flatten(1).sum(1).clamp_min(_TINY)).mean()


def smooth_l1(t_NCHW: Tensor, m_NCHW: Tensor) -> Tensor:
    """Squared near 0, linear beyond 1."""
    return smooth_l1_loss(m_NCHW, t_NCHW)


def cosine(t_NCHW: Tensor, m_NCHW: Tensor) -> Tensor:
    """One minus the cosine of the angle between the maps of each image."""
    t, m = promoted(t_NCHW).flatten(1), promoted(m_NCHW).flatten(1)
    t_norm_N = t.norm(dim=1).clamp_min(_TINY**0.5)
    m_norm_N = torch.maximum(m.norm(dim=1), t_norm_N / 10)
    cosine_N: Tensor = (t * m).sum(1) / (t_norm_N * m_norm_N)
    return 1 - cosine_N.mean()


DISTANCES: dict[str, Distance] = {
    "mse": mse,
    "normalised_mse": normalised_mse,
    "smooth_l1": smooth_l1,
    "cosine": cosine,
}
