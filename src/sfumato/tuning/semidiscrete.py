"""Semi-discrete optimal transport: a law with a density to finitely many targets, each given its share of the mass.

For the cost |x - y|^2 / 2 the optimal map is T(x) = y_i with i = argmax_i <x, y_i> + h_i, the gradient of the convex
potential u(x) = max_i <x, y_i> + h_i. The heights minimise E(h) = E u(x) - sum_i nu_i h_i (the negative of the dual), whose
gradient is w_i(h) - nu_i with w_i the mass of the cell {x : T(x) = y_i}.
Source: Li, Li, Wang, Lei, Luo, Gu, 2023, "DPM-OT: A New Diffusion Probabilistic Model Based on Optimal Transport"; theory:
Gu, Luo, Sun, Yau, 2013, "Variational Principles for Minkowski Type Problems, Discrete Optimal Transport, and Discrete
Monge-Ampere Equations".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sfumato.core import Context, InputError, SfumatoError, linear, mix

SOURCES = ("normal", "uniform")
BLOCK = 1 << 22  # scores held at once
GAIN, DECAY, MOMENTUM = 0.3, 0.7, 0.9  # stable on the line too, where neighbouring cells pull at each other most


class NotConverged(SfumatoError):
    """The stated tolerance was not reached; the message says how far it got and what to try."""


class Progress(NamedTuple):
    """A round of the ascent: steps taken so far, source points drawn so far, and the error of the cells' masses.

    ``error`` is the root of an unbiased estimate of chi^2(w | nu) = sum_i (w_i - nu_i)^2 / nu_i on points that no step has
    seen: the root mean square relative error of a cell's mass.
    """

    steps: int
    points: int
    error: float


@dataclass(frozen=True, eq=False)
class SemiDiscrete:
    """The map T(x) = y_i, i = argmax_i <x, y_i> + h_i: targets (n, *), heights (n,), masses nu (n,)."""

    targets: Tensor
    heights: Tensor
    masses: Tensor
    progress: tuple[Progress, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        n = len(self.targets)
        if self.targets.ndim < 2 or self.heights.shape != (n,) or self.masses.shape != (n,):
            raise InputError(
                f"targets (n, *), heights (n,) and masses (n,) are wanted, not {tuple(self.targets.shape)}, "
                f"{tuple(self.heights.shape)} and {tuple(self.masses.shape)}"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """T(x), (B, *), in the dtype of x."""
        return self.targets.to(x)[self.cells(x)]

    def cells(self, x: Tensor) -> Tensor:
        """The index of the target of each x (B, *), (B,) int64."""
        return self.margins(x)[0]

    def margins(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(cells, margins): by how much the best <x, y_i> + h_i exceeds the second best, (B,) each. 0 is a cell's wall."""
        if x.shape[1:] != self.targets.shape[1:]:
            raise InputError(f"targets are {tuple(self.targets.shape[1:])} and points {tuple(x.shape[1:])}")
        return _best(x.flatten(1), _centred(self.targets).to(x), self.heights.to(x))

    def shares(self, x: Tensor) -> Tensor:
        """The share of the points x (S, *) in each cell, (n,) float64."""
        return torch.bincount(self.cells(x), minlength=len(self.targets)).double() / len(x)

    def cost(self, x: Tensor) -> float:
        """The mean of |x - T(x)|^2 over points x (S, *)."""
        return float((x - self(x)).double().flatten(1).square().sum(1).mean())


