"""The library's own solver: polynomials in the angle, corrected, with an order that fits the number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sfumato.core import Context, Denoiser, Solver, Step, Times
from sfumato.solvers._registry import register
from sfumato.solvers.exponential import Multistep

FEW = Multistep(2, "data", "arc", corrector=True, last=2)
MANY = Multistep(3, "v", "arc", corrector=True, last=2)


@register("arc")
@dataclass(frozen=True)
class Arc(Solver):
    """Exponential integration along the arc (alpha, sigma) = r (cos angle, sin angle): one call a step.

    The belief is a polynomial in the angle, which is finite at clean data, where log(alpha / sigma) is not: so the last step
    has order 2. Beliefs from before lambda = -3.5 are used by their own step only: where alpha is small, what a network says
    of x0 carries its error times sigma / alpha. A corrector of one more node mends each state with the belief read at it, so
    the first, largest step is repeated with a better one. Below 7 steps x0 is held polynomial (order 2), otherwise the
    velocity v (order 3). Its grid is "arc", on data of std about 1. States of VP, EDM and Flow differ by r alone. It is
    ``dpm-solver++`` with variable = 'arc', corrector = True, last = 2 and form = 'data' or 'v'.
    """

    order = 3
    grid = "arc"

    def of(self, steps: int | None) -> Multistep:
        """The configuration for this many steps."""
        return FEW if steps is not None and steps < 7 else MANY

    def init(self, x: Any, t: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return self.of(ctx.run.total).init(x, t, denoiser, ctx)

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return self.of(ctx.run.total).step(st, s, denoiser, ctx)
