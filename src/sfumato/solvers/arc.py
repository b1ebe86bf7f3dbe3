"""The library's own solver: polynomials in log(1 + sigma / alpha), corrected, of an order that fits the number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sfumato.core import Context, Denoiser, Solver, Step, Times
from sfumato.solvers._registry import register
from sfumato.solvers.exponential import Multistep

FEW = Multistep(2, "data", "soft", corrector=True, last=2)
MORE = Multistep(2, "v", "soft", corrector=True)
MANY = Multistep(3, "v", "soft", corrector=True)


@register("arc")
@dataclass(frozen=True)
class Arc(Solver):
    """Exponential integration along the arc (alpha, sigma) = r (cos angle, sin angle): one call a step.

    The belief is a polynomial in log(1 + sigma / alpha), which is minus log(alpha / sigma) where noise rules and sigma / alpha
    where data does. At clean data it is finite. Where alpha is small, what a network says of x0 carries its error times
    sigma / alpha; there steps of equal length in log(alpha / sigma), as the grid makes them, do not take that for a slope. A
    corrector of one more node mends each state with the belief read at it, so the first, largest step is repeated with a
    better one. Below 7 steps x0 is held polynomial (order 2, the last step too), otherwise the velocity v (order 2, from 10
    steps on order 3). Its grid is "arc", on data of std about 1. States of VP, EDM and Flow differ by r alone. It is
    ``dpm-solver++`` with variable = 'soft', corrector = True and form = 'data' (last = 2) or 'v'.
    """

    order = 3
    grid = "arc"

    def of(self, steps: int | None) -> Multistep:
        """The configuration for this many steps."""
        if steps is None or steps >= 10:
            return MANY
        return FEW if steps < 7 else MORE

    def init(self, x: Any, t: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return self.of(ctx.run.total).init(x, t, denoiser, ctx)

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return self.of(ctx.run.total).step(st, s, denoiser, ctx)
