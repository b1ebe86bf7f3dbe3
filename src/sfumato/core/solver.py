"""Solvers, and the only sampling loop of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sfumato.core.context import Context
from sfumato.core.denoiser import Denoiser
from sfumato.core.errors import InputError
from sfumato.core.trees import State, Times, first, linear

Grid: TypeAlias = Callable[[Any, int, float, float], Tensor]
"""(process, n, start, stop) -> (n + 1,) float64 times from start down to stop; inversion runs it flipped."""


@dataclass(frozen=True, eq=False)
class Step:
    """The whole state of a solver between two times: immutable, so it pickles, resumes and branches.

    x      the state, in solver coordinates (without the anchor term)
    t      its time
    carry  whatever else the method keeps: history, a second state, momentum
    index  how many steps were taken; with the grid and the seeds it is all that a resume needs
    """

    x: State
    t: Times
    carry: Any = None
    index: int = 0

    def restart(self) -> Step:
        """The same state as the beginning of another run (after an inversion, say)."""
        return replace(self, index=0)


class Solver:
    """A frozen recipe of numbers that moves a state between times.

    order       of convergence to the exact probability-flow end point
    nfe         denoiser calls a step
    stochastic  draws noise
    reversible  ``inverse()`` undoes it to round-off
    grid        the name of the grid it is made for, taken where none is given; None for any

    They are attributes of the instance, since they depend on its numbers, and the law tests check them.
    """

    order: int = 1
    nfe: float = 1.0
    stochastic: bool = False
    reversible: bool = False
    grid: str | None = None

    def times(self, process: Any, grid: Sequence[float], x: State, ctx: Context) -> Iterator[Times]:
        """The times to visit after the first. Event-driven and adaptive solvers choose their own."""
        return iter(grid[1:])

    def init(self, x: State, t: Times, denoiser: Denoiser, ctx: Context) -> Step:
        """The Step a run begins with."""
        return Step(x, t)

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        """Move from st.t to s."""
        raise NotImplementedError(f"{type(self).__name__} must say how it moves: write step(st, s, denoiser, ctx)")

    def read(self, st: Step) -> State:
        """The state to show at a Step."""
        return st.x

    def inverse(self) -> Solver:
        """The solver that undoes this one exactly."""
        raise InputError(f"{type(self).__name__} has no exact inverse: run it on the flipped grid (start=0, stop=1)")


class Wrap(Solver):
    """Base of every steering: a Solver made of another one; what is not overridden is the inner one's, but its inverse."""

    inner: Solver

    order = property(lambda self: self.inner.order)  # type: ignore[assignment]
    nfe = property(lambda self: self.inner.nfe)  # type: ignore[assignment]
    stochastic = property(lambda self: self.inner.stochastic)  # type: ignore[assignment]
    grid = property(lambda self: self.inner.grid)  # type: ignore[assignment]

    def times(self, process: Any, grid: Sequence[float], x: State, ctx: Context) -> Iterator[Times]:
        return self.inner.times(process, grid, x, ctx)

    def init(self, x: State, t: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return self.inner.init(x, t, denoiser, ctx)

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return self.inner.step(st, s, denoiser, ctx)

    def read(self, st: Step) -> State:
        return self.inner.read(st)


def trajectory(
    denoiser: Denoiser,
    solver: Solver,
    grid: Grid,
    steps: int,
    *,
    shape: Any = None,
    x: State | Step | None = None,
    start: float = 1.0,
    stop: float = 0.0,
    cond: Mapping[str, Any] | None = None,
    seed: int | Sequence[int] = 0,
    ctx: Context | None = None,
    grad: bool = False,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> Iterator[Step]:
    """The only sampling loop: yields the Step at the start and after each step.

    shape          (B, *) (or a mapping of shapes) draws the start from the prior
    x              a start state at t = start, used as it is, dtype and device kept; or a Step, which resumes
    start, stop    start < stop inverts on the flipped grid; 0 < start < 1 with x given edits
    seed           item i draws from stream (seed, i); or one int an item, or Streams
    ctx            continue a run, inject noise, or read the memory afterwards; it replaces cond and seed

    Callbacks are a for-loop around it. Gradients flow only with ``grad=True``, entered a step at a time and never held
    across a yield. Raises InputError for impossible times, steps or starts.
    """
    ts = _times(denoiser.process, grid, steps, start, stop)
    given = x.x if isinstance(x, Step) else x
    if (given is None) == (shape is None):
        raise InputError(
            "give either shape= (start from noise) or x= (start from a state or a Step), not both or neither"
        )
    like = first(given)
    rows = first(shape) if like is None else getattr(like, "shape", None)
    if not (isinstance(rows, Sequence) and len(rows) and all(isinstance(n, int) and n > 0 for n in rows)):
        raise InputError(f"a state is a tensor (B, *) of at least one item, and shape= its shape: not {rows}")
    if start < stop and solver.stochastic:
        raise InputError(
            f"{type(solver).__name__} draws noise and only runs towards data: invert with a deterministic one"
        )
    if like is not None:
        dtype, device = like.dtype, like.device
    elif device is None:
        device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
    if ctx is None:
        ctx = Context.of(rows[0], seed, cond=dict(cond or {}), dtype=dtype or torch.float32, device=device)
    process, run = denoiser.process, ctx.run
    run.total = len(ts) - 1
    with torch.set_grad_enabled(grad):
        if isinstance(x, Step):
            st = x
        else:
            y = process.prior(shape, ctx) if x is None else linear(1.0, x, -1.0, process.anchor(ts[0], ctx.cond))
            st = solver.init(y, ts[0], denoiser, ctx)
    yield st
    before: Times = ts[0]
    events = solver.times(process, ts, st.x, ctx)
    for j in count():
        if ctx.rng is not None:
            ctx.rng.at(j + 1)
        with torch.set_grad_enabled(grad):
            s = next(events, None)
            if j < st.index and s is not None:  # a resume: these steps were taken before
                before = s
                continue
            if j < st.index or not _same(before, st.t):
                raise InputError(
                    f"a Step at t = {st.t} cannot resume here at t = {before}: start anew with Step.restart()"
                )
            if s is None:
                return
            run.step, run.t, run.s = j, st.t, s
            run.noise.clear()
            run.accepted.clear()
            st = replace(solver.step(st, s, denoiser, ctx), index=j + 1)
            for fn in run.accepted:
                fn(solver.read(st), s)
        before = s
        yield st


def sample(denoiser: Denoiser, solver: Solver, grid: Grid, steps: int, **options: Any) -> Any:
    """The last state of :func:`trajectory`, in data coordinates. Takes its options."""
    for st in trajectory(denoiser, solver, grid, steps, **options):
        last = st
    ctx = options.get("ctx")
    cond = ctx.cond if ctx is not None else options.get("cond") or {}
    return linear(1.0, solver.read(last), 1.0, denoiser.process.anchor(last.t, cond))


def check_steps(steps: Any) -> None:
    """InputError unless it is a whole number from 1."""
    if not (isinstance(steps, int) and steps >= 1):
        raise InputError(f"steps = {steps!r}: give a whole number, at least 1")


def _times(process: Any, grid: Grid, steps: int, start: float, stop: float) -> list[float]:
    """Host floats: the only form in which samplers know time."""
    check_steps(steps)
    if not (0 <= start <= 1 and 0 <= stop <= 1 and start != stop):
        raise InputError(f"start = {start}, stop = {stop}: two different times in [0, 1] (0 is data, 1 is noise)")
    times = grid(process, steps, max(start, stop), min(start, stop))
    ts: list[float] = (times if start > stop else times.flip(0)).tolist()
    if any((a - b) * (start - stop) <= 0 for a, b in zip(ts, ts[1:], strict=False)):
        raise InputError(f"the grid's times are not strictly monotone with {steps} steps: {[round(t, 6) for t in ts]}")
    return ts


def _same(a: Times, b: Times) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return all(_same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