@dataclass(frozen=True, eq=False)
class TransportStart:
    """A start at ``time``: the prior's noise, carried by a transport map to one of its stored states there.

    map       whose targets are states x_time of the process, in solver coordinates
    time      where a run begins: ``trajectory(x=start(process, shape, ctx), start=start.time, ctx=ctx)``
    source    the law the map was solved for, 'normal' | 'uniform'
    tuned_on  what the targets were made from, JSON-able

    There are as many starts as targets, so a deterministic solver has as many results; use a stochastic one, or an early
    (noisy) time. With exact masses the law of a start is that of a target drawn at random; the map adds which noise gives
    which, so nearby noises give the same image.
    """

    map: SemiDiscrete
    time: float
    source: str = "normal"
    tuned_on: Mapping[str, Any] = field(default_factory=dict)

    name: ClassVar[str] = "transport"

    def __post_init__(self) -> None:
        if not 0 < self.time <= 1 or self.source not in SOURCES:
            raise InputError(f"0 < time <= 1 and a source of {', '.join(SOURCES)}, not {self.time} and {self.source!r}")

    def __call__(self, process: Any, shape: Sequence[int], ctx: Context) -> Tensor:
        """x at ``time``, raw (the anchor of an anchored process is added), from the noise of ``ctx``: (B, *)."""
        like = torch.empty(tuple(shape), dtype=ctx.dtype, device=ctx.device)
        if ctx.rng is None:
            raise InputError("this context may not draw (seed=None), but a start is drawn")
        noise: Any = ctx.draw(process.space, like) if self.source == "normal" else ctx.rng.uniform(like)
        return linear(1.0, self.map(noise), 1.0, process.anchor(self.time, ctx.cond))  # type: ignore[no-any-return]

    def tensors(self) -> dict[str, Tensor]:
        """What a card keeps as tensors."""
        return {"targets": self.map.targets, "heights": self.map.heights, "masses": self.map.masses}

    def config(self) -> dict[str, Any]:
        """What a card keeps as JSON: all but the tensors."""
        progress = [list(p) for p in self.map.progress]
        return {"time": self.time, "source": self.source, "tuned_on": dict(self.tuned_on), "progress": progress}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> TransportStart:
        """From what :meth:`tensors` and :meth:`config` gave."""
        fields = dict(config)
        progress = tuple(Progress(*p) for p in fields.pop("progress", ()))
        return TransportStart(SemiDiscrete(**tensors, progress=progress), **fields)


def _centred(targets: Tensor) -> Tensor:
    """Targets (n, d) less their mean: it moves all scores alike, and without it they may dwarf their differences."""
    flat = targets.flatten(1)
    return flat - flat.mean(0)


