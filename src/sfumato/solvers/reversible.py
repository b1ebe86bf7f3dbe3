"""Exactly invertible solvers: two states that are moved by each other's belief, or one moved by its own past."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from sfumato.core import Context, Denoiser, InputError, Solver, Step, Times, linear
from sfumato.solvers._integral import reading
from sfumato.solvers._registry import register


def _turn(process: Any, s: float, t: float) -> tuple[float, float]:
    """DDIM from t to s as x_s = a x_t + b v: the rotation by the difference of the angles, and the change of radius."""
    a, b = process.coef(t), process.coef(s)
    radius, turn = math.hypot(b.alpha, b.sigma), b.angle - a.angle
    return radius / math.hypot(a.alpha, a.sigma) * math.cos(turn), radius * math.sin(turn)


def _slide(process: Any, s: float, t: float) -> tuple[float, float]:
    """DDIM from t to s as x_s = a x_t + b eps."""
    a, b = process.coef(t), process.coef(s)
    if a.alpha == 0 or b.alpha == 0:
        raise InputError("the 'noise' form divides by alpha = 0 at the noisy end: use form='v', or stay below t = 1")
    ratio = b.alpha / a.alpha
    return ratio, b.sigma - ratio * a.sigma


MOVES = {"v": _turn, "noise": _slide}


def _ratio(process: Any, s: float, u: float) -> tuple[float]:
    """r_s / r_u, r = hypot(alpha, sigma)."""
    a, b = process.coef(u), process.coef(s)
    return (math.hypot(b.alpha, b.sigma) / math.hypot(a.alpha, a.sigma),)


def _one(process: Any, s: float, u: float) -> tuple[float]:
    return (1.0,)


def _checked(form: str) -> None:
    if form not in MOVES:
        raise InputError(f"form {form!r}: 'v' (both ends of time are legal) or 'noise' (as published)")


@register("edict")
@dataclass(frozen=True)
class EDICT(Solver):
    """Two coupled DDIM runs x and y, exactly invertible for any denoiser and guidance: two calls a step.

    x' = a x + b m(y),  y' = a y + b m(x'),  x_s = p x' + (1 - p) y',  y_s = p y' + (1 - p) x_s, with m the belief read at
    the noisier end of the step; x and y change roles every step. The inverse solves the four lines backwards. Mixing with
    p < 1 keeps the two together and magnifies rounding by p^-2 a step when inverting: p = 0.93 and 50 steps give 1e-12 in
    float64 and 1e-4 in float32. ``form`` 'v' moves by the rotation x_s = cos x_t + sin v, finite at both ends of time;
    'noise' is as published. The pair and the parity are in the Step's carry: give that Step to the inverse, not x alone.
    Source: Wallace, Gokul, Naik, 2023, "EDICT: Exact Diffusion Inversion via Coupled Transformations".
    """

    mixing: float = 0.93
    form: str = "v"
    backwards: bool = False

    nfe = 2.0
    reversible = True

    def __post_init__(self) -> None:
        _checked(self.form)
        if not 0.5 < self.mixing <= 1:
            raise InputError(f"mixing = {self.mixing}: above 0.5 and at most 1 (no mixing)")

    def init(self, x: Any, t: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return Step(x, t, (x, 0))

    def inverse(self) -> EDICT:
        return replace(self, backwards=not self.backwards)

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        p, x, (y, parity) = self.mixing, st.x, st.carry
        noisy, clean = (s, st.t) if self.backwards else (st.t, s)
        a, b = denoiser.process.weights(MOVES[self.form], clean, noisy)

        def push(u: Any, by: Any) -> Any:
            return linear(a, u, b, reading(denoiser(by, noisy, ctx), self.form))

        def pull(u: Any, by: Any) -> Any:
            return linear(1 / a, u, -b / a, reading(denoiser(by, noisy, ctx), self.form))

        if not self.backwards:
            if parity % 2 == 0:
                x = push(x, y)
                y = push(y, x)
            else:
                y = push(y, x)
                x = push(x, y)
            x = linear(p, x, 1 - p, y)
            return Step(x, s, (linear(p, y, 1 - p, x), parity + 1))
        y = linear(1 / p, y, -(1 - p) / p, x)
        x = linear(1 / p, x, -(1 - p) / p, y)
        if (parity - 1) % 2 == 0:
            y = pull(y, x)
            x = pull(x, y)
        else:
            x = pull(x, y)
            y = pull(y, x)
        return Step(x, s, (y, parity - 1))


@register("bdia")
@dataclass(frozen=True)
class BDIA(Solver):
    """Bidirectional integration approximation: z_s = D(z_t -> s) + gamma (z_before - D(z_t -> before)), one call a step.

    In the 'v' form z is x / r, r = hypot(alpha, sigma), the same as x in variance-preserving processes. D is DDIM by the belief at z_t, to either side. The inverse is the same rule with 1 / gamma, so rounding grows by
    gamma^-N: gamma = 1 (the midpoint rule, order 2) is the safest and 0.5 useless; gamma = 0 would be DDIM. The first step
    is DDIM. The state before and its time are in the Step's carry: the pair is what is exact, so give that Step to the
    inverse. ``form`` as in EDICT. Source: Zhang, Lewis, Kleijn, 2024, "Exact Diffusion Inversion via Bi-directional
    Integration Approximation".
    """

    gamma: float = 1.0
    form: str = "v"

    reversible = True

    def __post_init__(self) -> None:
        _checked(self.form)
        if not self.gamma > 0:
            raise InputError(f"gamma = {self.gamma}: positive (0 is 'ddim', which has no inverse)")

    @property
    def order(self) -> int:  # type: ignore[override]
        return 2 if self.gamma == 1 else 1

    def init(self, x: Any, t: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return Step(x, t, ())

    def inverse(self) -> BDIA:
        return replace(self, gamma=1 / self.gamma)

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        if st.carry and _same(st.carry[1], s):  # turning round: the pair is read the other way
            return Step(st.carry[0], s, (st.x, st.t))
        m = reading(denoiser(st.x, st.t, ctx), self.form)
        a, b = denoiser.process.weights(MOVES[self.form], s, st.t)
        x = linear(a, st.x, b, m)
        if st.carry:
            before, u = st.carry
            c, d = denoiser.process.weights(MOVES[self.form], u, st.t)
            (k,) = denoiser.process.weights(_ratio if self.form == "v" else _one, s, u)
            x = linear(1.0, x, self.gamma * k, before, -self.gamma * k * c, st.x, -self.gamma * k * d, m)
        return Step(x, s, (st.x, st.t))


def _same(a: Any, b: Any) -> bool:
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)
