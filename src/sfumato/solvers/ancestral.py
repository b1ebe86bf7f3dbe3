"""DDIM, DDPM and everything between them: one draw from the process' own reverse kernel a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sfumato.core import Context, Denoiser, InputError, Solver, Step, Times, Wrap
from sfumato.solvers._registry import register, registry


@register("ddim", "euler")
@dataclass(frozen=True)
class DDIM(Solver):
    """x_s = alpha_s x0 + sigma_s eps: the belief, read at the next time. One call, order 1, deterministic.

    It is Euler's method in the variables (alpha, sigma): for Flow the plain Euler step x + (s - t) flow, for EDM and VE
    the Euler step in sigma. Any prediction kind, alpha = 0 included. ``ddpm`` with eta = 0 is the same.
    Source: Song, Meng, Ermon, 2021, "Denoising Diffusion Implicit Models".
    """

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        c = denoiser.process.coef(s)
        return Step(denoiser(st.x, st.t, ctx).at(c.alpha, c.sigma), s)


@register("ddpm", "ancestral")
@dataclass(frozen=True)
class Ancestral(Solver):
    """x_s ~ E_{x0 | x_t} q(x_s | x_t, x0), with the kernel's noise scaled by eta.

    eta = 1 is DDPM on any subset of times (the respaced variance follows from the retained alphas), eta = 0 is DDIM.
    Serves every process that has a reverse kernel: Gaussian, affine, categorical, manifold, product.
    Source: Ho, Jain, Abbeel, 2020, "Denoising Diffusion Probabilistic Models"; eta: Song, Meng, Ermon, 2021.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise InputError(f"eta = {self.eta}: between 0 (DDIM) and 1 (DDPM)")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        process = denoiser.process
        noise = ctx.draw(process.space, st.x)
        return Step(process.kernel(st.x, denoiser(st.x, st.t, ctx), st.t, s, self.eta).draw(noise), s)


@register("dpm-solver++2s-ancestral", inner="dpm-solver++2s")
@register("heun-ancestral", inner="heun")
@dataclass(frozen=True)
class Renoised(Wrap):
    """A deterministic solver made stochastic: step to a cleaner time, then back up to s with fresh noise.

    With rho = sigma / alpha: rho_down^2 = rho_s^2 - rho_up^2 and rho_up = eta rho_s sqrt(1 - rho_s^2 / rho_t^2). Inner DDIM
    with eta = 1 is DDPM ("Euler ancestral"); "dpm-solver++2s-ancestral" is k-diffusion's DPM++ 2S a. One clock for the
    batch. Source: Song, Meng, Ermon, 2021; the composition: Crowson, 2022, k-diffusion.
    """

    inner: Any = "ddim"
    eta: float = 1.0

    stochastic = True
    order = 1

    def __post_init__(self) -> None:
        if isinstance(self.inner, str):
            object.__setattr__(self, "inner", registry.make(self.inner))
        if not 0 < self.eta <= 1:
            raise InputError(f"eta = {self.eta}: above 0 (the inner solver itself) and at most 1")
        if self.inner.stochastic:
            raise InputError(f"the inner solver {self.inner} draws noise itself: give a deterministic one")

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        process = denoiser.process
        noise = ctx.draw(process.space, st.x)
        if not (isinstance(st.t, float) and isinstance(s, float)):
            raise InputError("renoising needs one clock for the batch")
        a, b = process.coef(st.t), process.coef(s)
        if b.sigma == 0:
            return super().step(st, s, denoiser, ctx)
        keep = 1 - self.eta**2 * (1 - (b.sigma * a.alpha / (b.alpha * a.sigma)) ** 2)
        # a belief read at a sigma near rounding would say nothing of the noise: go all the way
        down = 0.0 if keep * (b.sigma / b.alpha) ** 2 < 1e-10 else process.time(b.lam - 0.5 * math.log(keep))
        there = super().step(st, down, denoiser, ctx)
        if there.carry is not None:
            raise InputError(
                f"{type(self.inner).__name__} keeps a history, which renoising would break: use a singlestep"
            )
        return Step(process.renoise(there.x, down, s, noise), s)