def _best(x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(cells, margins) of points x (B, d) for centred targets y (n, d) and heights h (n,), in blocks."""
    cells, margins = [], []
    for part in x.split(max(1, BLOCK // len(y))):
        top = torch.addmm(h, part, y.T).topk(min(2, len(y)), dim=1)
        cells.append(top.indices[:, 0])
        margins.append(top.values[:, 0] - top.values[:, -1])
    return torch.cat(cells), torch.cat(margins)


def solve(
    targets: Tensor,
    *,
    masses: Tensor | None = None,
    source: str | Tensor = "normal",
    tolerance: float = 0.1,
    batch: int | None = None,
    rounds: int = 8,
    first: int = 32,
    seed: int = 0,
) -> SemiDiscrete:
    """The optimal map of ``source`` to ``targets`` (n, *) by stochastic ascent on the dual.

    masses     nu (n,), positive (default: equal); they are scaled to the sum 1
    source     'normal' N(0, I) | 'uniform' on [0, 1]^d | points (N, *) drawn with replacement
    tolerance  of the cells' masses: the root mean square relative error, sqrt(chi^2(w | nu)), estimated without bias on
               fresh points (4 sqrt(2 n) / tolerance^2 of them a round, 10 n at least); the ascent stops at the end of the
               first round that reaches it and leaves no cell empty
    batch      source points a step (default 4 n)
    rounds     round r takes ``first`` 2^r steps from the mean of the heights of the round before, with a gain 0.7^r times
               the first

    A step is h_i -= gain m (w_i / nu_i - 1) with momentum, w the shares of a batch and m the mean margin between the best and
    the second best target: dw_i / dh_i is about w_i / m, so this is Newton's step with an estimated diagonal and no scale has
    to be given. (The published steps are Adam's, with a rate in units of the data and a stop on the gradient's norm.)
    Raises NotConverged where the tolerance is not reached, InputError for impossible arguments.
    """
    y, nu = _checked(targets, masses, tolerance)
    draw, mean, std = _source(source, y, tuple(targets.shape[1:]))
    n, flat = len(y), _centred(y)
    size = 4 * n if batch is None else batch
    tests = max(10 * n, math.ceil(4 * math.sqrt(2 * n) / tolerance**2))  # the error of the estimate is a quarter of it
    generator = torch.Generator().manual_seed(mix(seed, 1) & 0xFFFFFFFF)
    # Cells are alike at first: the best of n normal scores of spread s has about s sqrt(2 log n).
    h = -math.sqrt(2 * math.log(max(n, 2))) * std * flat.norm(dim=1) - flat @ mean.to(flat)
    progress: list[Progress] = []
    for r in range(rounds):
        h = _round(h, flat, nu, draw, size, first * 2**r, GAIN * DECAY**r, generator)
        done = SemiDiscrete(y, h, nu, tuple(progress))
        steps = first * (2 ** (r + 1) - 1)
        shares, error = _error(done, draw, tests, generator)
        progress.append(Progress(steps, steps * size + (r + 1) * tests, error))
        if error <= tolerance and bool((shares > 0).all()):
            return SemiDiscrete(targets, h, nu, tuple(progress))
    raise NotConverged(
        f"{progress[-1].steps} steps of {size} points left the cells' masses {progress[-1].error:.3g} off (relative, root mean "
        f"square), the tolerance is {tolerance:g}: allow more rounds or a larger batch, or accept a larger tolerance"
    )


def _round(
    h: Tensor, y: Tensor, nu: Tensor, draw: Any, size: int, steps: int, gain: float, generator: torch.Generator
) -> Tensor:
    """Steps of one gain, and the mean of the heights over the later half of them."""
    total, speed = torch.zeros_like(h), torch.zeros_like(h)
    for k in range(steps):
        cells, margins = _best(draw(size, generator), y, h)
        excess = torch.bincount(cells, minlength=len(y)).to(h) / (size * nu) - 1
        # Far off, the model of a step is not good: a crowded cell counts as one of five times its mass at most.
        speed = MOMENTUM * speed - gain * margins.mean() * excess.clamp(max=4.0)
        h = h + speed - (h + speed).mean()
        if k >= steps // 2:
            total += h
    return total / (steps - steps // 2)


def _error(done: SemiDiscrete, draw: Any, points: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """The shares of fresh points in the cells, and the root of the unbiased estimate of chi^2(w | nu)."""
    counts = torch.zeros(len(done.masses), dtype=torch.float64)
    left = points
    while left > 0:
        x = draw(min(left, 1 << 16), generator)
        counts += torch.bincount(done.cells(x), minlength=len(counts)).cpu()
        left -= len(x)
    w, nu = counts / points, done.masses.double().cpu()
    square = ((w - nu).square() - w * (1 - w) / (points - 1)) / nu
    return w, math.sqrt(max(float(square.sum()), 0.0))


def _checked(targets: Tensor, masses: Tensor | None, tolerance: float) -> tuple[Tensor, Tensor]:
    """Targets as rows (n, d) of at least float32, and their masses scaled to the sum 1; InputError for impossible ones."""
    if not targets.is_floating_point() or targets.ndim < 2 or not len(targets) or not bool(targets.isfinite().all()):
        raise InputError(f"targets: finite floating-point (n, *) is wanted, not {targets.dtype} {tuple(targets.shape)}")
    if not tolerance > 0:
        raise InputError(f"tolerance = {tolerance}: a positive relative error, e.g. 0.1")
    y, n = targets.flatten(1).to(torch.promote_types(targets.dtype, torch.float32)), len(targets)
    nu = torch.ones(n).to(y) if masses is None else torch.as_tensor(masses).to(y)
    if nu.shape != (n,) or not bool((nu > 0).all()):
        raise InputError(f"masses: {n} positive numbers are wanted, one a target, not {tuple(nu.shape)}")
    return y, nu / nu.sum()


def _source(source: str | Tensor, y: Tensor, event: tuple[int, ...]) -> tuple[Any, Tensor, float]:
    """(size, generator) -> points (size, d), with their mean and standard deviation."""
    d = y.shape[1]
    if isinstance(source, Tensor):
        if source.shape[1:] != event or not len(source):
            raise InputError(f"a source of points (N, *) is shaped like the targets {event}, not {tuple(source.shape)}")
        points = source.flatten(1).to(y)
        mean = points.mean(0)
        std = float((points - mean).square().mean().sqrt())
        return lambda size, g: points[torch.randint(len(points), (size,), generator=g)], mean, std
    if source == "normal":
        return lambda size, g: torch.randn(size, d, generator=g, dtype=y.dtype).to(y), torch.zeros(d), 1.0
    if source == "uniform":
        return lambda size, g: torch.rand(size, d, generator=g, dtype=y.dtype).to(y), torch.full((d,), 0.5), 12**-0.5
    raise InputError(f"source {source!r}: use 'normal', 'uniform' or a tensor of points (N, *)")
