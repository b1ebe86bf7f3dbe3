"""A solver whose denoiser is somewhere else: it is asked what it wants to know, and told, one call at a time.

A step is a pure function of its Step, its noise and the answers to its calls. So it needs no thread and no coroutine:
it is run with the answers known so far, stopped at the first call that has none, and run again from its beginning with
one answer more. What is repeated is arithmetic on a few tensors; the noise of a step is drawn once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, InputError, Posterior, Solver, Step, Streams


class _Asks(BaseException):
    """Raised where a step calls the denoiser and no answer is known; not an Exception, so that no solver keeps it."""

    def __init__(self, x: Tensor, t: float) -> None:
        super().__init__()
        self.x, self.t = x, t


class _Answers(Denoiser):
    """Plays the answers in order, then asks."""

    def __init__(self, process: Any, answers: Sequence[Posterior]) -> None:
        super().__init__()
        self.process, self._answers = process, iter(answers)

    def forward(self, x: Any, t: Any, ctx: Context) -> Posterior:
        answer = next(self._answers, None)
        if answer is None:
            raise _Asks(x, t)
        ctx.run.nfe += 1
        return answer


@dataclass
class Replay:
    """A run of ``solver`` over ``times`` from ``x``, at times[first]: ``x`` and ``t`` are what it asks about.

    ``answer(posterior)`` tells it; where ``done``, ``x`` is the result. ``edit(x)`` replaces the state, which is
    possible between steps only. ``total`` is the length of the grid that the times were planned on, where that is another
    one. Pickles and copies like the data it is.
    """

    solver: Solver
    process: Any
    times: Sequence[float]
    x: Tensor
    seeds: Streams | None = None
    first: int = 0
    total: int | None = None
    t: float = 1.0
    done: bool = False
    answers: list[Posterior] = field(default_factory=list)
    step: Step = field(init=False)
    noise: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ctx = Context(
            rng=self.seeds, dtype=self.x.dtype, device=self.x.device, batch=len(self.x), source=self._drawn
        )
        self.ctx.run.total = len(self.times) - 1 if self.total is None else self.total
        self._count = 0
        denoiser = _Answers(self.process, ())
        begun = self.solver.init(self.x, self.times[self.first], denoiser, self.ctx)
        self.step = replace(begun, index=self.first)
        self._advance()

    def answer(self, posterior: Posterior) -> None:
        """The belief at (x, t)."""
        self.answers.append(posterior)
        self._advance()

    def edit(self, x: Tensor) -> None:
        """Go on from another state than was proposed (masked with known pixels, say).

        Raises InputError within a step of several calls, and where a solver asks about another state than its own.
        """
        if not self.done and (self.answers or self.x is not self.step.x):
            raise InputError(
                f"the state was changed between the calls of one step of {type(self.solver).__name__}: change it between "
                "steps, or use a solver of one call a step"
            )
        self.step, self.x = replace(self.step, x=x), x
        if not self.done:
            self._advance()

    def _advance(self) -> None:
        while True:
            j = self.step.index
            if j == len(self.times) - 1:
                read: Any = self.solver.read(self.step)
                self.x, self.done = read, True
                return
            run, self._count = self.ctx.run, 0
            run.step, run.t, run.s = j, self.step.t, self.times[j + 1]
            run.noise.clear()
            run.accepted.clear()
            if self.ctx.rng is not None:
                self.ctx.rng.at(j + 1)
            memory = self.ctx.fork(look=True).memory  # a copy: the step may be run again
            try:
                denoiser = _Answers(self.process, self.answers)
                taken = self.solver.step(self.step, self.times[j + 1], denoiser, replace(self.ctx, memory=memory))
            except _Asks as asked:
                self.x, self.t = asked.x, asked.t
                return
            self.ctx = replace(self.ctx, memory=memory)
            self.step, self.answers, self.noise = replace(taken, index=j + 1), [], []
            for fn in run.accepted:
                fn(self.solver.read(self.step), self.times[j + 1])

    def _drawn(self, ctx: Context, fresh: Callable[[], Any]) -> Any:
        if self._count == len(self.noise):
            self.noise.append(fresh())
        self._count += 1
        return self.noise[self._count - 1]


def planned(solver: Solver, process: Any, times: Sequence[float]) -> list[float]:
    """The times that a run over this grid visits: others where a solver plans its own, as 'dpm-solver-fast' does."""
    if not getattr(solver, "planned", False):
        return list(times)
    like = torch.zeros(1, 1, dtype=torch.float64)
    return [times[0], *(float(t) for t in solver.times(process, times, like, Context.of(1, 0)))]  # type: ignore[arg-type]


def calls(solver: Solver, process: Any, times: Sequence[float], total: int | None = None) -> list[list[float]]:
    """The times at which each step asks, found by a run on one number. Raises InputError where a solver chooses its
    times from what it sees.

    One list a step: a multi-call solver's are longer. times as :func:`planned` gives them, for a grid of ``total`` steps.
    """
    inner: Any = solver
    while inner is not None:
        known = inner is solver and getattr(solver, "planned", False)
        if type(inner).__dict__.get("times") is not None and not inner.grid and not known:
            raise InputError(
                f"{type(inner).__name__} chooses its own times as it goes: it cannot be made a fixed schedule"
            )
        inner = getattr(inner, "inner", None)
    like = torch.zeros(1, 1, dtype=torch.float64)
    if solver.grid and list(solver.times(process, times, like, Context.of(1, 0))) != list(
        times[1:]
    ):  # refuses other spacings
        raise InputError(f"{type(solver).__name__} would leave the times of this schedule")
    run = Replay(solver, process, times, like, Streams.of(0, 1), total=total)
    out: list[list[float]] = [[] for _ in times[1:]]
    while not run.done:
        out[run.step.index].append(run.t)
        run.answer(Posterior(run.x, "v", run.x, process.coef(run.t)))
    return out
