"""The library's own solver: polynomials in the angle, corrected, with an order that fits the number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sfumato.core import Context, Denoiser, Solver, Step, Times
from sfumato.solvers._registry import register
from sfumato.solvers.exponential import Multistep

FEW = Multistep(3, "v", "angle", last=2)
SOME, MORE, MANY = (Multistep(order, "data", "angle", corrector=True, last=2) for order in (2, 3, 4))


@register("arc")
@dataclass(frozen=True)
class Arc(Solver):
    """Exponential integration along the arc (alpha, sigma) = r (cos angle, sin angle): one call a step.

    The belief is a polynomial in the angle, which is finite at pure noise and at clean data, where log(alpha / sigma) is
    not: so the first and the last step keep their order. Below 7 steps the velocity v is held polynomial (order 3),
    otherwise x0, with a corrector and order 2 (7 to 9 steps), 3 (10 to 14) or 4 (15 and more). Use it with the ``arctan``
    grid, on data of std about 1. States of VP, EDM and Flow differ by r alone.
    """

    order = 4

    def of(self, steps: int | None) -> Multistep:
        """The configuration for this many steps."""
        if steps is None:
            return MORE
        return FEW if steps < 7 else SOME if steps < 10 else MORE if steps < 15 else MANY

    def init(self, x: Any, t: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return self.of(ctx.run.total).init(x, t, denoiser, ctx)

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return self.of(ctx.run.total).step(st, s, denoiser, ctx)
