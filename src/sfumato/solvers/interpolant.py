"""Interpolants between two densities, and any Gaussian law, with as much noise while sampling as one likes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, Grid, InputError, Solver, Step, Times, linear
from sfumato.processes.interpolant import Interpolant
from sfumato.solvers._registry import register


@register("interpolant")
@dataclass(frozen=True)
class InterpolantSDE(Solver):
    """dx = b dt -+ epsilon s dt + sqrt(2 epsilon) dw with s the score: the same marginals for every epsilon(t) >= 0.

    epsilon(t) = epsilon gamma^power, where gamma is the noise in x_t (sigma in a Gaussian law).

    epsilon  0 is the probability flow
    power    0: constant; 1: vanishes with the noise at the ends; 2: renews the noise at a constant rate
    method   'heun' (order 2 where epsilon = 0) | 'euler'

    A step from t to s renews u = 1 - exp(-|s - t| epsilon(m) / gamma(m)^2) of the noise, m the middle: x = x_t + int b -
    u gamma_s eps + sqrt(2 u) gamma_s z. As u < 1 no epsilon is unstable, and where gamma_s = 0 nothing is drawn.
    Heun's second call averages int b, and takes u / (2 + u) of the change in eps off, which keeps the variance of Gaussian
    noise exactly. A step whose noise vanishes at its end makes one call, since all that is left of it is removed there.
    With epsilon = 0 it is 'heun' or 'ddim' on a Gaussian law.

    Runs a Posterior, or the Transport belief of a :class:`sfumato.processes.Interpolant`, from x = samples of x1 and on the
    grid 'uniform' or :func:`ends`. For the way from x0 to x1 wrap the denoiser in ``Reversed``.
    Source: Albergo, Boffi, Vanden-Eijnden, 2023, "Stochastic Interpolants: A Unifying Framework for Flows and Diffusions".
    """

    epsilon: float = 1.0
    power: float = 1.0
    method: str = "heun"

    def __post_init__(self) -> None:
        if not (self.epsilon >= 0 and self.power >= 0):
            raise InputError(f"epsilon = {self.epsilon} and power = {self.power} must not be negative")
        if self.method not in ("heun", "euler"):
            raise InputError(f"method = {self.method!r}: use 'heun' or 'euler'")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.epsilon > 0

    @property
    def order(self) -> int:  # type: ignore[override]
        return 2 if self.method == "heun" and not self.epsilon else 1

    @property
    def nfe(self) -> float:  # type: ignore[override]
        return 2.0 if self.method == "heun" else 1.0

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        process = denoiser.process
        noise = ctx.draw(process.space, st.x) if self.epsilon else None
        two_sided = isinstance(process, Interpolant)
        std, *numbers = process.weights(self._two_sided if two_sided else self._gaussian, st.t, s)
        first, second = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
        here = denoiser(st.x, st.t, ctx)
        x = linear(1.0, st.x, 1.0, _along(here, *first), std, noise)
        before, after = (_level(process, t) for t in (st.t, s))
        if self.method == "euler" or (isinstance(after, float) and after == 0 and before != 0):
            return Step(x, s)
        ahead = denoiser(x, s, ctx)
        return Step(linear(1.0, x, 1.0, _along(ahead, *second), -1.0, _along(here, *second)), s)

    def _renewed(self, process: Any, t: float, s: float) -> tuple[float, float, float]:
        """(u, u / (2 + u), sqrt(2 u)) of a step."""
        if not self.epsilon:
            return 0.0, 0.0, 0.0
        level = _level(process, (t + s) / 2)
        if level == 0:
            raise InputError(f"there is no noise in x at t = {(t + s) / 2:g}, so none can be renewed: use epsilon=0")
        u = -math.expm1(-abs(s - t) * self.epsilon * level ** (self.power - 2))
        return u, u / (2 + u), math.sqrt(2 * u)

    def _gaussian(self, process: Any, t: float, s: float) -> tuple[float, ...]:
        """std of the fresh noise; (p, q) of the first move; (p, q) of the change that corrects it."""
        (u, c, fresh), a, b = self._renewed(process, t, s), process.coef(t), process.coef(s)
        dalpha, dsigma = b.alpha - a.alpha, b.sigma - a.sigma
        return fresh * b.sigma, dalpha, dsigma - u * b.sigma, dalpha / 2, dsigma / 2 - c * b.sigma

    def _two_sided(self, process: Interpolant, t: float, s: float) -> tuple[float, ...]:
        """std of the fresh noise; (time, gamma, share of eps) of the first move; those of the change that corrects it."""
        (u, c, fresh), a, b = self._renewed(process, t, s), process.at(t).gamma, process.at(s).gamma
        return fresh * b, s - t, b - a, -u * b, (s - t) / 2, (b - a) / 2, -c * b


def ends() -> Grid:
    """t = (1 + cos(pi i / n)) / 2 between 1 and 0, in the same proportion elsewhere: dense at both ends of time.

    A 'brownian' gamma = sqrt(t (1 - t)) is smooth in the index of this grid, so Heun's method keeps its order there.
    """

    def grid(process: Any, n: int, start: float, stop: float) -> Tensor:
        inner = [stop + (start - stop) * (1 + math.cos(math.pi * i / n)) / 2 for i in range(1, n)]
        return torch.tensor([start, *inner, stop], dtype=torch.float64)

    return grid


def _level(process: Any, t: Times) -> Any:
    return process.at(t).gamma if isinstance(process, Interpolant) else process.coef(t).sigma


def _along(belief: Any, p: Any, q: Any, share: Any = None) -> Any:
    """p x0 + q eps of a Posterior; the flow's increment and a share of eps of a Transport."""
    if share is None:
        return belief.at(p, q)
    away = None if isinstance(share, float) and share == 0 else belief.view("eps")
    return linear(1.0, belief.move(p, q), share, away)
