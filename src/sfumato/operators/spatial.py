"""Measurements in the image: all of it, a part of it, a blurred one, a smaller one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.core import InputError
from sfumato.core.trees import column
from sfumato.operators._registry import register
from sfumato.operators.base import Operator, check_noise


@register("identity")
class Identity(Operator):
    """y = x + noise: denoising."""

    tight = 1.0

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = check_noise(noise)

    def apply(self, x: Any, **phi: Any) -> Any:
        return x

    def adjoint(self, y: Any) -> Any:
        return y


@register("mask")
class Mask(Operator):
    """y = keep x + noise on the kept entries, 0 elsewhere: inpainting.

    keep    bool, broadcasting to an item (*); None hides, in images, a central box of ``hidden`` of each side ("box"), or
            that share of the pixels at random ("pixels", drawn by ``seed``)
    hidden  between 0 and 1
    """

    tight = 1.0

    def __init__(
        self, keep: Tensor | None = None, *, shape: str = "box", hidden: float = 0.5, seed: int = 0, noise: float = 0.0
    ) -> None:
        if keep is not None and keep.dtype != torch.bool:
            raise InputError(f"what is kept is given as a bool tensor, not {keep.dtype}")
        if shape not in ("box", "pixels") or not 0 <= hidden < 1:
            raise InputError(f"shape 'box' or 'pixels' and 0 <= hidden < 1, not {shape!r} and {hidden}")
        self.given, self.shape, self.hidden, self.seed = keep, shape, hidden, seed
        self.noise = check_noise(noise)

    def keep(self, *item: int) -> Tensor:
        """Which entries of an item of this shape are measured."""
        if self.given is not None:
            return self.given
        height, width = item[-2:] if len(item) > 1 else (1, item[-1])
        if self.shape == "pixels":
            generator = torch.Generator().manual_seed(self.seed)
            return torch.rand(height, width, generator=generator) >= self.hidden
        keep = torch.ones(height, width, dtype=torch.bool)
        top, left = round(height * self.hidden), round(width * self.hidden)
        keep[(height - top) // 2 : (height + top) // 2, (width - left) // 2 : (width + left) // 2] = False
        return keep

    def restrict(self, y: Tensor) -> Tensor:
        return y * self.keep(*y.shape[1:]).to(y.device)

    def apply(self, x: Tensor, **phi: Any) -> Tensor:
        return self.restrict(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.restrict(y)


@register("blur")
class Blur(Operator):
    """y = k * x + noise: circular convolution of images (B, *, H, W) with one kernel (h, w), its centre at (h // 2, w // 2).

    kernel  None is a Gaussian of ``std`` pixels, cut at 3 std; a kernel is used as it is given

    Diagonal in the Fourier basis, so ``pinv`` (frequencies below round-off of the largest are lost) and ``prox`` are exact.
    """

    def __init__(self, kernel: Tensor | None = None, *, std: float = 1.0, noise: float = 0.0) -> None:
        if not std > 0:
            raise InputError(f"std = {std}: a positive number of pixels")
        self.kernel = gaussian(std) if kernel is None else torch.as_tensor(kernel, dtype=torch.float64)
        if self.kernel.ndim != 2:
            raise InputError(f"a kernel is (h, w), not {tuple(self.kernel.shape)}")
        self.noise = check_noise(noise)

    def transfer(self, x: Tensor) -> Tensor:
        """The spectrum of the kernel on the size of x, (H, W // 2 + 1), complex."""
        height, width = x.shape[-2:]
        h, w = self.kernel.shape
        if h > height or w > width:
            raise InputError(f"a kernel of {h} x {w} on images of {height} x {width}: crop it, or use larger images")
        padded = torch.nn.functional.pad(self.kernel, (0, width - w, 0, height - h)).roll(
            (-(h // 2), -(w // 2)), (0, 1)
        )
        return torch.fft.rfft2(padded).to(x.device, torch.complex64 if x.dtype == torch.float32 else torch.complex128)

    def _filter(self, x: Tensor, transfer: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * transfer, s=x.shape[-2:])

    def apply(self, x: Tensor, **phi: Any) -> Tensor:
        if x.dtype not in (torch.float32, torch.float64) or x.ndim < 3:
            raise InputError(f"images (B, *, H, W) of float32 or float64, not {x.dtype} {tuple(x.shape)}")
        return self._filter(x, self.transfer(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self._filter(y, self.transfer(y).conj())

    def pinv(self, y: Tensor) -> Tensor:
        h = self.transfer(y)
        power = h.abs().square()
        kept = power > (10 * torch.finfo(y.dtype).eps) ** 2 * power.amax()
        return self._filter(y, torch.where(kept, h.conj() / torch.where(kept, power, 1.0), 0.0))

    def _correction(self, gap: Tensor, variance: float | Tensor) -> Tensor:
        h, ratio = self.transfer(gap), column(variance, gap) / self.noise**2
        return self._filter(gap, h.conj() * ratio / (1 + ratio * h.abs().square()))


class Subsample(Operator):
    """Every ``factor``-th pixel of images (B, *, H, W), from the first; sides must be divisible."""

    tight = 1.0

    def __init__(self, factor: int = 2, noise: float = 0.0) -> None:
        self.factor, self.noise = _factor(factor), check_noise(noise)

    def apply(self, x: Tensor, **phi: Any) -> Tensor:
        _divisible(x, self.factor)
        return x[..., :: self.factor, :: self.factor]

    def adjoint(self, y: Tensor) -> Tensor:
        height, width = y.shape[-2:]
        out = y.new_zeros(*y.shape[:-2], height * self.factor, width * self.factor)
        out[..., :: self.factor, :: self.factor] = y
        return out


class Downsample(Operator):
    """y = the mean of each ``factor`` x ``factor`` block + noise; sides must be divisible. A A* = I / factor^2."""

    def __init__(self, factor: int = 2, noise: float = 0.0) -> None:
        self.factor, self.noise = _factor(factor), check_noise(noise)
        self.tight = 1.0 / self.factor**2

    def apply(self, x: Tensor, **phi: Any) -> Tensor:
        _divisible(x, self.factor)
        height, width, f = x.shape[-2] // self.factor, x.shape[-1] // self.factor, self.factor
        return x.reshape(*x.shape[:-2], height, f, width, f).mean((-3, -1))

    def adjoint(self, y: Tensor) -> Tensor:
        wide = y.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)
        return wide / self.factor**2


@register("downsample")
def downsample(
    factor: int = 2, kernel: Tensor | None = None, *, std: float | None = None, noise: float = 0.0
) -> Operator:
    """A smaller image: the mean of blocks, or with a ``kernel`` (or a Gaussian of ``std`` pixels) a blur and every factor-th
    pixel, ``Subsample @ Blur``."""
    if kernel is None and std is None:
        return Downsample(factor, noise)
    return Subsample(factor, noise) @ Blur(kernel, std=1.0 if std is None else std)


def gaussian(std: float) -> Tensor:
    """A Gaussian kernel of sum 1, cut at 3 std, float64 (h, h) of odd side."""
    reach = max(1, round(3 * std))
    one = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / std) ** 2)
    return torch.outer(one, one) / one.sum() ** 2


def _factor(factor: int) -> int:
    if not (isinstance(factor, int) and factor >= 1):
        raise InputError(f"factor = {factor!r}: a whole number of pixels, at least 1")
    return factor


def _divisible(x: Tensor, factor: int) -> None:
    if x.ndim < 3 or x.shape[-1] % factor or x.shape[-2] % factor:
        raise InputError(f"images (B, *, H, W) with sides divisible by {factor}, not {tuple(x.shape)}")
