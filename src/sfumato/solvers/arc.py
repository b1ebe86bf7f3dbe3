"""The library's own solver: polynomials in the angle, corrected, with an order that fits the number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sfumato.core import Context, Denoiser, Solver, Step, Times
from sfumato.solvers._registry import register
from sfumato.solvers.exponential import Multistep

SECOND, THIRD = (Multistep(order, "data", "arc", corrector=True, last=2) for order in (2, 3))


@register("arc")
@dataclass(frozen=True)
class Arc(Solver):
    """Exponential integration along the arc (alpha, sigma) = r (cos angle, sin angle): one call a step.

    x0 is a polynomial in the angle, which is finite at clean data, where log(alpha / sigma) is not: so the last step has
    order 2. Beliefs from before lambda = -3.5 are used by their own step only, and a corrector of one more node mends the
    state with the belief read at it: it repeats the first, largest step with a better x0. Order 2 for 6 to 9 steps, 3 for
    others: where steps are that long a third node says too little about the next. Use it with the ``arctan`` grid, on data
    of std about 1. States of VP, EDM and Flow differ by r alone. It is ``dpm-solver++`` with variable = 'arc',
    corrector = True, last = 2.
    """

    order = 3

    def of(self, steps: int | None) -> Multistep:
        """The configuration for this many steps."""
        if steps is None:
            return THIRD
        return SECOND if 6 <= steps < 10 else THIRD

    def init(self, x: Any, t: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return self.of(ctx.run.total).init(x, t, denoiser, ctx)

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return self.of(ctx.run.total).step(st, s, denoiser, ctx)
