"""Figures of pairs of images: PSNR and SSIM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.core.errors import InputError
from sfumato.evaluation.measurement import Measurement
from sfumato.evaluation.metrics._tensors import blocks, count, double


def psnr_each(images: Tensor, truth: Tensor, *, data_range: float | None = None) -> Tensor:
    """10 log10(range^2 / mean squared error) of every pair (B, C, H, W) in decibels, (B,); infinite for equal pairs.

    ``data_range`` is the largest possible difference: 255 for uint8, to be given for floats (2 for images in [-1, 1]).

    Raises:
        InputError: shapes or dtypes that differ, no range for float images, or values that are not finite.
    """
    span = _range(images, truth, data_range)
    parts = [
        (double(images[rows]) - double(truth[rows]).to(images.device)).square().flatten(1).mean(1)
        for rows in blocks(len(images), images[0].numel())
    ]
    return 10 * torch.log10(span**2 / torch.cat(parts))


def ssim_each(
    images: Tensor, truth: Tensor, *, data_range: float | None = None, window: int = 11, sigma: float = 1.5
) -> Tensor:
    """Structural similarity of every pair (B, C, H, W), the mean over positions and channels, (B,).

    (2 m m' + c1)(2 cov + c2) / ((m^2 + m'^2 + c1)(v + v' + c2)) with means, variances and covariance under a Gaussian
    window that lies wholly inside the image, c1 = (0.01 range)^2, c2 = (0.03 range)^2. Channels are compared one by
    one; the original compares luminance only. Figures that count padded borders too come out lower or higher. Source:
    Wang, Bovik, Sheikh, Simoncelli (2004), Image quality assessment: from error visibility to structural similarity.

    Raises:
        InputError: as :func:`psnr_each`; or images smaller than the window.
    """
    span = _range(images, truth, data_range)
    window = count("window", window, 3, min(images.shape[-2:]), f"pixels within {tuple(images.shape[-2:])}")
    if window % 2 == 0 or not sigma > 0:
        raise InputError(f"window = {window}, sigma = {sigma}: an odd window and a positive sigma are wanted")
    taps = torch.exp(-(torch.arange(window, dtype=torch.float64) - window // 2).square() / (2 * sigma**2))
    taps = taps / taps.sum()
    parts = []
    for rows in blocks(len(images), 5 * images[0].numel()):
        a, b = double(images[rows]), double(truth[rows]).to(images.device)
        parts.append(_ssim(a, b, taps.to(a.device), (0.01 * span) ** 2, (0.03 * span) ** 2))
    return torch.cat(parts)


def _ssim(a: Tensor, b: Tensor, taps: Tensor, c1: float, c2: float) -> Tensor:
    batch, channels = a.shape[:2]
    planes = torch.stack([a, b, a * a, b * b, a * b]).flatten(0, 2).unsqueeze(1)
    planes = F.conv2d(F.conv2d(planes, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
    mean_a, mean_b, aa, bb, ab = planes.view(5, batch, channels, *planes.shape[-2:])
    likeness = (2 * mean_a * mean_b + c1) * (2 * (ab - mean_a * mean_b) + c2)
    likeness /= (mean_a**2 + mean_b**2 + c1) * (aa - mean_a**2 + bb - mean_b**2 + c2)
    return likeness.flatten(1).mean(1)


def psnr(images: Tensor, truth: Tensor, *, data_range: float | None = None) -> Measurement:
    """The mean over pairs of :func:`psnr_each`, in decibels; higher is better."""
    return psnr_of(psnr_each(images, truth, data_range=data_range))


def ssim(
    images: Tensor, truth: Tensor, *, data_range: float | None = None, window: int = 11, sigma: float = 1.5
) -> Measurement:
    """The mean over pairs of :func:`ssim_each`; higher is better, 1 is equality."""
    return ssim_of(ssim_each(images, truth, data_range=data_range, window=window, sigma=sigma))


def psnr_of(each: Tensor) -> Measurement:
    """The figure from per-pair decibels."""
    return Measurement.mean("PSNR", each, reference_n=len(each), higher_is_better=True, note="dB, mean over pairs")


def ssim_of(each: Tensor) -> Measurement:
    """The figure from per-pair similarities."""
    return Measurement.mean("SSIM", each, reference_n=len(each), higher_is_better=True, note="mean over pairs")


def _range(images: Tensor, truth: Tensor, data_range: float | None) -> float:
    for name, x in (("images", images), ("truth", truth)):
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.numel():
            given = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"{name}: a tensor (B, C, H, W) is wanted, got {given}")
        if not bool(x.isfinite().all()):
            raise InputError(f"{name}: NaN or infinity among the pixels")
    if images.shape != truth.shape or images.dtype != truth.dtype:
        raise InputError(
            f"pairs of one shape and dtype are wanted, got {images.dtype} {tuple(images.shape)} and "
            f"{truth.dtype} {tuple(truth.shape)}"
        )
    if data_range is None:
        if images.dtype != torch.uint8:
            raise InputError(f"data_range of {images.dtype} images is unknown: 1 for [0, 1], 2 for [-1, 1]")
        return 255.0
    if not data_range > 0:
        raise InputError(f"data_range = {data_range}: a positive number is wanted")
    return float(data_range)
