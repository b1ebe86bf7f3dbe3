"""Discretisations of the reverse stochastic differential equation, and Langevin correction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, InputError, Solver, Step, Times, linear
from sfumato.processes.base import root
from sfumato.solvers._registry import register


@register("euler-maruyama")
@dataclass(frozen=True)
class EulerMaruyama(Solver):
    """dx = flow dt - (eta^2 / 2) g^2 score dt + eta g dw, run from t down to s, with one call a step.

    x_s = x_t + (alpha_s - alpha_t) x0 + (sigma_s - sigma_t) eps - eta^2 G / (2 sigma_t) eps + eta sqrt(G) z, where
    G = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2 is the exact integral of g^2 over the step (finite at alpha = 0).
    Any eta has the same marginals in the limit; eta = 0 is DDIM. A step that ends at sigma = 0 returns the mean.
    Source: Song et al. 2021, "Score-Based Generative Modeling through SDEs" (eta = 1); Zhang & Chen 2021.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise InputError(f"eta = {self.eta}: not negative")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        process = denoiser.process
        noise = ctx.draw(process.space, st.x)
        a, b = process.coef(st.t), process.coef(s)
        post = denoiser(st.x, st.t, ctx)
        if self.eta == 0 or (isinstance(b.sigma, float) and b.sigma == 0):
            return Step(post.at(b.alpha, b.sigma), s)
        std = root(a.sigma**2 - (a.alpha / b.alpha * b.sigma) ** 2)
        drift = post.at(b.alpha - a.alpha, b.sigma - a.sigma - (self.eta * std) ** 2 / (2 * a.sigma))
        return Step(linear(1.0, st.x, 1.0, drift, self.eta * std, noise), s)


@dataclass(frozen=True)
class PredictorCorrector(Solver):
    """A predictor step, then ``corrections`` Langevin steps at the new time: x - d sigma eps + sqrt(2 d) sigma z.

    The step d sigma^2 is relative to the noise level, as NCSN's a_i = eps0 sigma_i^2 / sigma_L^2, so one item never sets
    another's step. No correction where sigma = 0. Without a predictor it is annealed Langevin dynamics: the state is only
    rescaled between levels (by alpha, so it stays put in variance-exploding coordinates), and the run ends with the mean.
    Source: Song et al. 2021, algorithms 2 and 3; Song & Ermon, 2019, "Generative Modeling by Estimating Gradients of the
    Data Distribution".
    """

    predictor: Solver | None = None
    corrections: int = 1
    step_size: float = 0.03

    stochastic = True

    def __post_init__(self) -> None:
        if self.corrections < 1 or not 0 < self.step_size < 1:
            raise InputError(f"corrections >= 1 and 0 < step_size < 1, not {self.corrections} and {self.step_size}")

    @property
    def nfe(self) -> float:  # type: ignore[override]
        return (self.predictor.nfe if self.predictor else 0.0) + self.corrections

    def init(self, x: Any, t: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return self.predictor.init(x, t, denoiser, ctx) if self.predictor else Step(x, t)

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        process = denoiser.process
        b = process.coef(s)
        st = self.predictor.step(st, s, denoiser, ctx) if self.predictor else self._anneal(st, s, denoiser, ctx)
        if isinstance(b.sigma, float) and b.sigma == 0:
            return st
        x, d = st.x, self.step_size
        for _ in range(self.corrections):
            noise = ctx.draw(process.space, x)
            eps = denoiser(x, s, ctx).view("eps")
            x = linear(1.0, x, -d * b.sigma, eps, math.sqrt(2 * d) * b.sigma, noise)
        return Step(x, s, st.carry)

    def _anneal(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        a, b = denoiser.process.coef(st.t), denoiser.process.coef(s)
        if isinstance(b.sigma, float) and b.sigma == 0:
            return Step(denoiser(st.x, st.t, ctx).at(b.alpha, 0.0), s)
        if isinstance(a.alpha, Tensor):
            ratio = torch.where(a.alpha == 0, b.sigma / a.sigma, b.alpha / a.alpha)
        else:
            ratio = b.alpha / a.alpha if a.alpha else b.sigma / a.sigma
        return Step(linear(ratio, st.x), s)


@register("predictor-corrector", "pc")
def predictor_corrector(eta: float = 1.0, corrections: int = 1, step_size: float = 0.03) -> PredictorCorrector:
    """Ancestral prediction with Langevin correction (Song et al. 2021)."""
    from sfumato.solvers.ancestral import Ancestral

    return PredictorCorrector(Ancestral(eta), corrections, step_size)


@register("annealed-langevin")
def annealed_langevin(corrections: int = 5, step_size: float = 0.1) -> PredictorCorrector:
    """NCSN's sampler: Langevin dynamics at a falling sequence of noise levels (Song & Ermon, 2019)."""
    return PredictorCorrector(None, corrections, step_size)
