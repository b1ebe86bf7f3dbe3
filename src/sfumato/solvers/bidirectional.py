"""Exact inversion for any deterministic singlestep solver: the step before is undone by the same beliefs that take the next."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sfumato.core import Context, Denoiser, InputError, Step, Times, Wrap, linear
from sfumato.solvers._once import Once
from sfumato.solvers._registry import register, registry
from sfumato.solvers.reversible import _ratio, _same


@register("bidirectional")
@dataclass(frozen=True)
class Bidirectional(Wrap):
    """x_s = D(x_t -> s) + gamma r_s / r_u (x_u - D(x_t -> u)), with x_u the state before and D any singlestep solver.

    r = hypot(alpha, sigma). The inverse is the same rule with 1 / gamma. Both uses of D share their call at x_t, so a step
    costs 2 n - 1 calls where the inner one costs n, and with inner='ddim' it is 'bdia', of one call. With gamma = 1 a
    solver of odd order gains one. The pair of states is what is exact: give the last Step to the inverse, not x alone.
    Source: Zhang, Lewis, Kleijn, 2024, "Exact Diffusion Inversion via Bi-directional Integration Approximation", the
    general form, x_s - x_u = (1 - gamma) (x_t - x_u) - gamma D(t -> u) + D(t -> s) in increments.
    """

    inner: Any = "heun"
    gamma: float = 1.0

    reversible = True

    def __post_init__(self) -> None:
        if isinstance(self.inner, str):
            object.__setattr__(self, "inner", registry.make(self.inner))
        if self.inner.stochastic:
            raise InputError(f"the inner solver {self.inner} draws noise: give a deterministic one")
        if not self.gamma > 0:
            raise InputError(f"gamma = {self.gamma}: positive (0 is the inner solver, which has no inverse)")

    @property
    def order(self) -> int:  # type: ignore[override]
        order = int(self.inner.order)
        return order + order % 2 if self.gamma == 1 else order

    @property
    def nfe(self) -> float:  # type: ignore[override]
        return 2 * float(self.inner.nfe) - 1

    def inverse(self) -> Bidirectional:
        return replace(self, gamma=1 / self.gamma)

    def init(self, x: Any, t: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return Step(x, t, ())

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        if not st.carry:
            return Step(self._inner(st, s, denoiser, ctx), s, (st.x, st.t))
        before, u = st.carry
        if _same(u, s):  # turning round: the pair is read the other way
            return Step(before, s, (st.x, st.t))
        once = Once(denoiser)
        (k,) = denoiser.process.weights(_ratio, s, u)
        there, back = self._inner(st, s, once, ctx), self._inner(st, u, once, ctx)
        return Step(linear(1.0, there, self.gamma * k, before, -self.gamma * k, back), s, (st.x, st.t))

    def _inner(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Any:
        there = self.inner.step(self.inner.init(st.x, st.t, denoiser, ctx), s, denoiser, ctx)
        if there.carry:
            raise InputError(
                f"{type(self.inner).__name__} keeps a history, so its steps cannot be undone: use a singlestep"
            )
        return there.x
