"""Stochastic interpolants: laws that run from samples of one density to samples of another, neither of them noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sfumato.core import Context, InputError, Times, linear
from sfumato.processes.base import Euclidean, Gaussian
from sfumato.processes.gaussian import Cosine, Flow

PATHS = ("linear", "trigonometric", "encoding-decoding", "mirror")
GAMMAS = ("brownian", "quadratic", "sine-squared", "sigmoid", "zero")
READINGS = ("flow", "drift", "eps", "score", "x0", "x1")


class Path(NamedTuple):
    """x_t = alpha x0 + beta x1 + gamma z at one time: floats, or float64 tensors (B,) for a clock an item.

    dgamma may be infinite where gamma = 0; ``product`` = gamma gamma' never is.
    """

    alpha: Any
    beta: Any
    gamma: Any
    dalpha: Any
    dbeta: Any
    dgamma: Any
    product: Any


@dataclass(frozen=True)
class Interpolant:
    """x_t = alpha x0 + beta x1 + gamma z, z ~ N(0, I), for pairs (x0, x1): exactly x0 at t = 0 and exactly x1 at t = 1.

    path   'linear'             alpha = 1 - t, beta = t
           'trigonometric'      alpha = k cos(pi t / 2), beta = k sin(pi t / 2), k = sqrt(1 - gamma^2)
           'encoding-decoding'  alpha = cos^2(pi t) until t = 1/2 and 0 after, beta the other way round: noise in between
           'mirror'             alpha = 1, beta = 0: x0 on both ends
    gamma  'brownian' sqrt(t (1 - t)) | 'quadratic' t (1 - t) | 'sine-squared' sin^2(pi t) | 'sigmoid', a flat bump | 'zero'
    scale  multiplies gamma

    The density of x_t obeys the transport equation of the velocity b = E[dx_t/dt | x_t] and, for any epsilon >= 0,
    Fokker-Planck equations of the drifts b +- epsilon s with s = -E[z | x_t] / gamma: the noise of sampling is free.
    Sample with the solver 'interpolant' from x = samples of x1. Where x1 is Gaussian noise itself, a one-sided path needs
    no z and is an ordinary Gaussian law, see :meth:`one_sided`.
    Raises InputError for a gamma that reaches 1 on the trigonometric path, and for gamma 'zero' on paths that rest on z.
    Source: Albergo, Boffi, Vanden-Eijnden, 2023, "Stochastic Interpolants: A Unifying Framework for Flows and Diffusions"
    (whose time is 1 - t).
    """

    path: str = "linear"
    gamma: str = "brownian"
    scale: float = 1.0

    space: ClassVar[Euclidean] = Euclidean()

    def __post_init__(self) -> None:
        if self.path not in PATHS or self.gamma not in GAMMAS:
            raise InputError(
                f"path = {self.path!r}, gamma = {self.gamma!r}: a path is one of {', '.join(PATHS)} (or "
                f"Interpolant.one_sided), a gamma one of {', '.join(GAMMAS)}"
            )
        if not self.scale > 0:
            raise InputError(f"scale = {self.scale}: above 0; gamma='zero' is the law without noise")
        if self.gamma == "zero" and self.path in ("encoding-decoding", "mirror"):
            raise InputError(f"the {self.path} path rests on the noise: choose another gamma than 'zero'")
        peak = self._bump(0.5, math)[0]
        if self.path == "trigonometric" and peak >= 1:
            raise InputError(
                f"gamma reaches {peak:g}, and the trigonometric path needs gamma < 1: lower scale = {self.scale}"
            )

    @staticmethod
    def one_sided(path: str = "linear") -> Gaussian:
        """x_t = alpha x0 + beta x1 with x1 ~ N(0, I): 'linear' is Flow(), 'trigonometric' Cosine()."""
        laws: dict[str, Gaussian] = {"linear": Flow(), "trigonometric": Cosine()}
        if path not in laws:
            raise InputError(f"path = {path!r}: a one-sided path is {' or '.join(laws)}")
        return laws[path]

    def at(self, t: Times) -> Path:
        """The coefficients at a host float (cached) or at a tensor (B,) of times, one an item."""
        if isinstance(t, Tensor):
            t = t.double()
            return Path(*(v if isinstance(v, Tensor) else torch.full_like(t, v) for v in self._law(t, torch)))
        return _cached(self, float(t))  # type: ignore[arg-type]

    def between(self, x0: Tensor, x1: Tensor, t: Times, noise: Tensor) -> Tensor:
        """x_t of pairs x0, x1 (B, *) with noise z (B, *). Raises InputError where their shapes differ."""
        _same(x0, x1, noise)
        c = self.at(t)
        return linear(c.alpha, x0, c.beta, x1, c.gamma, noise)  # type: ignore[no-any-return]

    def target(self, kind: str, x0: Tensor, noise: Tensor, t: Times, x1: Tensor | None = None) -> Tensor:
        """What a network of that kind should say: 'flow' dx_t/dt | 'drift' alpha' x0 + beta' x1 | 'eps' z | 'score'."""
        c = self.at(t)
        if kind == "eps":
            return noise
        if kind == "score":
            return linear(-1.0 / c.gamma, noise)  # type: ignore[no-any-return]
        if kind not in ("flow", "drift") or x1 is None:
            raise InputError(
                f"a network of an interpolant says flow, drift, eps or score, not {kind!r}; the first two of pairs"
            )
        _same(x0, x1, noise)
        return linear(c.dalpha, x0, c.dbeta, x1, _slope(c) if kind == "flow" else 0.0, noise)  # type: ignore[no-any-return]

    def anchor(self, t: Times, cond: Mapping[str, Any], derivative: bool = False) -> None:
        """None: x1 is not known while sampling."""

    def weights(self, fn: Any, *times: Any) -> tuple[Any, ...]:
        """``fn(process, *floats)``, asked for each row with a clock an item."""
        return Gaussian.weights(self, fn, *times)  # type: ignore[arg-type]

    def prior(self, shape: Any, ctx: Context) -> Any:
        raise InputError("an interpolant starts from samples of its other end: give x= (and no shape=)")

    def coef(self, t: Any) -> Any:
        raise InputError(
            "an interpolant has two ends and no signal-to-noise ratio: use solver='interpolant', grid='uniform'"
        )

    def time(self, lam: float) -> Any:
        return self.coef(lam)

    def corrupt(self, x: Any, t: Any, ctx: Context, **more: Any) -> Any:
        raise InputError("an interpolant is made of pairs: use between(x0, x1, t, noise)")

    def renoise(self, x: Any, t: Any, s: Any, noise: Any) -> Any:
        return self.coef(t)

    def kernel(self, x: Any, post: Any, t: Any, s: Any, eta: Any = 1.0) -> Any:
        return self.coef(t)

    def _law(self, t: Any, m: ModuleType) -> tuple[Any, ...]:
        """(alpha, beta, gamma, alpha', beta', gamma', gamma gamma')."""
        gamma, dgamma, product = self._bump(t, m)
        one, nought = 1.0 + 0 * t, 0.0 * t
        if self.path == "linear":
            return 1 - t, t + 0.0, gamma, -one, one, dgamma, product
        if self.path == "mirror":
            return one, nought, gamma, nought, nought, dgamma, product
        if self.path == "encoding-decoding":
            level, slope = m.cos(math.pi * t) ** 2, -math.pi * m.sin(2 * math.pi * t)
            first = 1.0 * (t <= 0.5)
            return level * first, level * (1 - first), gamma, slope * first, slope * (1 - first), dgamma, product
        a, k = math.pi / 2, m.sqrt(1 - gamma * gamma)
        cos, sin, dk = m.cos(a * t), m.sin(a * t), -product / k
        return k * cos, k * sin, gamma, dk * cos - k * a * sin, dk * sin + k * a * cos, dgamma, product

    def _bump(self, t: Any, m: ModuleType) -> tuple[Any, Any, Any]:
        """gamma, gamma' and gamma gamma'."""
        if self.gamma == "brownian":
            shape = m.sqrt(t * (1 - t))
            slope = _over(1 - 2 * t, 2 * shape)
            return self.scale * shape, self.scale * slope, self.scale**2 * (1 - 2 * t) / 2
        if self.gamma == "quadratic":
            shape, slope = t * (1 - t), 1 - 2 * t
        elif self.gamma == "sine-squared":
            late = 1.0 * (t > 0.5)
            u = t * (1 - late) + (1 - t) * late  # the same number counted from the nearer end: exactly 0 at both
            shape, slope = m.sin(math.pi * u) ** 2, math.pi * m.sin(2 * math.pi * u) * (1 - 2 * late)
        elif self.gamma == "sigmoid":
            # S(u + 1) - S(u - 1) = sinh 1 / (cosh 1 + cosh u), less its value at the ends
            u, c = 10 * (t - 0.5), math.cosh(1.0)
            bell = 1 / (c + m.cosh(u))
            shape = math.sinh(1.0) * (bell - 1 / (c + math.cosh(5.0)))
            slope = -10 * math.sinh(1.0) * m.sinh(u) * bell * bell
        else:
            shape, slope = 0.0 * t, 0.0 * t
        return self.scale * shape, self.scale * slope, self.scale**2 * shape * slope


@dataclass(frozen=True, eq=False)
class Transport:
    """What a denoiser of an interpolant believes at x: readings given by name, the others follow.

    'flow'   E[dx_t/dt | x], the velocity b        'drift'  E[alpha' x0 + beta' x1 | x] = b - gamma' eps
    'eps'    E[z | x]                              'score'  -eps / gamma
    'x0', 'x1'  the believed ends, from the drift and x - gamma eps

    given   kind -> (B, *); at least one
    path    the coefficients at the time of x
    """

    given: Mapping[str, Tensor]
    x: Tensor
    path: Path

    def view(self, kind: str) -> Tensor:
        """One reading. Raises InputError where the given ones do not determine it."""
        if kind in self.given:
            return self.given[kind]
        c, given = self.path, self.given
        if kind == "flow" and "drift" in given:
            return linear(1.0, given["drift"], _slope(c), self._eps())  # type: ignore[no-any-return]
        if kind == "drift" and "flow" in given:
            return linear(1.0, given["flow"], -_slope(c), self._eps())  # type: ignore[no-any-return]
        if kind == "eps" and "score" in given:
            return linear(-c.gamma, given["score"])  # type: ignore[no-any-return]
        if kind == "score" and "eps" in given:
            if isinstance(c.gamma, float) and c.gamma == 0:
                raise InputError("the score follows from 'eps' only where gamma > 0: stay off the ends, or read 'eps'")
            return linear(-1.0 / c.gamma, given["eps"])  # type: ignore[no-any-return]
        if kind in ("x0", "x1"):
            return self._end(kind)
        if kind not in READINGS:
            raise InputError(f"reading {kind!r} is not one of {', '.join(READINGS)}")
        raise InputError(f"{kind!r} does not follow from {sorted(given)}: train a network for it as well")

    @property
    def mean(self) -> Tensor:
        """E[x0 | x]."""
        return self.view("x0")

    def move(self, time: Any, gamma: Any) -> Tensor:
        """The increment of x along the flow while time and gamma change by these amounts.

        From 'drift' and 'eps' it is time drift + gamma eps, which stays exact where gamma' is infinite; a network that
        was taught the 'flow' is followed as it is.
        """
        if "drift" in self.given:
            return linear(time, self.given["drift"], gamma, self._eps())  # type: ignore[no-any-return]
        return linear(time, self.view("flow"))  # type: ignore[no-any-return]

    def _eps(self) -> Tensor | None:
        """E[z | x]; None where x has no noise in it and nobody said how much."""
        if {"eps", "score"} & set(self.given):
            return self.view("eps")
        if any(bool((v != 0).any()) if isinstance(v, Tensor) else v != 0 for v in (self.path.gamma, self.path.dgamma)):
            return self.view("eps")  # says what is missing
        return None

    def _end(self, kind: str) -> Tensor:
        c = self.path
        inside = linear(1.0, self.x, -c.gamma, self._eps())
        det = c.alpha * c.dbeta - c.dalpha * c.beta
        if isinstance(det, Tensor) or abs(det) > 1e-12:
            one, two = (c.dbeta / det, -c.beta / det) if kind == "x0" else (-c.dalpha / det, c.alpha / det)
            return linear(one, inside, two, self.view("drift"))  # type: ignore[no-any-return]
        share = c.alpha if kind == "x0" else c.beta
        if abs(share) < 1e-12:
            raise InputError(f"nothing of {kind} is in x at this time of the path")
        return linear(1.0 / share, inside)  # type: ignore[no-any-return]


@lru_cache(maxsize=8192)
def _cached(process: Interpolant, t: float) -> Path:
    if not 0 <= t <= 1:
        raise InputError(f"t = {t}: times are in [0, 1], 0 is x0 and 1 is x1")
    return Path(*process._law(t, math))


def _over(top: Any, bottom: Any) -> Any:
    """top / bottom, infinite where bottom = 0."""
    return math.copysign(math.inf, top) if isinstance(bottom, float) and bottom == 0 else top / bottom


def _slope(c: Path) -> Any:
    if isinstance(c.dgamma, float) and math.isinf(c.dgamma):
        raise InputError("gamma' is infinite at this end of time: read 'drift' and 'eps', or stay off the end")
    return c.dgamma


def _same(x0: Tensor, x1: Tensor, noise: Tensor) -> None:
    if not x0.shape == x1.shape == noise.shape:
        raise InputError(
            f"x0 {tuple(x0.shape)}, x1 {tuple(x1.shape)} and the noise {tuple(noise.shape)} of an interpolant are pairs of "
            "one shape: as many of each, item by item"
        )
