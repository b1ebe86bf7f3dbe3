"""DPM-Solver-v3: the exponential integrator whose linear part is measured on the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, InputError, Solver, Step, Times, linear
from sfumato.solvers._integral import _QUADRATURE, newton
from sfumato.solvers._registry import register

CORRECTORS = ("none", "same", "exact", "pseudo")


@dataclass(frozen=True, eq=False)
class EmpiricalStatistics:
    """Three numbers a coordinate and noise level: l (M + 1, *), s and b, at rising ``lams`` (M + 1,), and their integrals.

    In y = x / alpha the flow is dy/dlambda = -(l y + f), f = e^(-lambda) eps - l y, and df/dlambda is about s f + b.
    (l, s, b) = (1, 0, 0) is the data form, (0, -1, 0) the noise form; ``tuning.statistics.estimate`` measures them. Between
    the levels they are linear, beyond them constant. Shapes (*) are the event's, or anything that broadcasts with it.
    """

    lams: Tensor
    l: Tensor  # noqa: E741
    s: Tensor
    b: Tensor
    big_l: Tensor = field(init=False, repr=False)
    big_s: Tensor = field(init=False, repr=False)
    big_b: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.lams) < 2 or not bool((self.lams.diff() > 0).all()):
            raise InputError("statistics need at least two noise levels, in rising lambda")
        for name in ("l", "s", "b"):
            value = getattr(self, name)
            if len(value) != len(self.lams) or not bool(value.isfinite().all()):
                raise InputError(f"{name} is one finite value a level ({len(self.lams)}), not {tuple(value.shape)}")
            object.__setattr__(self, name, value.double().cpu())
        object.__setattr__(self, "lams", self.lams.double().cpu())
        object.__setattr__(self, "big_l", self._cumulated(self.l))
        object.__setattr__(self, "big_s", self._cumulated(self.s))
        object.__setattr__(self, "big_b", self._cumulated((-self.big_s).exp() * self.b))

    @staticmethod
    def constant(l: float = 1.0, s: float = 0.0, b: float = 0.0) -> EmpiricalStatistics:  # noqa: E741
        """The same numbers at every level: (1, 0, 0) is DPM-Solver++, (0, -1, 0) DPM-Solver."""
        return EmpiricalStatistics(torch.tensor([-20.0, 20.0]), *(torch.full((2,), float(v)) for v in (l, s, b)))

    def tensors(self) -> dict[str, Tensor]:
        """What a sampler card keeps; ``EmpiricalStatistics(**tensors)`` makes it again."""
        return {"lams": self.lams, "l": self.l, "s": self.s, "b": self.b}

    def _cumulated(self, values: Tensor) -> Tensor:
        steps = (values[1:] + values[:-1]) / 2 * _spread(self.lams.diff(), values)
        return torch.cat([torch.zeros_like(values[:1]), steps.cumsum(0)])

    def at(self, lam: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(l, L, S, B) at this level; the integrals are from the first level."""
        lams = self.lams
        j = int(torch.searchsorted(lams, lam).clamp(1, len(lams) - 1))
        low, high = float(lams[j - 1]), float(lams[j])
        u = min(max(lam, float(lams[0])), float(lams[-1]))
        share, over = (u - low) / (high - low), lam - u
        l, s, b = (v[j - 1] + share * (v[j] - v[j - 1]) for v in (self.l, self.s, self.b))  # noqa: E741
        inside = (u - low) / 2
        big_l = self.big_l[j - 1] + inside * (self.l[j - 1] + l) + over * l
        at_u = self.big_s[j - 1] + inside * (self.s[j - 1] + s)
        big_s = at_u + over * s
        integrand = (-self.big_s[j - 1]).exp() * self.b[j - 1] + (-at_u).exp() * b
        big_b = self.big_b[j - 1] + inside * integrand
        small = (over * s).abs() < 1e-9
        growth = torch.where(
            small, torch.full_like(s, over), -torch.expm1(-over * s) / torch.where(small, torch.ones_like(s), s)
        )
        return l, big_l, big_s, big_b + (-at_u).exp() * b * growth


