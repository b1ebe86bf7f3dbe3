"""Uniform affine quantisers and the search for their ranges."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato.core import InputError

SEARCHES = ("lp", "minmax", "cosine", "kl")
BINS, SHARES, LEAST = 4096, 20, 1e-8


def levels(bits: int) -> int:
    """2^bits. Raises InputError outside 2..16."""
    if not (isinstance(bits, int) and 2 <= bits <= 16):
        raise InputError(f"bits = {bits!r}: a whole number from 2 to 16")
    return 1 << bits


class Quantizer(NamedTuple):
    """Q(x) = scale (code - zero), code = clamp(round(x / scale) + zero, 0, 2^bits - 1); |x - Q(x)| <= scale / 2 within range.

    scale is a number, or a tensor that broadcasts against x (one a channel). Q(Q(x)) = Q(x).
    """

    scale: Any
    zero: int
    bits: int

    @property
    def low(self) -> Any:
        """The least value it can say."""
        return -self.zero * self.scale

    @property
    def high(self) -> Any:
        """The greatest value it can say."""
        return ((1 << self.bits) - 1 - self.zero) * self.scale

    def steps(self, x: Tensor) -> Tensor:
        """code - zero, as numbers of the dtype of x."""
        return x.clamp(self.low, self.high).mul_(1 / self.scale).round_()

    def __call__(self, x: Tensor) -> Tensor:
        """Q(x). Its gradient is 1 within the range and 0 outside: straight through the rounding."""
        if torch.is_grad_enabled() and x.requires_grad:
            held = x.clamp(self.low, self.high)
            return held + (self.steps(x.detach()).mul_(self.scale) - held).detach()
        return self.steps(x).mul_(self.scale)


def quantizer(low: float, high: float, bits: int) -> Quantizer:
    """The quantiser of a range, widened to hold 0: scale = (high - low) / (2^bits - 1), zero = -round(low / scale)."""
    top, low, high = levels(bits) - 1, min(float(low), 0.0), max(float(high), 0.0)
    if not (low > -float("inf") and high < float("inf")):
        raise InputError(f"range ({low}, {high}): it must be finite")
    scale = max((high - low) / top, LEAST)
    return Quantizer(scale, min(max(round(-low / scale), 0), top), bits)


def per_channel(weight: Tensor, bits: int, p: float = 2.4, candidates: int = 50) -> Quantizer:
    """Symmetric quantisers of a weight (out, ...), one an output channel, of the least sum |w - Q(w)|^p.

    Ranges +-(i / candidates) max |w| are tried, i = 1 .. candidates; the zero is 2^(bits - 1), so that codes are signed
    numbers.
    """
    half, rows = levels(bits) // 2, weight.detach().flatten(1)
    whole = rows.abs().amax(1, keepdim=True)
    best, scale = torch.full_like(whole, float("inf")), torch.ones_like(whole)
    for i in range(1, candidates + 1):
        trial = (whole * (2 * i / candidates / (2 * half - 1))).clamp(min=LEAST)
        error = (rows - Quantizer(trial, half, bits)(rows)).abs_().pow_(p).sum(1, keepdim=True)
        scale, best = torch.where(error < best, trial, scale), torch.minimum(best, error)
    return Quantizer(scale.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1)), half, bits)


def search(values: Tensor, bits: int, method: str = "lp", p: float = 2.4, symmetric: bool = False) -> Quantizer:
    """The quantiser of a sample of values that serves them best.

    'lp'      least mean |x - Q(x)|^p (p = 2 is the mean squared error)
    'minmax'  the whole range
    'cosine'  greatest cosine of x with Q(x)
    'kl'      least KL divergence of the histogram of x from that of Q(x), what falls outside counted at the edge

    Tried are (i / 100) of the greatest magnitude, i = 1 .. 100, on both sides (``symmetric``) or on the one side where all
    values lie; otherwise the shares i / 20 of the least value with the shares j / 20 of the greatest. Scores come from a
    histogram of 4096 bins. Raises InputError for values that are not finite. Source: Shang, Yuan, Xie, Wu, Yan, 2023,
    "Post-training Quantization on Diffusion Models".
    """
    if method not in SEARCHES:
        raise InputError(f"search = {method!r}: one of {', '.join(SEARCHES)}")
    values = values.detach().flatten().float()
    if not len(values) or not bool(torch.isfinite(values).all()):
        raise InputError("a range needs at least one value, and finite ones only")
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if method == "minmax" or low == high:
        edge = max(-low, high)
        return quantizer(-edge, edge, bits) if symmetric else quantizer(low, high, bits)
    tried = [quantizer(a, b, bits) for a, b in _ranges(low, high, symmetric)]
    centres, mass = _histogram(values, low, high)
    scale = torch.tensor([q.scale for q in tried], dtype=torch.float64)[:, None]
    zero = torch.tensor([q.zero for q in tried], dtype=torch.float64)[:, None]
    centres, mass, scale, zero = (v.float() for v in (centres, mass, scale, zero))  # powers of float64 are slow
    codes = (centres / scale).round_().add_(zero).clamp_(min=0, max=levels(bits) - 1)
    if method == "kl":
        scores = _divergence(codes.long(), mass, centres, scale, zero, levels(bits))
    else:
        found = (codes - zero) * scale
        scores = _distances(centres, found, mass, p) if method == "lp" else _angles(centres, found, mass)
    return tried[int(scores.argmin())]


def _ranges(low: float, high: float, symmetric: bool) -> list[tuple[float, float]]:
    """The ranges that are tried."""
    edge, hundred = max(-low, high), [i / 100 for i in range(1, 101)]
    if symmetric:
        return [(-s * edge, s * edge) for s in hundred]
    if low == 0 or high == 0:
        return [(s * low, s * high) for s in hundred]
    shares = [i / SHARES for i in range(1, SHARES + 1)]
    return [(a * low, b * high) for a in shares for b in shares]


def _histogram(values: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Centres and masses of the bins that hold anything."""
    counts = torch.histc(values, BINS, low, high).double()
    width = (high - low) / BINS
    centres = low + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)
    held = counts > 0
    return centres[held], counts[held] / counts.sum()


