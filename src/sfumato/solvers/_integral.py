"""The weights of the exponential-integrator family: every published member is a configuration of one function.

The linear part of the probability-flow equation is solved exactly and a reading of the belief is replaced by a polynomial
through its known values. The reading (``form``) says which part is linear:

data   x / sigma moves by the integral of x0 d(alpha / sigma)
noise  x / alpha moves by the integral of eps d(sigma / alpha)
v      x / r turns by the integral of v d(angle), with r = hypot(alpha, sigma) and angle = atan2(sigma, alpha)
line   x / r moves by the integral of (eps - x0) d(fraction), with r = alpha + sigma and fraction = sigma / (alpha + sigma)
flow   x moves by the integral of (dalpha/dt x0 + dsigma/dt eps) dt: Adams' methods, nothing is solved exactly

The polynomial's ``variable`` is lambda = log(alpha / sigma), the angle, the fraction, rho = sigma / alpha, time or 'soft', which is
log(1 + rho): -lambda where noise rules, rho where data does. It is finite at clean data like the angle; and where alpha is small, a
network's error of x0 is multiplied by rho, which is no slope because there, as in lambda, nodes lie apart.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from sfumato.core import InputError, Posterior

FORMS = ("data", "noise", "v", "line", "flow")
VARIABLES = ("lambda", "angle", "soft", "rho", "fraction", "time")
RULES = ("exact", "midpoint", "released")


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


def _between(low: float, high: float) -> list[tuple[float, float]]:
    """(place, weight) of the quadrature between two places; the weights sum to high - low."""
    half = (high - low) / 2
    return [(low + half * (g + 1), w * half) for g, w in _QUADRATURE]


def _place(process: Any, variable: str, lam: float) -> float:
    """The value of a variable where log(alpha / sigma) = lam."""
    match variable:
        case "lambda":
            return lam
        case "angle":
            return math.pi / 2 if lam == -math.inf else math.atan(math.exp(-lam))
        case "rho":
            return math.inf if lam == -math.inf else math.exp(-lam)
        case "fraction":
            return _fraction(lam)
        case "soft":
            return math.log1p(math.exp(-lam)) if lam > 0 else math.log1p(math.exp(lam)) - lam
        case _:
            return float(process.time(lam))


def _fraction(lam: float) -> float:
    """sigma / (alpha + sigma) where log(alpha / sigma) = lam."""
    return 1 / (1 + math.exp(lam)) if lam < 0 else math.exp(-lam) / (1 + math.exp(-lam))


def _at(process: Any, variable: str, t: float) -> float:
    return t if variable == "time" else _place(process, variable, process.coef(t).lam)


def reading(post: Posterior, form: str) -> Any:
    """The belief as the form integrates it."""
    match form:
        case "data":
            return post.view("x0")
        case "noise":
            return post.view("eps")
        case "flow":
            return post.view("flow")
        case "line":
            return post.at(-1.0, 1.0)
        case _:
            c = post.coef
            r = (c.alpha**2 + c.sigma**2) ** 0.5
            return post.view("v") if isinstance(r, float) and r == 1.0 else post.at(-c.sigma / r, c.alpha / r)


def divides_by_zero(form: str, c: Any) -> bool:
    """Whether a step in this form cannot leave a time of these coefficients: sigma = 0 for 'data', alpha = 0 for 'noise'."""
    value = {"data": c.sigma, "noise": c.alpha}.get(form, 1.0)
    return isinstance(value, float) and value == 0


@lru_cache(maxsize=65536)
def weights(
    process: Any,
    form: str,
    variable: str,
    t: float,
    s: float,
    nodes: tuple[float, ...],
    eta: float = 0.0,
    rule: str = "exact",
) -> tuple[float, ...]:
    """(A, w_0, w_1, ...) with x_s = A x_t + sum_j w_j m(nodes_j) + std z, m the form's reading, newest node first.

    Exact for readings that are polynomials of degree < len(nodes) in ``variable``. ``eta`` is the share of the reverse
    SDE's noise (0: the flow, 1: the SDE), whose std is :func:`noise_std`. ``rule`` 'midpoint' looks at the polynomial of
    two nodes in the middle of the step only (DPM-Solver++ 2M and UniPC as released); 'released' also halves the second
    difference of three nodes (3M as released); 'pseudo' takes each derivative at the first node from the fewest nodes, k! times
    the divided difference of the first k + 1, as DPM-Solver-v3 may (order 2 from three nodes on). At sigma_s = 0 ('noise': alpha_s = 0) the weight of the integral
    concentrates at the end, so the polynomial is extrapolated there; nodes whose variable is infinite, or that repeat a
    newer one, are passed over. Host floats, pure and cached. Raises InputError where the form divides by 0 at t.
    """
    a, b = process.coef(t), process.coef(s)
    if divides_by_zero(form, a):
        raise InputError(f"the {form!r} form divides by 0 at t = {t}: leave it by a DDIM step, or use another form")
    scale, total = _ends(form, a, b, t, s, eta)
    places = [_at(process, variable, n) for n in nodes]
    keep = [j for j, y in enumerate(places) if math.isfinite(y) and y not in places[:j]] or [0]
    out = [0.0] * len(nodes)
    if len(keep) > 1:
        if len(keep) == 2 and rule in ("midpoint", "released") and math.isfinite(a.lam) and math.isfinite(b.lam):
            at = [(_place(process, variable, (a.lam + b.lam) / 2), total)]
        else:
            at = _points(process, form, variable, a, b, (t, s), eta, total)
        if not all(math.isfinite(y) for y, _ in at):
            keep = keep[:1]
    if len(keep) == 1:
        out[keep[0]] = total
        return (scale, *out)
    if rule == "pseudo":
        values = newton([places[j] for j in keep], at)
        return (scale, *(values[keep.index(j)] if j in keep else 0.0 for j in range(len(nodes))))
    second = math.fsum(w * (y - places[keep[0]]) ** 2 for y, w in at) if rule == "released" and len(keep) == 3 else 0.0
    for j in keep:
        others = [m for m in keep if m != j]
        gaps = math.prod(places[j] - places[m] for m in others)
        out[j] = (math.fsum(w * math.prod(y - places[m] for m in others) for y, w in at) - second / 2) / gaps
    return (scale, *out)


def newton(places: list[float], at: list[tuple[float, float]]) -> list[float]:
    """Weights of the values at these places in the integral of sum_k D_k (y - y_0)^k, D_k the k-th divided difference.

    It is Newton's polynomial with every factor (y - y_m) replaced by the first: what pseudo derivatives amount to.
    """
    moments = [math.fsum(w * (y - places[0]) ** k for y, w in at) for k in range(len(places))]
    return [
        math.fsum(
            moments[k] / math.prod(places[j] - y for i, y in enumerate(places[: k + 1]) if i != j)
            for k in range(j, len(places))
        )
        for j in range(len(places))
    ]


def _ends(form: str, a: Any, b: Any, t: float, s: float, eta: float) -> tuple[float, float]:
    """(A, total): what multiplies the state, and the sum of the weights."""
    if form == "data":
        scale = b.sigma / a.sigma
        if not eta:
            return scale, b.alpha - a.alpha * scale
        fall = scale * a.alpha / b.alpha
        return scale * fall**eta, b.alpha * (1 - fall ** (1 + eta))
    if form == "noise":
        scale = b.alpha / a.alpha
        return scale, (1 + eta) * (b.sigma - scale * a.sigma)
    if form == "v":
        outer = math.hypot(b.alpha, b.sigma)
        return outer / math.hypot(a.alpha, a.sigma), outer * (b.angle - a.angle)
    if form == "line":
        outer, start = b.alpha + b.sigma, a.alpha + a.sigma
        return outer / start, outer * (b.sigma / outer - a.sigma / start)
    return 1.0, s - t


def _points(
    process: Any, form: str, variable: str, a: Any, b: Any, times: tuple[float, float], eta: float, total: float
) -> list[tuple[float, float]]:
    """Where and with what weight the integral looks at the polynomial: (place, weight); the weights sum to ``total``."""
    if form == "flow":
        return [(_at(process, variable, u), w) for u, w in _between(*times)]
    if form == "v":
        lams = [(-math.log(math.tan(u)), w) for u, w in _between(a.angle, b.angle)]
        return [(_place(process, variable, lam), w * total / (b.angle - a.angle)) for lam, w in lams]
    if form == "line":
        low, high = _fraction(a.lam), _fraction(b.lam)
        found = [(math.log1p(-u) - math.log(u), w / (high - low)) for u, w in _between(low, high)]
        return [(_place(process, variable, lam), w * total) for lam, w in found]
    rate = 1 + eta if form == "data" else -1.0
    if (b.sigma if form == "data" else b.alpha) == 0:
        return [(_place(process, variable, b.lam), total)]
    if math.isinf(a.lam) or math.isinf(b.lam):  # the bounded exponential is the integration variable
        low, high = math.exp(rate * a.lam), math.exp(rate * b.lam)
        found = [(math.log(u) / rate, w / (high - low)) for u, w in _between(low, high)]
    else:
        norm = math.expm1(rate * (a.lam - b.lam))
        found = [(u, -w * rate * math.exp(rate * (u - b.lam)) / norm) for u, w in _between(a.lam, b.lam)]
    return [(_place(process, variable, lam), w * total) for lam, w in found]


@lru_cache(maxsize=65536)
def noise_std(process: Any, form: str, t: float, s: float, eta: float) -> float:
    """The std of the fresh noise of a stochastic step: sigma_s sqrt(1 - e^(-2 eta h)), h = lambda_s - lambda_t ('data'), or
    alpha_s sqrt(eta (rho_t^2 - rho_s^2)), rho = sigma / alpha ('noise')."""
    a, b = process.coef(t), process.coef(s)
    if eta == 0 or b.sigma == 0:
        return 0.0
    if form == "data":
        fall = b.sigma * a.alpha / (a.sigma * b.alpha)
        return float(b.sigma * math.sqrt(max(1 - fall ** (2 * eta), 0.0)))
    return float(b.alpha * math.sqrt(max(eta * ((a.sigma / a.alpha) ** 2 - (b.sigma / b.alpha) ** 2), 0.0)))


def between(process: Any, variable: str, t: float, s: float, share: float) -> float:
    """The time that lies at this share of the way from t to s, measured in ``variable``."""
    low, high = _at(process, variable, t), _at(process, variable, s)
    if math.isinf(low) or math.isinf(high):
        raise InputError(f"{variable} is infinite at an end of [{s}, {t}]: use variable='angle' there")
    place = low + share * (high - low)
    match variable:
        case "time":
            return place
        case "lambda":
            lam = place
        case "fraction":
            lam = math.log1p(-place) - math.log(place)
        case "rho":
            lam = -math.log(place)
        case "soft":
            lam = -math.log(math.expm1(place))
        case _:
            lam = -math.log(math.tan(place))
    return float(process.time(lam))
