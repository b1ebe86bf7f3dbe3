"""Multistep exponential integrators: one class, and the published solvers as its configurations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from sfumato.core import Context, Denoiser, InputError, Solver, Step, Times, linear
from sfumato.solvers._integral import FORMS, RULES, VARIABLES, divides_by_zero, noise_std, reading, weights
from sfumato.solvers._registry import register

__all__ = ["HeavyBall", "Multistep", "ReleasedThirdOrder", "weights"]

History: TypeAlias = "Sequence[tuple[Times, Any]]"


@register("dpm-solver++")
@register("deis", order=3, form="noise", variable="time")
@register("unipc", order=3, rule="midpoint", corrector=True, taper=True)
@register("sa-solver", order=3, eta=1.0, corrector=True)
@register("dpm-solver++sde", eta=1.0)
@dataclass(frozen=True)
class Multistep(Solver):
    """A multistep exponential integrator: one call a step.

    form       'data' | 'noise' | 'v' | 'line' | 'flow': which reading of the belief is held polynomial
    variable   'lambda' | 'angle' | 'soft' | 'fraction' | 'rho' | 'time': in what, see ``sfumato.solvers._integral``
    order      1 is DDIM; order 2 and 3 in ('data', 'lambda') are DPM-Solver++ 2M and 3M with exact weights
    corrector  mend each state with the belief that was read there (one more order, no more calls); the last is not mended
    eta        the share of the reverse SDE's noise: 0 is the flow, 1 the SDE, and eta = tau^2 for SA-Solver's tau
    rule       'exact' | 'midpoint' | 'released': how two or three nodes are integrated, see :func:`weights`
    last       the order of a step that ends at sigma = 0, where the polynomial is extrapolated to the end
    taper      let the order fall to the number of steps that are left ("lower order final")

    The order is also lower at the start, where history is short, and a step is the kernel's own (DDIM, or DDPM where
    eta > 0) where the form would divide by 0: 'data' when it leaves sigma = 0 (inversion), 'noise' when it leaves
    alpha = 0. Registered: "dpm-solver++" (2M; ``rule='midpoint'`` is the released one), "dpm-solver++sde" (2M SDE),
    "deis" (tAB; ``variable='rho'`` is rhoAB), "unipc" (bh2), "sa-solver" (predictor and corrector of order 3). Adams-
    Bashforth is form 'flow', variable 'time', and along a straight line to the data under any schedule form 'line', variable
    'fraction'; its exponential kind in eps is form 'noise', variable 'lambda'.
    Source: Lu, Zhou, Bao, Chen, Li, Zhu, 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
    Models"; Zhang & Chen, 2023, "Fast Sampling of Diffusion Models with Exponential Integrator"; Zhao, Bai, Rao, Zhou, Lu,
    2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models"; Xue, Yi, Luo, Zhang, Sun,
    Li, Ma, 2023, "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models".
    """

    order: int = 2
    form: str = "data"
    variable: str = "lambda"
    corrector: bool = False
    eta: float = 0.0
    rule: str = "exact"
    last: int = 1
    taper: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 5 or self.last < 1 or self.eta < 0:
            raise InputError(f"order = {self.order}, last = {self.last}, eta = {self.eta}: 1 to 5, >= 1, >= 0")
        for name, value, known in (
            ("form", self.form, FORMS), ("variable", self.variable, VARIABLES), ("rule", self.rule, RULES),
        ):  # fmt: skip
            if value not in known:
                raise InputError(f"{name} = {value!r}: one of {', '.join(known)}")
        if self.eta and self.form in ("v", "flow", "line"):
            raise InputError(f"the {self.form!r} form is for the flow only: use form 'data' or 'noise' with eta > 0")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    @property
    def nodes(self) -> int:
        """How many beliefs the polynomial goes through, without the corrector's new one."""
        return self.order

    def init(self, x: Any, t: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return Step(x, t, ((), None, None))

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        process = denoiser.process
        noise = ctx.draw(process.space, st.x) if self.eta else None
        post = denoiser(st.x, st.t, ctx)
        past, base, velocity = st.carry
        history = ((st.t, reading(post, self.form)), *past)
        b = process.coef(s)
        ends = isinstance(s, float) and b.sigma == 0
        if divides_by_zero(self.form, post.coef) or (ends and self.eta and self.form == "noise"):
            kernel = process.kernel(st.x, post, st.t, s, min(self.eta, 1.0))
            return Step(kernel.draw(noise), s, (history[: self.nodes], None, velocity))
        ask, x = _asked(self.form, self.variable, self.eta, self.rule), st.x
        if base is not None:  # the state was predicted from ``base``: mend it with the belief that was read at it
            mended = history[: self.nodes + 1]
            _, _, *w = process.weights(ask, st.t, base[1], *(t for t, _ in mended))
            x = _add(base[0], w, mended)
        history = history[: self.nodes]
        order = self.last if ends else self.nodes
        if self.taper and ctx.run.total is not None:
            order = min(order, ctx.run.total - ctx.run.step)
        used = history[:order]
        scale, std, *w = process.weights(ask, s, st.t, *(t for t, _ in used))
        start = linear(scale, x, std, noise)
        x, velocity = self._advance(start, w, used, velocity)
        return Step(x, s, (history, (start, st.t) if self.corrector else None, velocity))

    def _advance(self, start: Any, w: Sequence[Any], used: History, velocity: Any) -> tuple[Any, Any]:
        return _add(start, w, used), None


def _add(start: Any, w: Sequence[Any], used: History) -> Any:
    terms = [v for wj, (_, m) in zip(w, used, strict=True) for v in (wj, m)]
    return linear(1.0, start, *terms)


@lru_cache
def _asked(form: str, variable: str, eta: float, rule: str) -> Any:
    """The question a step puts to the process: (scale, std, weights of the nodes, newest first) of a step from t to s."""

    def ask(process: Any, s: float, t: float, *nodes: float) -> tuple[float, ...]:
        scale, *w = weights(process, form, variable, t, s, nodes, eta, rule)
        return (scale, noise_std(process, form, t, s, eta), *w)

    return ask


@register("dpm-solver++3m")
@dataclass(frozen=True)
class ReleasedThirdOrder(Multistep):
    """DPM-Solver++(3M) as it was released: its second difference carries half its weight, so it is of order 2.

    The exact one is ``dpm-solver++`` with order = 3. Source: Lu et al. 2022, and its reference implementation.
    """

    order: int = 2
    rule: str = "released"
    taper: bool = True

    @property
    def nodes(self) -> int:
        return self.order + 1


@register("heavy-ball")
@dataclass(frozen=True)
class HeavyBall(Multistep):
    """Momentum on a multistep solver: v <- (1 - beta) v + beta D, x_s = A x_t + (sum of the weights) v.

    D = sum_j w_j m_j / sum_j w_j is the direction the solver would take, v starts as the first one. Averaging widens the
    interval of stability by (2 - beta) / beta and lowers the order to 1: it trades accuracy for the absence of divergence
    artifacts at few steps or large guidance. beta = 1 is the solver itself. ``terms`` is its number of nodes, ``form`` and
    ``variable`` what it interpolates. Source: Wizadwongsa, Chinchuthakun, Khungurn, Raj, Suwajanakorn, 2024, "Diffusion
    Sampling with Momentum for Mitigating Divergence Artifacts".
    """

    order: int = 1
    terms: int = 2
    beta: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.beta <= 1 and 1 <= self.terms <= 5):
            raise InputError(f"beta = {self.beta}, terms = {self.terms}: 0 < beta <= 1 and 1 <= terms <= 5")

    @property
    def nodes(self) -> int:
        return self.terms

    def _advance(self, start: Any, w: Sequence[Any], used: History, velocity: Any) -> tuple[Any, Any]:
        total = sum(w)
        direction = linear(*[v for wj, (_, m) in zip(w, used, strict=True) for v in (wj / total, m)])
        velocity = direction if velocity is None else linear(1 - self.beta, velocity, self.beta, direction)
        return linear(1.0, start, total, velocity), velocity
