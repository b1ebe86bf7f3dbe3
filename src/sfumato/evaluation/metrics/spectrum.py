"""How much of a picture is fine detail: power by spatial frequency."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfumato.core.errors import InputError


def radial_power(images: Tensor) -> Tensor:
    """Mean power of the pictures (B, C, H, W) at radius r = 0, 1, ..., min(H, W) // 2 of the Fourier plane, float64.

    r is the rounded distance from frequency 0 in cycles a picture, of the shorter side; corners beyond the last radius are
    left out. The transform is unitary: white noise of variance v has power v at each radius. Raises InputError unless the
    pictures are four-dimensional.
    """
    if images.ndim != 4 or min(images.shape[-2:]) < 2:
        raise InputError(f"pictures are (B, C, H, W) with sides of 2 at least, not {tuple(images.shape)}")
    height, width = images.shape[-2:]
    power = torch.fft.fft2(images.double(), norm="ortho").abs().square().mean((0, 1))
    side = min(height, width)
    rows = torch.fft.fftfreq(height, dtype=torch.float64, device=images.device) * side
    columns = torch.fft.fftfreq(width, dtype=torch.float64, device=images.device) * side
    ring = torch.hypot(rows[:, None], columns[None]).round().long()
    inside = ring <= side // 2
    total = torch.zeros(side // 2 + 1, dtype=torch.float64, device=images.device)
    count = torch.zeros_like(total)
    total.index_add_(0, ring[inside], power[inside])
    count.index_add_(0, ring[inside], torch.ones_like(power[inside]))
    return total / count


def detail_error(images: Tensor, truth: Tensor) -> float:
    """Mean |log10 power - log10 power of the truth| over the finest third of the radii, see :func:`radial_power`.

    Blur and added noise both raise it; where pictures hold noise of the right power it is 0, so a fidelity such as PSNR
    belongs beside it. Raises InputError for pictures of other sizes than the truth.
    """
    if images.shape[1:] != truth.shape[1:]:
        raise InputError(f"pictures {tuple(images.shape[1:])} and truth {tuple(truth.shape[1:])} must be of one size")
    ours, theirs = radial_power(images), radial_power(truth)
    first = math.floor(len(ours) * 2 / 3)
    return float((ours[first:].clamp(min=1e-12).log10() - theirs[first:].clamp(min=1e-12).log10()).abs().mean())


__all__ = ["detail_error", "radial_power"]
