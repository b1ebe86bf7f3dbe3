"""At which times a denoiser is trained: samplers of t with their importance weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sfumato.core import InputError, Streams

Times: TypeAlias = Callable[[Any, Streams], tuple[Tensor, Tensor]]
"""(process, streams) -> (t, weight), both float64 (B,): mean(weight f(t)) estimates the mean of f that the sampler says."""

GOLDEN = 0.6180339887498949
SHARED = (1 << 31) - 1  # the stream of a batch's common offset: no item has this index


def unit(streams: Streams, stratified: bool = False) -> Tensor:
    """One uniform number of [0, 1) an item, float64.

    ``stratified`` uses the Kronecker sequence frac(u + i / golden ratio) with one u for the batch: each number is still
    uniform, and the numbers of a batch of any size, or of any contiguous slice of it, are spread evenly. Item i of the
    batch does not depend on its size. Source of the idea: Kingma, Salimans, Poole, Ho, 2021, "Variational Diffusion
    Models" (there with i / n).
    """
    if not stratified:
        return streams.uniform(torch.empty(len(streams.seeds), dtype=torch.float64))
    common = {key: Streams(((key, SHARED),), streams.step, streams.k) for key, _ in streams.seeds}
    offset = {key: float(s.uniform(torch.empty(1, dtype=torch.float64))) for key, s in common.items()}
    streams.k += 1
    return torch.tensor([(offset[key] + i * GOLDEN) % 1.0 for key, i in streams.seeds], dtype=torch.float64)


@dataclass(frozen=True)
class Uniform:
    """t uniform on [low, high]."""

    low: float = 0.0
    high: float = 1.0
    stratified: bool = True

    def __post_init__(self) -> None:
        _interval(self.low, self.high)

    def __call__(self, process: Any, streams: Streams) -> tuple[Tensor, Tensor]:
        u = unit(streams, self.stratified)
        return self.low + (self.high - self.low) * u, torch.ones_like(u)


@dataclass(frozen=True)
class LogitNormal:
    """logit(t) ~ N(mean, std^2), restricted to [low, high].

    ``unbiased`` gives the weights 1 / density that estimate the mean over uniform t in [low, high]; otherwise they are 1
    and the density is part of the objective, as published.
    Source: Esser et al., 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis".
    """

    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    high: float = 1.0
    stratified: bool = True
    unbiased: bool = False

    def __post_init__(self) -> None:
        _interval(self.low, self.high)
        if not self.std > 0:
            raise InputError(f"std = {self.std}: it is above 0")

    def __call__(self, process: Any, streams: Streams) -> tuple[Tensor, Tensor]:
        ends = [(_logit(e) - self.mean) / self.std for e in (self.low, self.high)]
        z, log_density = _truncated(unit(streams, self.stratified), *ends)
        t = torch.sigmoid(self.mean + self.std * z)
        if not self.unbiased:
            return t, torch.ones_like(t)
        density = log_density.exp() / (self.std * t * (1 - t))
        return t, 1 / (density * (self.high - self.low))


@dataclass(frozen=True)
class LogNormal:
    """ln(sigma / alpha) ~ N(mean, std^2), restricted to the times [low, high] of the process.

    ``unbiased`` as in :class:`LogitNormal`. Source: Karras, Aittala, Aila, Laine, 2022, "Elucidating the Design Space of
    Diffusion-Based Generative Models" (P_mean = -1.2, P_std = 1.2).
    """

    mean: float = -1.2
    std: float = 1.2
    low: float = 0.0
    high: float = 1.0
    stratified: bool = True
    unbiased: bool = False

    def __post_init__(self) -> None:
        _interval(self.low, self.high)
        if not self.std > 0:
            raise InputError(f"std = {self.std}: it is above 0")

    def __call__(self, process: Any, streams: Streams) -> tuple[Tensor, Tensor]:
        ends = [(-process.coef(e).lam - self.mean) / self.std for e in (self.low, self.high)]
        z, log_density = _truncated(unit(streams, self.stratified), *ends)
        log_sigma = self.mean + self.std * z
        t = torch.tensor([process.time(-s) for s in log_sigma.tolist()], dtype=torch.float64)
        if not self.unbiased:
            return t, torch.ones_like(t)
        c = process.coef(t)
        slope = c.dsigma / c.sigma - c.dalpha / c.alpha  # d ln(sigma / alpha) / dt
        return t, 1 / (log_density.exp() / self.std * slope * (self.high - self.low))


class ByLoss(nn.Module):
    """t with density proportional to the root mean square of the loss there, and the weights 1 / density.

    mean(weight loss) estimates the mean over uniform t in [low, high], with less variance. The density is a histogram of
    ``bins`` steps with ``floor`` of its mass spread evenly; a bin remembers with decay ``memory`` a loss. The histogram
    is a buffer, so it is saved; :meth:`fold` adds up over the processes, so all draw from one density. Until every bin
    has been seen the density is uniform.
    Source: Nichol & Dhariwal, 2021, "Improved Denoising Diffusion Probabilistic Models" (there: the last ten losses of
    each of 1000 steps).
    """

    def __init__(
        self,
        bins: int = 64,
        memory: float = 0.99,
        floor: float = 0.01,
        low: float = 0.0,
        high: float = 1.0,
        stratified: bool = True,
    ) -> None:
        super().__init__()
        _interval(low, high)
        if not (bins >= 1 and 0 <= memory < 1 and 0 < floor <= 1):
            raise InputError(f"bins = {bins}, memory = {memory}, floor = {floor}: at least 1, in [0, 1), in (0, 1]")
        self.memory, self.floor, self.low, self.high, self.stratified = memory, floor, low, high, stratified
        self.register_buffer("square", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("fresh", torch.zeros(2, bins, dtype=torch.float64), persistent=False)
        self.square: Tensor
        self.seen: Tensor
        self.fresh: Tensor

    def masses(self) -> Tensor:
        """The probability of each bin (bins,)."""
        n = len(self.square)
        if bool((self.seen == 0).any()) or not bool(self.square.sum() > 0):
            return torch.full_like(self.square, 1 / n)
        size = (self.square / self.seen).sqrt()
        return (1 - self.floor) * size / size.sum() + self.floor / n

    def forward(self, process: Any, streams: Streams) -> tuple[Tensor, Tensor]:
        masses = self.masses().cpu()
        edges = torch.cat([masses.new_zeros(1), masses.cumsum(0)])
        u = unit(streams, self.stratified) * edges[-1]
        bin_ = (torch.searchsorted(edges, u, right=True) - 1).clamp(max=len(masses) - 1)
        place = (bin_ + (u - edges[bin_]) / masses[bin_]) / len(masses)
        return self.low + (self.high - self.low) * place, 1 / (masses[bin_] * len(masses))

    @torch.no_grad()
    def observe(self, t: Tensor, loss: Tensor) -> None:
        """Take in the losses (B,) at times t (B,), without importance weights; they count from the next :meth:`fold` on."""
        place = ((t - self.low) / (self.high - self.low) * len(self.square)).long().clamp(0, len(self.square) - 1)
        square = loss.detach().double().square()
        self.fresh[0].index_add_(0, place.to(self.fresh.device), square.to(self.fresh.device))
        self.fresh[1].index_add_(0, place.to(self.fresh.device), torch.ones_like(square).to(self.fresh.device))

    @torch.no_grad()
    def fold(self) -> None:
        """Let the observed losses count: once an iteration, on every process."""
        if dist.is_initialized():
            dist.all_reduce(self.fresh)
        keep = self.memory ** self.fresh[1]
        self.square.mul_(keep).add_(self.fresh[0])
        self.seen.mul_(keep).add_(self.fresh[1])
        self.fresh.zero_()


def _truncated(u: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(z, log density of z) for a standard normal restricted to [low, high], by inversion of its distribution."""
    a, b = (torch.special.ndtr(torch.tensor(e, dtype=torch.float64)) for e in (low, high))
    if not bool(b > a):
        raise InputError(
            f"no mass of the normal lies between {low:g} and {high:g} standard deviations: widen low, high or std"
        )
    z = torch.special.ndtri(a + (b - a) * u.clamp(2.0**-54, 1 - 2.0**-53))
    z = z.clamp(low, high)  # rounding of the inversion
    return z, -0.5 * z * z - 0.5 * math.log(2 * math.pi) - (b - a).log()


def _logit(p: float) -> float:
    return math.log(p / (1 - p)) if 0 < p < 1 else math.copysign(math.inf, p - 0.5)


def _interval(low: float, high: float) -> None:
    if not 0 <= low < high <= 1:
        raise InputError(f"low = {low}, high = {high}: times with 0 <= low < high <= 1")
