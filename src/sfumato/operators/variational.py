"""Reconstruction without learning: the rival that every learned prior has to beat."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sfumato.core import InputError, linear
from sfumato.core.errors import MissingExtra
from sfumato.operators.base import Operator, inner


def largest(operator: Operator, like: Tensor, iterations: int = 30) -> float:
    """The largest eigenvalue of A* A on items like these, by power iteration."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *like.shape[1:], generator=generator, dtype=torch.float64).to(like)
    for _ in range(iterations):
        moved = operator.adjoint(operator(x))
        size = float(inner(moved, moved).sqrt())
        if size == 0:
            return 0.0
        x = moved / size
    return float(inner(x, operator.adjoint(operator(x))))


def total_variation(operator: Operator, y: Any, weight: float, iterations: int = 100) -> Tensor:
    """argmin_x |A x - y|^2 / 2 + weight TV(x) for images (B, C, H, W), each on its own; needs scikit-image.

    TV is the isotropic total variation. Accelerated proximal gradients (FISTA) from the pseudo-inverse; the proximal map is
    scikit-image's, of Chambolle. Raises InputError for a non-linear operator, MissingExtra without scikit-image.
    Sources: Rudin, Osher, Fatemi, 1992, "Nonlinear Total Variation Based Noise Removal Algorithms"; Chambolle, 2004, "An
    Algorithm for Total Variation Minimization and Applications"; Beck & Teboulle, 2009, "A Fast Iterative
    Shrinkage-Thresholding Algorithm for Linear Inverse Problems".
    """
    if not operator.linear or not weight > 0 or iterations < 1:
        raise InputError(f"a linear operator, weight > 0 and iterations >= 1, not {operator}, {weight}, {iterations}")
    x = look = operator.pinv(y)
    step, momentum = 1.0 / largest(operator, x), 1.0
    for _ in range(iterations):
        slope = operator.adjoint(linear(1.0, operator(look), -1.0, y))
        before, x = x, denoise_total_variation(linear(1.0, look, -step, slope), step * weight)
        grown = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        look, momentum = linear(1.0, x, (momentum - 1) / grown, linear(1.0, x, -1.0, before)), grown
    return x


def denoise_total_variation(x: Tensor, weight: float) -> Tensor:
    """argmin_u |u - x|^2 / 2 + weight TV(u), each image and channel of (B, C, H, W) on its own."""
    try:
        from skimage.restoration import denoise_tv_chambolle
    except ImportError as error:
        raise MissingExtra("scikit-image", extra="science") from error
    planes = x.detach().cpu().flatten(0, -3).numpy()
    out = denoise_tv_chambolle(planes, weight, eps=1e-8, max_num_iter=200, channel_axis=0)
    return torch.from_numpy(out).to(x).reshape(x.shape)
