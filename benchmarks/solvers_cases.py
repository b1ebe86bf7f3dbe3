"""What solvers are measured on: denoisers, start noises, and where the probability flow really takes them.

Exact cases know their belief in closed form; trained ones are the bundled networks with guidance 1. The ends come from
classical Runge-Kutta of order 4 in the angle, four calls a step: no solver under test has a part in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import sfumato as sf
from sfumato.core import Context, Denoiser, Streams, mix
from sfumato.denoisers.mixtures import Mixture
from sfumato.denoisers.oracles import Empirical, Gaussian, GaussianMixture

SEED = 20260
TABLE = sf.processes.DDPM("linear")  # the schedule that diffusers' schedulers are made for
EMOJI = ("red heart", "smiling face", "house", "car", "cat face", "pizza", "sun", "tree")


@dataclass(frozen=True, eq=False)
class Case:
    """``x`` (n, *) float32 starts at t = 1 and their ends (n, *) float64; ``spread`` is the rms of the ends."""

    name: str
    kind: str
    denoiser: Denoiser
    x: Tensor
    cond: Mapping[str, Tensor]
    ends: Tensor

    @property
    def spread(self) -> float:
        """An error as large as this is no solution."""
        return float(self.ends.square().mean().sqrt())

    def context(self) -> Context:
        """A run of all items."""
        return Context.of(len(self.x), SEED, cond=dict(self.cond))

    def errors(self, ends: Tensor) -> Tensor:
        """Root mean square distance of each item from its end, (n,) float64; infinite where a run diverged."""
        gap = (ends.double() - self.ends).flatten(1).square().mean(1).sqrt()
        return torch.where(gap.isfinite(), gap, math.inf)


@torch.no_grad()
def flow(denoiser: Denoiser, x: Tensor, ctx: Context, steps: int) -> Tensor:
    """The end of the probability flow: y = x / r obeys dy = v d(angle), v = (alpha eps - sigma x0) / r, and v is finite."""
    process, begin = denoiser.process, denoiser.process.coef(1.0)
    asked = next((p.dtype for p in denoiser.parameters()), torch.float64)

    def slope(y: Tensor, angle: float) -> Tensor:
        t = 1.0 if angle >= begin.angle else 0.0 if angle <= 0 else process.time(-math.log(math.tan(angle)))
        c = process.coef(t)
        r = math.hypot(c.alpha, c.sigma)
        return denoiser((r * y).to(asked), t, ctx).at(-c.sigma / r, c.alpha / r).double()

    times = sf.grids.get("arctan", lam_max=6.0)(process, steps, 1.0, 0.0).tolist()
    angles = [process.coef(t).angle for t in times]
    y = x.double() / math.hypot(begin.alpha, begin.sigma)
    for a, b in zip(angles, angles[1:], strict=False):
        h = b - a
        k1 = slope(y, a)
        k2 = slope(y + h / 2 * k1, a + h / 2)
        k3 = slope(y + h / 2 * k2, a + h / 2)
        k4 = slope(y + h * k3, b)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y  # at t = 0 r is alpha = 1


def _normal(*shape: int, part: int) -> Tensor:
    return Streams.of(mix(SEED, part), shape[0]).normal(torch.empty(shape, dtype=torch.float64))


def _uniform(*shape: int, part: int) -> Tensor:
    return Streams.of(mix(SEED, part), shape[0]).uniform(torch.empty(shape, dtype=torch.float64))


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sfumato.zoo import sets

    found = sets.load("digits", "train")
    return found.images.flatten(1).double() / 127.5 - 1, found.labels


def _peaks() -> Any:
    return GaussianMixture(_normal(16, 32, part=10), 0.3)


def _ring() -> Any:
    """Eight unequal, elongated modes on an ellipse in the plane."""
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    means = torch.stack([1.6 * angle.cos(), 1.0 * angle.sin()], 1)
    return GaussianMixture(means, 0.05 + 0.25 * _uniform(8, 2, part=11), torch.arange(1.0, 9.0))


def _wide() -> Any:
    """Twenty overlapping modes in 48 dimensions, each dimension of another width."""
    return GaussianMixture(0.7 * _normal(20, 48, part=12), 0.1 + 0.7 * _uniform(20, 48, part=13))


def _classes() -> Any:
    """One full Gaussian for each class of the digits."""
    x, labels = _digits()
    floor = 0.01 * torch.eye(64, dtype=torch.float64)
    return Mixture([Gaussian(x[labels == k].mean(0), torch.cov(x[labels == k].T) + floor) for k in range(10)])


def _spectrum() -> Any:
    """A Gaussian whose 64 variances fall from 4 to 0.001, as those of pictures do."""
    return Gaussian(0.3 * _normal(64, 1, part=14)[:, 0], torch.logspace(math.log10(4.0), -3, 64, dtype=torch.float64))


EXACT: dict[str, Callable[[], Any]] = {
    "16 peaks": _peaks,
    "digits, kernel 0.15": lambda: Empirical(_digits()[0][:400], 0.15),
    "ring": _ring,
    "wide mixture": _wide,
    "digit classes": _classes,
    "Gaussian, spectrum": _spectrum,
    "Gaussian, N(0, 0.49 I)": lambda: Gaussian(torch.zeros(32), 0.49),
    "digits, kernel 0.05": lambda: Empirical(_digits()[0][:1200], 0.05),
}
TRAINED = {"digits": (64, 128), "emoji-latent": (64, 64)}  # items, steps of Runge-Kutta


def exact(name: str, n: int = 64, steps: int = 200) -> Case:
    """One of :data:`EXACT` under diffusers' linear schedule."""
    made = EXACT[name]()
    denoiser = made.denoiser(TABLE)
    x = _starts(n, made.shape)
    return Case(name, "exact", denoiser, x, {}, flow(denoiser, x, Context.of(n, SEED), steps))


def trained(name: str, n: int, steps: int) -> Case:
    """A bundled network with guidance 1, its classes or eight prompts in turn."""
    model = sf.load(name)
    words = EMOJI if name == "emoji-latent" else next(iter(model.conditioner.classes.values()))
    cond = model.conditions(n, [words[i % len(words)] for i in range(n)])
    denoiser = model.guided(1.0).eval()
    x = _starts(n, model.codec.shape(*model.size))
    return Case(name, "trained", denoiser, x, cond, flow(denoiser, x, Context.of(n, SEED, cond=cond), steps))


def _starts(n: int, shape: tuple[int, ...]) -> Tensor:
    return Streams.of(mix(SEED, 1), n).normal(torch.empty(n, *shape))
