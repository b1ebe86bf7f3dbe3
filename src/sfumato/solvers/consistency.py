"""Sampling a consistency model: its clean answer, then noise again."""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.core import Context, Denoiser, InputError, Solver, Step, Times, linear
from sfumato.denoisers.boundaries import FORMS, consistent
from sfumato.solvers._registry import register


@register("consistency")
@register("lcm", boundary="lcm")
@dataclass(frozen=True)
class Consistency(Solver):
    """x_s = alpha_s f(x_t, t) + sigma_s z with fresh z: one call a step, and f(x_t, t) itself at the end.

    f is the end of the trajectory through x_t, in one of the :mod:`forms <sfumato.denoisers.boundaries>` it was trained in.
    It keeps the marginals of a denoiser whose x0 is that end (a consistency function), not those of a posterior mean:
    ``consistency`` says so, and the law of marginals asks it of such functions only. On n steps of a model that was
    distilled on a grid, give that grid. Source: Song, Dhariwal, Chen, Sutskever, 2023, "Consistency Models"; Luo, Tan,
    Huang, Li, Zhao, 2023, "Latent Consistency Models" ('lcm').
    """

    boundary: str = "x0"

    stochastic = True
    consistency = True

    def __post_init__(self) -> None:
        if self.boundary not in FORMS:
            raise InputError(f"boundary = {self.boundary!r}: use one of {', '.join(FORMS)}")

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        process = denoiser.process
        noise = ctx.draw(process.space, st.x)
        end = consistent(denoiser(st.x, st.t, ctx), st.t, self.boundary)
        c = process.coef(s)
        return Step(linear(c.alpha, end, c.sigma, noise), s)
