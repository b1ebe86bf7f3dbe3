"""The discrete wavelet transform of pictures, one level, on any device and differentiable; and unsharp masking."""

from __future__ import annotations

import math
import re
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.core import InputError


@cache
def low_pass(wavelet: str) -> tuple[float, ...]:
    """The 2 N coefficients of Daubechies' filter 'dbN' ('haar' is 'db1'), sum sqrt 2; from its N vanishing moments.

    (1 + z)^N times the factors of sum_k binom(N - 1 + k, k) y^k, y = (2 - z - 1 / z) / 4, with roots inside the unit circle.
    Source: Daubechies, 1988, "Orthonormal Bases of Compactly Supported Wavelets".
    """
    found = re.fullmatch(r"haar|db([1-9]|10)", wavelet)
    if found is None:
        raise InputError(f"wavelet = {wavelet!r}: 'haar', or 'db1' to 'db10'")
    n = int(found[1] or 1)
    roots = []
    for y in np.roots([math.comb(n - 1 + k, k) for k in reversed(range(n))]):
        pair = np.roots([1.0, 4 * y - 2, 1.0])
        roots.append(pair[np.abs(pair).argmin()])
    h = np.poly([-1.0] * n + roots).real
    return tuple((h * math.sqrt(2) / h.sum()).tolist())


def _filters(wavelet: str, like: Tensor) -> Tensor:
    """(2, 1, L): the low and the high synthesis filter."""
    low = torch.tensor(low_pass(wavelet), dtype=torch.float64)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(len(low) // 2)
    return torch.stack([low, low.flip(0) * sign]).unsqueeze(1).to(like)


def _analysed(x: Tensor, bank: Tensor) -> Tensor:
    """(*, n) to (*, 2, (n + L - 1) // 2), with the half-sample symmetric extension."""
    n, length = x.shape[-1], bank.shape[-1]
    at = torch.arange(2 - length, n + length, device=x.device) % (2 * n)
    wide = x[..., torch.where(at < n, at, 2 * n - 1 - at)]
    out = F.conv1d(wide.flatten(0, -2).unsqueeze(1), bank, stride=2)
    return out[..., : (n + length - 1) // 2].unflatten(0, x.shape[:-1])


def _synthesised(y: Tensor, bank: Tensor, n: int) -> Tensor:
    """(*, 2, K) back to (*, n)."""
    length = bank.shape[-1]
    out = F.conv_transpose1d(y.flatten(0, -3), bank, stride=2)
    return out[:, 0, length - 2 : length - 2 + n].unflatten(0, y.shape[:-2])


def dwt2(x: Tensor, wavelet: str = "db4") -> tuple[Tensor, Tensor]:
    """(low (B, C, h, w), highs (B, C, 3, h, w)) of pictures (B, C, H, W); h = (H + L - 1) // 2 for filters of length L.

    highs are (rows high, columns high, both); borders are mirrored, half a sample outside. Inverse: :func:`idwt2`.
    Source: Mallat, 1989, "A Theory for Multiresolution Signal Decomposition: The Wavelet Representation".
    """
    bank = _filters(wavelet, x)
    columns = _analysed(x, bank)  # (B, C, H, 2, w)
    both = _analysed(columns.movedim(2, -1), bank)  # (B, C, 2, w, 2, h)
    bands = both.permute(0, 1, 4, 2, 5, 3).flatten(2, 3)  # rows' band, columns' band
    return bands[:, :, 0], bands[:, :, [2, 1, 3]]


def idwt2(low: Tensor, highs: Tensor, size: tuple[int, int], wavelet: str = "db4") -> Tensor:
    """The pictures (B, C, *size) with these bands: exact for what :func:`dwt2` gave of pictures of that size."""
    bank = _filters(wavelet, low)
    wanted = tuple((n + bank.shape[-1] - 1) // 2 for n in size)
    if tuple(low.shape[-2:]) != wanted or highs.shape != (*low.shape[:2], 3, *wanted):
        raise InputError(
            f"bands {tuple(low.shape)} and {tuple(highs.shape)} are not of pictures {size}, whose bands are {wanted}"
        )
    bands = torch.cat([low[:, :, None], highs[:, :, [1, 0, 2]]], 2).unflatten(2, (2, 2))  # rows' band, columns' band
    columns = _synthesised(bands.permute(0, 1, 3, 5, 2, 4), bank, size[0])  # (B, C, 2, w, H)
    return _synthesised(columns.permute(0, 1, 4, 2, 3), bank, size[1])


def unsharp(x: Tensor, amount: float = 1.0, sigma: float = 1.0) -> Tensor:
    """(1 + amount) x - amount G x with a Gaussian of 3 x 3 and this sigma; edges are mirrored. Not clipped."""
    if not (amount >= 0 and sigma > 0):
        raise InputError(f"amount = {amount} and sigma = {sigma}: not negative, and a positive sigma")
    side = math.exp(-1 / (2 * sigma**2))
    line = torch.tensor([side, 1.0, side], dtype=x.dtype, device=x.device) / (1 + 2 * side)
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 3, 3)
    blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=x.shape[1])
    return torch.lerp(blurred, x, 1 + amount)


__all__ = ["dwt2", "idwt2", "low_pass", "unsharp"]
