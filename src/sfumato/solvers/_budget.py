"""How many denoiser calls a run makes, counted without a network."""

from __future__ import annotations

import math
from typing import Any

import torch

from sfumato.core import Context, Denoiser, Grid, InputError, Posterior, Solver, sample


class _Nothing(Denoiser):
    """x0 = 0 of whatever it is asked; counts."""

    def __init__(self, process: Any) -> None:
        super().__init__()
        self.process = process

    def forward(self, x: Any, t: Any, ctx: Context) -> Posterior:
        ctx.run.nfe += len(x) / ctx.batch
        return Posterior(torch.zeros_like(x), "x0", x, self.process.coef(t))


def calls(solver: Solver, process: Any, grid: Grid, steps: int, start: float = 1.0, stop: float = 0.0) -> float:
    """Denoiser calls of a run of ``steps`` steps, by running it on a belief in 0.

    Infinite where the number depends on what the denoiser says (an adaptive solver). Raises InputError where the solver
    cannot run so.
    """
    if not math.isfinite(solver.nfe):
        return math.inf
    one = torch.ones(1, 1, dtype=torch.float64)
    ctx = Context.of(1, 0, cond={"anchor": 0 * one}, dtype=one.dtype)  # for a process that reads one
    sample(_Nothing(process), solver, grid, steps, x=one, start=start, stop=stop, ctx=ctx)
    return ctx.run.nfe


def steps_within(solver: Solver, process: Any, grid: Grid, budget: float, start: float = 1.0, stop: float = 0.0) -> int:
    """The most steps whose run makes at most ``budget`` denoiser calls.

    A last step to sigma = 0 may cost less than the others, a first one more, so ``solver.nfe`` alone does not say. Raises
    InputError where one step makes more, or an unknown number.
    """

    def fits(steps: int) -> bool:
        return calls(solver, process, grid, steps, start, stop) <= budget

    steps = max(1, math.floor(budget / solver.nfe)) if math.isfinite(solver.nfe) else 1
    while steps > 1 and not fits(steps):
        steps -= 1
    while fits(steps):
        if not fits(steps + 1):
            return steps
        steps += 1
    raise InputError(
        f"{type(solver).__name__} makes more than {budget:g} calls in one step, or one cannot say how many"
    )
