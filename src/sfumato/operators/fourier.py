"""Undersampled Fourier measurements, the model of magnetic resonance imaging."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sfumato.core import InputError
from sfumato.core.trees import column
from sfumato.operators._registry import register
from sfumato.operators.base import Operator, check_noise


@lru_cache(maxsize=64)
def lines(n: int, acceleration: float = 4.0, centre: float = 0.08, seed: int = 0, power: float = 2.0) -> Tensor:
    """Which of n frequencies are measured, bool (n,) in the order of the FFT (frequency 0 first).

    round(n / acceleration) lines: those of the ``centre`` share of lowest |k|, at least one, and others drawn without
    replacement with density (1 - |k| / (n / 2 + 1))^power. Source: Lustig, Donoho, Pauly, 2007, "Sparse MRI".
    """
    if not (acceleration >= 1 and 0 <= centre <= 1 and power >= 0):
        raise InputError(f"acceleration >= 1, 0 <= centre <= 1 and power >= 0, not {acceleration}, {centre}, {power}")
    total = max(1, round(n / acceleration))
    low = min(total, max(1, round(n * centre)))
    distance = (torch.fft.fftfreq(n, dtype=torch.float64) * n).abs()
    kept = torch.zeros(n, dtype=torch.bool)
    kept[distance.argsort(stable=True)[:low]] = True
    if total > low:
        density = ((1 - distance / (n / 2 + 1)) ** power).masked_fill(kept, 0.0)
        generator = torch.Generator().manual_seed(seed)
        kept[torch.multinomial(density, total - low, generator=generator)] = True
    return kept


@register("fourier")
class Fourier(Operator):
    """y = M F x + noise: the orthonormal 2-D Fourier transform of real images (B, *, H, W) on a mask; y is complex, 0 off it.

    mask          bool, broadcasting to (H, W), in the order of the FFT; None draws vertical lines by :func:`lines`
    acceleration  how many times fewer lines than W are measured, ``centre`` the share of lowest ones, ``seed`` of the rest
    noise         std of the real and of the imaginary part

    An image is real, so its spectrum at -k is the conjugate of that at k: A* A multiplies the spectrum by (m(k) + m(-k)) / 2.
    ``adjoint`` is the zero-filled reconstruction; ``pinv`` fills in the conjugates; both and ``prox`` are exact.
    Half-precision images are refused, as the FFT has no such type.
    """

    def __init__(
        self,
        mask: Tensor | None = None,
        *,
        acceleration: float = 4.0,
        centre: float = 0.08,
        seed: int = 0,
        noise: float = 0.0,
    ) -> None:
        if mask is not None and (mask.dtype != torch.bool or mask.ndim > 2 or not mask.numel()):
            raise InputError(f"a mask is bool and broadcasts to (H, W), not {mask.dtype} {tuple(mask.shape)}")
        lines(8, acceleration, centre, seed)  # refuses impossible numbers here
        self.given, self.numbers, self.noise = mask, (float(acceleration), float(centre), int(seed)), check_noise(noise)

    def mask(self, height: int, width: int) -> Tensor:
        """Which frequencies of an image of this size are measured, bool (height, width)."""
        chosen = lines(width, *self.numbers) if self.given is None else self.given
        try:
            return chosen.expand(height, width)
        except RuntimeError:
            raise InputError(
                f"a mask of shape {tuple(chosen.shape)} does not fit images of {height} x {width}"
            ) from None

    def restrict(self, y: Tensor) -> Tensor:
        return y * self.mask(*y.shape[-2:]).to(y.device)

    def apply(self, x: Tensor, **phi: Any) -> Tensor:
        if x.dtype not in (torch.float32, torch.float64) or x.ndim < 3:
            raise InputError(f"real images (B, *, H, W) of float32 or float64, not {x.dtype} {tuple(x.shape)}")
        return self.restrict(torch.fft.fft2(x, norm="ortho"))

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.fft.ifft2(self.restrict(y), norm="ortho").real

    def weight(self, y: Tensor) -> Tensor:
        """(m(k) + m(-k)) / 2 in the real dtype of y: 1, 1/2 where one of the pair is measured, or 0."""
        mask = self.mask(*y.shape[-2:])
        both = mask.to(y.real.dtype) + mask.flip(-2, -1).roll((1, 1), (-2, -1)).to(y.real.dtype)
        return (both / 2).to(y.device)

    def pinv(self, y: Tensor) -> Tensor:
        return self.adjoint(y / self.weight(y).clamp(min=0.5))

    def _correction(self, gap: Tensor, variance: float | Tensor) -> Tensor:
        ratio = column(variance, gap.real) / self.noise**2
        return self.adjoint(gap * (ratio / (1 + ratio * self.weight(gap))))

    def __repr__(self) -> str:
        kept = f"{tuple(self.given.shape)} mask" if self.given is not None else f"acceleration={self.numbers[0]:g}"
        return f"Fourier({kept}, noise={self.noise:g})"