def _distances(x: Tensor, found: Tensor, mass: Tensor, p: float) -> Tensor:
    return (found - x).abs_().pow_(p) @ mass


def _angles(x: Tensor, found: Tensor, mass: Tensor) -> Tensor:
    return -(found @ (mass * x)) / ((found.square() @ mass) * (x.square() @ mass)).sqrt().clamp(min=1e-30)


def _divergence(codes: Tensor, mass: Tensor, x: Tensor, scale: Tensor, zero: Tensor, n: int) -> Tensor:
    """KL(P || Q) of each trial: P with what is cut off in its edge bins, Q the mass within, spread evenly over each code."""
    within = ((x >= (-zero - 0.5) * scale) & (x <= (n - 0.5 - zero) * scale)).float()
    held = torch.zeros(len(codes), n).scatter_add_(1, codes, within * mass)
    bins = torch.zeros_like(held).scatter_add_(1, codes, within)
    q = (held / bins.clamp(min=1)).gather(1, codes) * within
    q = q / q.sum(1, keepdim=True).clamp(min=1e-30)
    whole = mass * within
    for side in (-1, 1):
        cut = ((1 - within) * mass * (x.sign() == side)).sum(1)
        index = torch.arange(len(x)).expand_as(within)
        edge = (torch.where(within > 0, index, -1).amax(1) if side > 0 else torch.where(within > 0, index, len(x)).amin(1)).clamp(0, len(x) - 1)  # fmt: skip
        whole = whole.scatter_add(1, edge[:, None], cut[:, None])
    return torch.where(whole > 0, whole * (whole.clamp(min=1e-30) / q.clamp(min=1e-12)).log(), 0.0).sum(1)


__all__ = ["SEARCHES", "Quantizer", "levels", "per_channel", "quantizer", "search"]