@register("dpm-solver-v3")
@dataclass(frozen=True, eq=False)
class DPMSolverV3(Solver):
    """The exponential integrator in the split that minimises the first-order error of *this* model.

    x_t / alpha_t = e^(L_s - L_t) x_s / alpha_s - integral e^(L - L_t) f dlambda, where f is the solution of df/dlambda =
    s f + b corrected by a polynomial in lambda through g(lambda_i) = e^(S_s - S_i) f_i - e^(S_s) (B_i - B_s). Orders 1 to 4,
    one call a step. Without statistics it is DPM-Solver++ with exact weights. Statistics belong to one network, process and
    guidance scale. A step that leaves alpha = 0 or ends at sigma = 0 is DDIM's. One clock for the batch.

    corrector  how a state is mended with the belief read at it (f is kept), when the step before went through p beliefs:
               'none', 'same' (p beliefs, the new one among them, so none for p = 1), 'exact' (p + 1, one more order), or
               'pseudo' (p + 1 with pseudo derivatives)
    pseudo     each derivative of the predictor's g is k! times the divided difference of its k + 1 newest nodes: it does
               not hear of the older ones. Up to two nodes it changes nothing; from three on it is of order 2, whatever
               ``order`` is: Newton's g_0 + u g[0, 1] + u (u + h) g[0, 1, 2] loses its h u g[0, 1, 2] (the slope at the newest
               node is that half a step before it), which is h^2 in g and h^3 a step. Published for few steps, where
               smoothness is worth more than order
    taper      let the order fall to the number of steps that are left ("lower order final")

    :meth:`published` has what the publication ran with. Source: Zheng, Lu, Chen, Zhu, 2023, "DPM-Solver-v3: Improved
    Diffusion ODE Solver with Empirical Model Statistics", and its reference implementation.
    """

    statistics: EmpiricalStatistics | None = None
    order: int = 2
    corrector: str = "none"
    pseudo: bool = False
    taper: bool = False
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 4:
            raise InputError(f"order = {self.order}: 1 to 4")
        if self.corrector not in CORRECTORS:
            raise InputError(f"corrector = {self.corrector!r}: one of {', '.join(CORRECTORS)}")
        if self.statistics is None:
            object.__setattr__(self, "statistics", EmpiricalStatistics.constant())

    @classmethod
    def published(cls, statistics: EmpiricalStatistics | None, steps: int) -> DPMSolverV3:
        """Order 3 as it was run without guidance on a VP model of small images: flags by the number of steps.

        Up to 5 steps pseudo derivatives and no falling order; above, an order that falls at the end. The corrector is of the
        predictor's order, and left out for 9 and 10 steps.
        """
        few = steps <= 5
        return cls(statistics, 3, "none" if steps in (9, 10) else "same", pseudo=few, taper=not few)

    def init(self, x: Any, t: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return Step(x, t, ((), None))

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        process, post, (past, base) = denoiser.process, denoiser(st.x, st.t, ctx), st.carry
        if not (isinstance(st.t, float) and isinstance(s, float)):
            raise InputError("dpm-solver-v3 needs one clock for the batch")
        a, b = process.coef(st.t), process.coef(s)
        if math.isinf(a.lam) or math.isinf(b.lam):
            return Step(post.at(b.alpha, b.sigma), s, (past, None))
        f = linear(math.exp(-a.lam), post.view("eps"), -self._level(a.lam, st.x)[0] / a.alpha, st.x)
        history, x = ((a.lam, f), *past), st.x
        if base is not None:
            x = linear(a.alpha, self._mended(base, history))
        history = history[: self.order]
        left = ctx.run.total - ctx.run.step if self.taper and ctx.run.total is not None else self.order
        used = history[: max(left, 1)]
        y = linear(1 / a.alpha, x)
        nodes = {"none": 0, "same": len(used)}.get(self.corrector, len(used) + 1)
        mend = (y, a.lam, nodes) if nodes > 1 else None
        return Step(linear(b.alpha, self._moved(y, a.lam, b.lam, used, self.pseudo)), s, (history, mend))

    def _mended(self, base: tuple[Any, float, int], history: Sequence[tuple[float, Tensor]]) -> Tensor:
        """x / alpha where the newest belief was read, from (x / alpha, lambda, how many beliefs to go through)."""
        y, low, nodes = base
        pseudo = self.corrector == "pseudo"
        # pseudo derivatives are those at the node that the step left
        used = (history[1], history[0], *history[2:nodes]) if pseudo else history[:nodes]
        return self._moved(y, low, history[0][0], used, pseudo)

    def _level(self, lam: float, like: Any) -> tuple[Tensor, ...]:
        key = (lam, like.dtype, like.device)
        if key not in self._cache:
            self._cache[key] = tuple(v.to(like)[None] for v in self.statistics.at(lam))  # type: ignore[union-attr]
        return self._cache[key]  # type: ignore[no-any-return]

    def _moved(
        self, y: Any, low: float, high: float, history: Sequence[tuple[float, Tensor]], pseudo: bool = False
    ) -> Tensor:
        """x / alpha at ``high`` from the one at ``low``."""
        nodes = [lam for lam, _ in history]
        key = (low, high, tuple(nodes), pseudo, y.dtype, y.device)
        if key not in self._cache:
            self._cache[key] = [v.to(y) for v in self._coefficients(low, high, nodes, pseudo)]
        scale, rest, *w = self._cache[key]
        return linear(1.0, scale * y + rest, *[v for wj, (_, f) in zip(w, history, strict=True) for v in (wj[None], f)])  # type: ignore[no-any-return]

    def _coefficients(self, low: float, high: float, nodes: list[float], pseudo: bool) -> list[Tensor]:
        """(factor of y, constant, weight of each f): tensors of the event's shape, by Gauss quadrature in lambda."""
        at = self.statistics.at  # type: ignore[union-attr]
        _, l0, s0, b0 = at(low)
        _, l1, _, _ = at(high)
        half = (high - low) / 2
        seen = [at(n) for n in nodes]
        constant = torch.zeros_like(l0)
        total = [torch.zeros_like(l0) for _ in nodes]
        for g, w in _QUADRATURE:
            u = low + half * (g + 1)
            _, lu, su, bu = at(u)
            kernel = half * w * ((lu - l1) + (su - s0)).exp()
            constant = constant - kernel * s0.exp() * (bu - b0)
            lagrange = [math.prod((u - m) / (n - m) for m in nodes if m != n) for n in nodes]
            shares = newton(nodes, [(u, 1.0)]) if pseudo else lagrange
            total = [value - kernel * share for value, share in zip(total, shares, strict=True)]
        for j, (_, _, sj, bj) in enumerate(seen):  # g_j = e^(S_low - S_j) f_j - e^(S_low) (B_j - B_low)
            constant = constant - total[j] * s0.exp() * (bj - b0)
            total[j] = total[j] * (s0 - sj).exp()
        return [(l0 - l1).exp(), constant, *total]


def _spread(v: Tensor, like: Tensor) -> Tensor:
    return v.view(-1, *[1] * (like.ndim - 1))
