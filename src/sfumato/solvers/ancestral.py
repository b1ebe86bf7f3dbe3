"""DDIM, DDPM and everything between them: one draw from the process' own reverse kernel a step."""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.core import Context, Denoiser, InputError, Solver, Step, Times
from sfumato.solvers._registry import register


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
