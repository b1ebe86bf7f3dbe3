"""What the recipes of solvers share: digits whose belief is known exactly, the bundled network, errors and their pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sfumato import grids, load, solvers
from sfumato.core import Context, Denoiser, Streams, mix, sample
from sfumato.denoisers.mixtures import Mixture
from sfumato.denoisers.oracles import Gaussian
from sfumato.evaluation import PCAFeatures
from sfumato.evaluation.metrics import frechet_distance
from sfumato.guidance import cfg
from sfumato.processes import VP
from sfumato.recipes import _plots as plots
from sfumato.recipes._small import digits, pictures

GREY = "#97a3ad"
STOP = 1e-3  # where the published experiments on a continuous schedule end
FINE = "dpm-solver++(order=4, variable='angle', corrector=True, last=2)"
DATA = "scikit-learn digits (8 x 8 in [-1, 1]): one Gaussian a class, covariance + 0.01 I, so that the belief is exact"


@cache
def law() -> Mixture:
    """One full Gaussian a class, fitted to all 1,797 digits."""
    x, labels, _ = digits()
    each = [x[labels == k].double() for k in range(10)]
    floor = 0.01 * torch.eye(64, dtype=torch.float64)
    return Mixture([Gaussian(v.mean(0), torch.cov(v.T) + floor) for v in each], [float(len(v)) for v in each])


@dataclass
class Bed:
    """A denoiser with n starts and the ends of its probability flow: solvers are measured by their errors there.

    fine  steps of the reference, ``rows`` what one call evaluates for an item (2 under guidance, and still one call)
    """

    denoiser: Denoiser
    x: Tensor
    cond: Mapping[str, Any]
    fine: int
    rows: int = 1
    stop: float = STOP
    batch: int = 256
    seen: dict[Any, tuple[Tensor, float]] = field(default_factory=dict)

    @property
    def end(self) -> Tensor:
        """The ends, by an order-4 solver with ``fine`` steps."""
        return self.run(FINE, self.fine, "arctan")[0]

    def run(self, solver: Any, steps: int, grid: str = "uniform") -> tuple[Tensor, float]:
        """The ends that this solver (a spec or an object) finds, and its calls of the denoiser. Runs are kept."""
        key = (solver, steps, grid)
        if key not in self.seen:
            made = solvers.registry.make(solver) if isinstance(solver, str) else solver
            ends, calls = [], 0.0
            for i in range(0, len(self.x), self.batch):
                part = {k: v[i : i + self.batch] for k, v in self.cond.items()}
                x = self.x[i : i + self.batch]
                ctx = Context.of(len(x), list(range(i, i + len(x))), cond=part, dtype=x.dtype)
                spaced = grids.registry.make(grid)
                ends.append(sample(self.denoiser, made, spaced, steps, x=x, stop=self.stop, ctx=ctx))
                calls = max(calls, ctx.run.nfe)
            self.seen[key] = torch.cat(ends), calls / self.rows
        return self.seen[key]

    def errors(self, solver: Any, steps: int, grid: str = "uniform") -> Tensor:
        """Root mean square over the pixels, (n,)."""
        off = self.run(solver, steps, grid)[0] - self.end
        return off.flatten(1).square().mean(1).sqrt()

    def error(self, solver: Any, steps: int, grid: str = "uniform") -> float:
        """The median over the items: a mean would be that of the few that sit on the border of two basins."""
        return float(self.errors(solver, steps, grid).median())

    def diverged(self, solver: Any, steps: int, grid: str = "uniform") -> float:
        """The share of items with a pixel beyond 5 times the largest of all ends."""
        return float(
            (~(self.run(solver, steps, grid)[0].flatten(1).abs().amax(1) <= 5 * self.end.abs().max())).float().mean()
        )

    def curve(self, solver: Any, steps: Sequence[int], grid: str = "uniform") -> list[tuple[float, float]]:
        """(calls, median error) for each number of steps."""
        return [(self.run(solver, n, grid)[1], self.error(solver, n, grid)) for n in steps]


def exact(seed: int, part: int, n: int = 256, scale: float = 1.0, fine: int = 400) -> Bed:
    """n starts under VP, with the exact class guidance of this scale towards the ten classes in turn (1: no class)."""
    base, k = law().labelled(VP()), torch.arange(n) % 10
    x = VP().coef(1.0).sigma * Streams.of(mix(seed, part), n).normal(torch.empty(n, 64, dtype=torch.float64))
    if scale == 1:
        return Bed(base, x, {"label": torch.full_like(k, 10)}, fine)
    return Bed(cfg(scale)(base), x, {"label": k}, fine, rows=2)


def network(seed: int, part: int, n: int, scale: float = 1.0, fine: int = 60) -> Bed:
    """n starts of the bundled class-conditional network, classes in turn under guidance (scale 1: no class)."""
    pipeline, k = load("digits"), torch.arange(n) % 10
    x = Streams.of(mix(seed, part), n).normal(torch.empty(n, 1, 8, 8))
    told = {"y": k if scale != 1 else torch.full_like(k, 10)}
    return Bed(pipeline.guided(scale), x, told, fine, rows=1 if scale == 1 else 2)


class Distance:
    """Fréchet distance to the 297 digits that the bundled network has not seen, in 16 principal components of the others."""

    def __init__(self) -> None:
        x = digits().x
        self.features = PCAFeatures(pictures(x[:1500]), 16)
        self.reference = self.features(pictures(x[1500:]))

    def __call__(self, x: Tensor) -> float:
        return frechet_distance(self.features(pictures(x.flatten(1))), self.reference).value


def slope(curve: Sequence[tuple[float, float]]) -> float:
    """The order that a curve of (calls, error) shows: minus its least-squares slope in logarithms."""
    a, b = (torch.tensor([math.log(p[i]) for p in curve]) for i in (0, 1))
    return float(-((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum())


def draw(ax: Any, curves: Mapping[str, tuple[Sequence[tuple[float, float]], str, str]], **labels: Any) -> None:
    """Curves by name, each (points, colour, line style), on logarithmic axes."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    for name, (points, colour, line) in curves.items():
        ax.plot(*zip(*points, strict=True), line, color=colour, marker="o", ms=3.5, lw=1.6, label=name)
    ax.set(xscale="log", yscale="log", **labels)
    low, high = ax.get_xlim()
    ticks = [v for v in (5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 250, 500, 1000, 2000) if low <= v <= high]
    wide = len(ticks) > 8
    ticks = [v for v in ticks if not (wide and v in (7, 15, 30, 70, 150))]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(color=plots.PALE, lw=0.5, which="major")
    ax.tick_params(length=0, which="both")


def strip(ax: Any, x: Tensor, title: str, columns: int = 10) -> None:
    """Digits in rows of ``columns``, ink on paper."""
    plots.show(ax, 255 - pictures(x.flatten(1)), columns, 1)
    ax.set_title(title, loc="left", fontsize=9)
