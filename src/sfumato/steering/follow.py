"""A solver that steps from where its guidance moved the state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sfumato.core import Context, Denoiser, Solver, Step, Times, Wrap, Wrapper


class Said(Wrapper):
    """A denoiser that answers for one state and time with a belief that is known already, and else asks the inner one."""

    def __init__(self, inner: Denoiser, belief: Any, x: Any, t: Times) -> None:
        super().__init__(inner)
        self.known = (belief, x, t)

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        belief, at, time = self.known
        return belief if x is at and t is time else self.inner(x, t, ctx)


@dataclass(frozen=True)
class Follow(Wrap):
    """See :func:`follow`."""

    inner: Solver

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        post = denoiser(st.x, st.t, ctx)
        x = getattr(post, "x", st.x)
        return self.inner.step(replace(st, x=x), s, Said(denoiser, post, x, st.t), ctx)


def follow(solver: Solver) -> Follow:
    """Let any solver step from the state of the belief, which guidance with ``keep=`` moves (FlowChef, split directions).

    A belief is a pair (x0, eps), and its state alpha x0 + sigma eps need not be the one that was asked about. DDIM and DDPM
    read the belief alone; solvers with a history take their own x, so that of such a move only the reading they integrate
    would arrive. No call is added. Noise is drawn after the first call, so guidance that reads it goes without.
    """
    return Follow(solver)


__all__ = ["Follow", "Said", "follow"]
