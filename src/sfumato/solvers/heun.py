"""Heun's method, and the stochastic sampler built on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sfumato.core import Context, Denoiser, InputError, Solver, Step, Times, Wrap, linear
from sfumato.solvers._registry import register


@register("heun")
@dataclass(frozen=True)
class Heun(Solver):
    """The trapezoid rule in (alpha, sigma): two calls, order 2.

    x_s = x_t + (alpha_s - alpha_t) (x0_t + x0_s) / 2 + (sigma_s - sigma_t) (eps_t + eps_s) / 2,
    where the second belief is read at the DDIM prediction. With alpha = 1 it is Karras et al.'s Heun in sigma; for Flow it
    is the plain Heun step. A step that ends at sigma = 0 is a DDIM step of one call, since networks are not trained there.
    Source: Karras, Aittala, Aila, Laine, 2022, "Elucidating the Design Space of Diffusion-Based Generative Models".
    """

    order = 2
    nfe = 2.0

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        a, b = denoiser.process.coef(st.t), denoiser.process.coef(s)
        post = denoiser(st.x, st.t, ctx)
        x = post.at(b.alpha, b.sigma)
        if isinstance(b.sigma, float) and b.sigma == 0:
            return Step(x, s)
        da, ds = (b.alpha - a.alpha) / 2, (b.sigma - a.sigma) / 2
        ahead = denoiser(x, s, ctx)
        return Step(linear(1.0, st.x, 1.0, post.at(da, ds), 1.0, ahead.at(da, ds)), s)


@register("edm")
@dataclass(frozen=True)
class EDMStochastic(Wrap):
    """Heun with churn: before each step, go back up to sigma-hat (1 + gamma) with fresh noise.

    gamma = min(churn / n, sqrt(2) - 1) while low <= sigma / alpha <= high, else 0; ``noise`` scales the added noise's std.
    Works in any Gaussian process through ``renoise``; where alpha = 0 there is nothing left to churn. churn = 0 is Heun.
    Source: Karras et al. 2022, algorithm 2 (their S_churn, S_tmin, S_tmax, S_noise).
    """

    churn: float = 40.0
    low: float = 0.05
    high: float = 50.0
    noise: float = 1.003
    inner: Solver = Heun()

    def __post_init__(self) -> None:
        if self.churn < 0 or self.noise < 0 or not 0 <= self.low <= self.high:
            raise InputError(f"churn and noise must not be negative and 0 <= low <= high, not {self}")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.churn > 0

    @property
    def order(self) -> int:  # type: ignore[override]
        return 1 if self.churn else self.inner.order

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        if not self.churn:
            return self.inner.step(st, s, denoiser, ctx)
        process = denoiser.process
        fresh = ctx.draw(process.space, st.x)
        up = self._up(process, st.t, ctx)
        if up == st.t:
            return self.inner.step(st, s, denoiser, ctx)
        x = process.renoise(st.x, st.t, up, linear(self.noise, fresh))
        return self.inner.step(Step(x, up, st.carry, st.index), s, denoiser, ctx)

    def _up(self, process: Any, t: Any, ctx: Context) -> Any:
        if not isinstance(t, float) or ctx.run.total is None:
            raise InputError("churn needs one clock for the batch and a known number of steps")
        c = process.coef(t)
        if c.alpha == 0 or c.sigma == 0 or not self.low <= c.sigma / c.alpha <= self.high:
            return t
        gamma = min(self.churn / ctx.run.total, math.sqrt(2) - 1)
        floor = process.coef(1.0).lam
        return min(max(process.time(max(c.lam - math.log1p(gamma), floor)), t), 1.0)
