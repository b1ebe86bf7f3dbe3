"""The exponential-integrator family: one set of weights, and published multistep solvers as configurations of it.

The linear part of the probability-flow equation is solved exactly and the prediction is replaced by a polynomial through
its last values. In 'data' form x / sigma moves by the integral of x0 d(alpha / sigma); in 'noise' form x / alpha moves by
the integral of eps d(sigma / alpha). The polynomial's variable is lambda = log(alpha / sigma) or the angle
atan2(sigma, alpha), which is finite at both ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sfumato.core import Context, Denoiser, InputError, Solver, Step, Times, linear
from sfumato.solvers._registry import register


def _gauss_legendre(n: int) -> list[tuple[float, float]]:
    """Nodes and weights on [-1, 1] by Newton's iteration on the Legendre polynomial."""
    points = []
    for i in range(n):
        x = math.cos(math.pi * (i + 0.75) / (n + 0.5))
        for _ in range(20):
            p, q = 1.0, x
            for k in range(2, n + 1):
                p, q = q, ((2 * k - 1) * x * q - (k - 1) * p) / k
            slope = n * (x * q - p) / (x * x - 1)
            x -= q / slope
        points.append((x, 2 / ((1 - x * x) * slope * slope)))
    return points


_QUADRATURE = _gauss_legendre(16)


def _place(variable: str, lam: float) -> float:
    return lam if variable == "lambda" else math.pi / 2 if lam == -math.inf else math.atan(math.exp(-lam))


@lru_cache(maxsize=65536)
def weights(process: Any, form: str, variable: str, t: float, s: float, nodes: tuple[float, ...]) -> tuple[float, ...]:
    """(A, w_0, w_1, ...) with x_s = A x_t + sum_j w_j m(nodes_j), m the 'data' or 'noise' prediction, newest node first.

    Exact for predictions that are polynomials of degree < len(nodes) in ``variable``. Host floats, pure and cached. At
    sigma_s = 0 ('noise' form: alpha_s = 0) the weight of the integral concentrates at the end, so the polynomial is
    extrapolated there; nodes whose variable is infinite, or that repeat a newer one, are passed over. Raises InputError
    where the form divides by 0 at t.
    """
    a, b = process.coef(t), process.coef(s)
    if (a.sigma if form == "data" else a.alpha) == 0:
        raise InputError(f"the {form!r} form divides by 0 at t = {t}: leave it by a DDIM step, or use the other form")
    if form == "data":
        scale, total = b.sigma / a.sigma, b.alpha - a.alpha * b.sigma / a.sigma
    else:
        scale, total = b.alpha / a.alpha, b.sigma - b.alpha * a.sigma / a.alpha
    places = [_place(variable, process.coef(n).lam) for n in nodes]
    keep = [j for j, y in enumerate(places) if math.isfinite(y) and y not in places[:j]] or [0]
    at = [(0.0, total)] if len(keep) == 1 else _points(form, variable, a, b)
    if not all(math.isfinite(y) for y, _ in at):
        keep = keep[:1]
    out = [0.0] * len(nodes)
    for j in keep:
        others = [m for m in keep if m != j]
        out[j] = math.fsum(w * math.prod((y - places[m]) / (places[j] - places[m]) for m in others) for y, w in at)
    if len(keep) == 1:
        out[keep[0]] = total
    return (scale, *out)


def _points(form: str, variable: str, a: Any, b: Any) -> list[tuple[float, float]]:
    """Where and with what weight the integral looks at the polynomial: (place, weight), the weights sum to the total."""
    sign, outer, rest = (1.0, b.sigma, b.alpha) if form == "data" else (-1.0, b.alpha, b.sigma)
    if outer == 0:
        return [(_place(variable, b.lam), rest)]
    low, high = math.exp(sign * a.lam), math.exp(sign * b.lam)
    if math.isinf(a.lam) or math.isinf(b.lam):  # the bounded exponential is the integration variable
        values = [(low + (high - low) * (g + 1) / 2, w * (high - low) / 2) for g, w in _QUADRATURE]
        return [(_place(variable, math.log(v) / sign), outer * w) for v, w in values]
    lams = [(a.lam + (b.lam - a.lam) * (g + 1) / 2, w * (b.lam - a.lam) / 2) for g, w in _QUADRATURE]
    return [(_place(variable, lam), outer * sign * w * math.exp(sign * lam)) for lam, w in lams]


@register("dpm-solver++")
@dataclass(frozen=True)
class Multistep(Solver):
    """A multistep exponential integrator: one call a step.

    form       'data' | 'noise': which prediction is held polynomial
    variable   'lambda' | 'angle': in what
    order      1 is DDIM; order 2 and 3 in ('data', 'lambda') are DPM-Solver++ 2M and 3M with exact weights
    last       the order of a step that ends at sigma = 0, where the polynomial is extrapolated to the end

    The order falls at the start, where history is short, and to DDIM where the form would divide by 0: 'data' when it
    leaves sigma = 0 (inversion), 'noise' when it leaves alpha = 0. One clock for the batch.
    Source: Lu, Zhou, Bao, Chen, Li, Zhu, 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
    Models"; Zhang & Chen, 2023, "Fast Sampling of Diffusion Models with Exponential Integrator".
    """

    order: int = 2
    form: str = "data"
    variable: str = "lambda"
    last: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 4 or self.last < 1:
            raise InputError(f"order = {self.order}, last = {self.last}: 1 <= order <= 4 and last >= 1")
        if self.form not in ("data", "noise") or self.variable not in ("lambda", "angle"):
            raise InputError(f"form {self.form!r} is 'data' or 'noise', variable {self.variable!r} 'lambda' or 'angle'")

    def init(self, x: Any, t: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return Step(x, t, ())

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        process = denoiser.process
        a, b, post = process.coef(st.t), process.coef(s), denoiser(st.x, st.t, ctx)
        reading = post.view("x0" if self.form == "data" else "eps")
        history = ((st.t, reading), *st.carry)[: self.order]
        if isinstance(st.t, float) and (a.sigma if self.form == "data" else a.alpha) == 0:
            return Step(post.at(b.alpha, b.sigma), s, history)
        used = history[: self.last] if isinstance(s, float) and b.sigma == 0 else history
        scale, *w = process.weights(_asked(self.form, self.variable), s, *(t for t, _ in used))
        terms = [v for wj, (_, m) in zip(w, used, strict=True) for v in (wj, m)]
        return Step(linear(scale, st.x, *terms), s, history)


@lru_cache
def _asked(form: str, variable: str) -> Any:
    """The question a step puts to the process: the weights of nodes (newest first) for a step from the newest to s."""
    return lambda process, s, *nodes: weights(process, form, variable, nodes[0], s, nodes)
