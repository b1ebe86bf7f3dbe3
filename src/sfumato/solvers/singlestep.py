"""Singlestep exponential integrators: what a step needs is read inside it, so there is no history."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from sfumato.core import Context, Denoiser, InputError, Solver, Step, Times, linear
from sfumato.solvers._integral import VARIABLES, between, divides_by_zero, noise_std, reading, weights
from sfumato.solvers._registry import register


@register("dpm-solver++2s")
@register("dpm-solver++3s", order=3)
@register("dpm-solver-2", form="noise")
@register("dpm-solver-3", form="noise", order=3)
@register("res", rule="exact")
@register("dpm-solver++2s-sde", eta=1.0)
@dataclass(frozen=True)
class Singlestep(Solver):
    """A singlestep exponential integrator: ``order`` calls a step, at 1/2 of it or at 1/3 and 2/3, measured in ``variable``.

    form     'data' (DPM-Solver++ 2S, 3S) | 'noise' (DPM-Solver-2, -3): which reading is held polynomial
    rule     'released': order 2 looks at the middle only, order 3 at its first and last node; 'exact': every node with
             its exact weight (order 2 in 'data' form: RES, the exponential Runge-Kutta method ETD-RK2)
    eta      the share of the reverse SDE's noise: "dpm-solver++2s-sde" is k-diffusion's DPM++ SDE, its inner and outer
             noise taken from one Brownian path
    order 1 is DDIM. A step whose variable is infinite at an end (lambda at sigma = 0 or alpha = 0; soft at alpha = 0) is the kernel's own, of
    one call: DDIM, or DDPM where eta > 0.
    Source: Lu, Zhou, Bao, Chen, Li, Zhu, 2022, "DPM-Solver" and "DPM-Solver++"; Zhang et al., 2023, "Improved Order Analysis
    and Design of Exponential Integrator for Diffusion Models Sampling" (RES).
    """

    order: int = 2
    form: str = "data"
    variable: str = "lambda"
    rule: str = "released"
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3) or self.eta < 0:
            raise InputError(f"order = {self.order}, eta = {self.eta}: order is 1, 2 or 3 and eta not negative")
        if self.form not in ("data", "noise") or self.rule not in ("released", "exact"):
            raise InputError(f"form {self.form!r} is 'data' or 'noise', rule {self.rule!r} 'released' or 'exact'")
        if self.variable not in VARIABLES:
            raise InputError(f"variable = {self.variable!r}: one of {', '.join(VARIABLES)}")

    @property
    def nfe(self) -> float:  # type: ignore[override]
        return float(self.order)

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return self._of(self.order, st, s, denoiser, ctx)

    def _of(self, order: int, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        """A step of this order."""
        process, t = denoiser.process, st.t
        noises = [ctx.draw(process.space, st.x) for _ in range(order)] if self.eta else [None] * order
        post = denoiser(st.x, t, ctx)
        if self._closed(process, t, s):
            return Step(process.kernel(st.x, post, t, s, min(self.eta, 1.0)).draw(noises[0]), s)
        nodes: list[tuple[Times, Any]] = [(t, reading(post, self.form))]
        path, before = None, t  # the noise gathered since t, at the time ``before``
        for j in range(1, order + 1):
            u = s if j == order else process.weights(_inner(self.variable, j / order), t, s)[0]
            used, rule = self._looks_at(nodes, j, order)
            scale, *w = process.weights(_asked(self.form, self.variable, self.eta, rule), u, t, *(n for n, _ in used))
            if self.eta:
                ratio, std = process.weights(_fresh(self.form, self.eta), before, u)
                path, before = linear(ratio, path, std, noises[j - 1]), u
            x = linear(scale, st.x, *[v for wj, (_, m) in zip(w, used, strict=True) for v in (wj, m)], 1.0, path)
            if j < order:
                nodes.insert(0, (u, reading(denoiser(x, u, ctx), self.form)))
        return Step(x, s)

    def _looks_at(self, nodes: list[tuple[Times, Any]], j: int, order: int) -> tuple[list[tuple[Times, Any]], str]:
        if j < order or self.rule == "exact":
            return nodes, "exact"
        return (nodes, "midpoint") if order == 2 else ([nodes[0], nodes[-1]], "exact")

    def _closed(self, process: Any, t: Times, s: Times) -> bool:
        a, b = process.coef(t), process.coef(s)
        if not (isinstance(t, float) and isinstance(s, float)):
            return False
        infinite = math.isinf(a.lam) or math.isinf(b.lam)
        noisy = self.variable == "soft" and -math.inf in (a.lam, b.lam)
        return (
            divides_by_zero(self.form, a)
            or noisy
            or (infinite and (self.variable in ("lambda", "rho") or self.eta > 0))
        )


@lru_cache
def _inner(variable: str, share: float) -> Any:
    return lambda process, t, s: (between(process, variable, t, s, share),)


@lru_cache
def _asked(form: str, variable: str, eta: float, rule: str) -> Any:
    return lambda process, s, t, *nodes: weights(process, form, variable, t, s, nodes, eta, rule)


@lru_cache
def _fresh(form: str, eta: float) -> Any:
    def fresh(process: Any, t: float, s: float) -> tuple[float, float]:
        return weights(process, form, "lambda", t, s, (t,), eta)[0], noise_std(process, form, t, s, eta)

    return fresh


@register("dpm-solver-fast")
@dataclass(frozen=True)
class Fast(Singlestep):
    """DPM-Solver-fast: exactly as many calls as the grid has steps, in steps of order 3 and a shorter end.

    n calls make K = n // 3 + 1 intervals at equal distances along the grid, of orders 3, ..., 3, 2, 1 (n divisible by 3),
    3, ..., 3, 1 or 3, ..., 3, 2. On the ``logsnr`` grid they are equal in lambda, as published. Source: Lu et al. 2022,
    "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps".
    """

    order: int = 1  # of its last steps, which do not shrink faster than the others
    form: str = "noise"
    nfe = 1.0
    planned: ClassVar[bool] = True  # its times follow from the grid alone: known before the run

    def times(self, process: Any, grid: Sequence[float], x: Any, ctx: Context) -> Iterator[Times]:
        n = len(grid) - 1
        k = len(self.orders(n))
        inner = []
        for j in range(1, k):
            i, share = divmod(j * n / k, 1.0)
            low, high = grid[int(i)], grid[int(i) + 1]
            finite = all(math.isfinite(process.coef(u).lam) for u in (low, high))
            inner.append(between(process, "lambda" if finite else "angle", low, high, share))
        return iter([*inner, grid[-1]])

    @staticmethod
    def orders(calls: int) -> list[int]:
        """The orders of the steps that cost this many calls."""
        k = calls // 3 + 1
        if calls < 3:
            return [calls]
        return [*[3] * (k - 2), 2, 1] if calls % 3 == 0 else [*[3] * (k - 1), calls % 3]

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        if ctx.run.total is None:
            raise InputError("dpm-solver-fast needs to know the number of steps")
        return self._of(self.orders(ctx.run.total)[ctx.run.step], st, s, denoiser, ctx)
