"""The Gaussian law and its reverse kernel, written once for every schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.core import Coef, Context, InputError, Posterior, State, Times, linear, row


class Euclidean:
    """R^n with standard normal noise."""

    def noise(self, like: State, ctx: Context) -> State:
        """N(0, I) from the streams of the context, of the shape and dtype of ``like``."""
        if not isinstance(like, Tensor):
            raise InputError("a Euclidean state is one tensor: use a Product process for a tree of states")
        if ctx.rng is None:
            raise InputError("this context may not draw (seed=None), but noise was asked for")
        return ctx.rng.normal(like)

    def exp(self, x: State, v: State) -> State:
        """x + v."""
        return linear(1.0, x, 1.0, v)  # type: ignore[no-any-return]

    def log(self, x: State, y: State) -> State:
        """y - x."""
        return linear(1.0, y, -1.0, x)  # type: ignore[no-any-return]


def root(v: Any) -> Any:
    """The square root of a variance that rounding may have left just below 0."""
    return v.clamp(min=0).sqrt() if isinstance(v, Tensor) else math.sqrt(v) if v > 0 else 0.0


@dataclass(frozen=True, eq=False)
class Normal:
    """N(mean, std^2) as a transition kernel; ``std`` a number, (B,) or a tensor that broadcasts (a region)."""

    mean: Any
    std: Any

    def draw(self, noise: Any) -> Any:
        """mean + std noise."""
        return linear(1.0, self.mean, self.std, noise)

    def noise(self, x: Any) -> Any:
        """The noise that would have drawn x. Raises InputError where std = 0."""
        if not isinstance(self.std, Tensor) and self.std == 0:
            raise InputError("a deterministic kernel (std = 0) has no noise to recover")
        inverse = 1.0 / self.std
        return linear(inverse, x, -inverse, self.mean)


class Gaussian:
    """y_t = alpha(t) x0 + sigma(t) eps, plus an anchor term beta(t) x1 that solvers never see.

    Subclasses are frozen dataclasses that write their law once, for floats and tensors alike:
    ``law(t, m) -> (alpha, sigma, dalpha/dt, dsigma/dt)`` with m = math or torch, and its inverse ``time(lam)``.
    """

    space: ClassVar[Euclidean] = Euclidean()

    def law(self, t: Any, m: ModuleType) -> tuple[Any, Any, Any, Any]:
        """alpha, sigma and their derivatives at t."""
        raise NotImplementedError(f"{type(self).__name__} must give its law(t, m)")

    def time(self, lam: float) -> float:
        """The time at which log(alpha / sigma) = lam (clipped to [0, 1] in value, never in meaning)."""
        raise NotImplementedError(f"{type(self).__name__} must give time(lam)")

    def coef(self, t: Any) -> Coef:
        """Coefficients at a host float (cached) or at a tensor (B,) of times, one an item."""
        if isinstance(t, Tensor):
            t = t.double()
            return Coef(*(v if isinstance(v, Tensor) else torch.full_like(t, v) for v in self.law(t, torch)))
        return _cached(self, float(t))

    def weights(self, fn: Callable[..., tuple[float, ...]], *times: Any) -> tuple[Any, ...]:
        """``fn(process, *floats)``, asked once; with a clock an item it is asked for each row, so it never sees tensors."""
        clocks = [t.tolist() for t in times if isinstance(t, Tensor)]
        if not clocks:
            return fn(self, *times)
        n = len(clocks[0])
        columns = [t.tolist() if isinstance(t, Tensor) else [t] * n for t in times]
        rows = [fn(self, *r) for r in zip(*columns, strict=True)]
        return tuple(torch.tensor(c, dtype=torch.float64) for c in zip(*rows, strict=True))

    def prior(self, shape: Any, ctx: Context) -> State:
        """sigma(1) N(0, I): x_1 in solver coordinates, where alpha(1) x0 is negligible or zero."""
        like = torch.empty(tuple(shape), dtype=ctx.dtype, device=ctx.device)
        return linear(self.coef(1.0).sigma, ctx.draw(self.space, like))  # type: ignore[no-any-return]

    def transition(self, t: Times, s: Times) -> tuple[Any, Any]:
        """(ratio, std) of q(y_s | y_t) = N(ratio y_t, std^2) for s >= t. Where alpha_t = 0 nothing of y_t is left at s."""
        if isinstance(t, float) and isinstance(s, float) and s < t:
            raise InputError(
                f"noise is added from t = {t} up to a later time, not down to {s}: use kernel() or a solver"
            )
        a, b = self.coef(t), self.coef(s)
        ratio = b.alpha / a.alpha if isinstance(a.alpha, Tensor) or a.alpha else 0.0
        return ratio, root(b.sigma**2 - (ratio * a.sigma) ** 2)

    def corrupt(
        self, x: State, t: Times, ctx: Context, *, noise: State | None = None, since: Times = 0.0
    ) -> tuple[State, State]:
        """(y_t, noise) with y_t ~ q(y_t | y_since = x); x is the state at ``since``, clean data by default."""
        noise = ctx.draw(self.space, x) if noise is None else noise
        return self.renoise(x, since, t, noise), noise

    def renoise(self, x: State, t: Times, s: Times, noise: State) -> State:
        """Travel back up: y_s = ratio y_t + std noise for s > t."""
        ratio, std = self.transition(t, s)
        return linear(ratio, x, std, noise)  # type: ignore[no-any-return]

    def target(self, kind: str, x0: State, noise: State, t: Times) -> State:
        """What a network of that kind should say: p x0 + q eps with the kind's row."""
        p, q = row(kind, self.coef(t))
        return linear(p, x0, q, noise)  # type: ignore[no-any-return]

    def kernel(self, x: State, post: Posterior, t: Times, s: Times, eta: Any = 1.0) -> Normal:
        """q(y_s | y_t, x0) at the believed x0, for s < t.

        std = eta (sigma_s / sigma_t) sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2) and
        mean = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps. eta = 1 is DDPM (Ho et al. 2020), eta = 0 is DDIM (Song et al.
        2021). ``eta`` may be a tensor: more noise in one region than in another.
        """
        a, b = self.coef(t), self.coef(s)
        if not isinstance(a.sigma, Tensor) and a.sigma == 0:
            return Normal(post.at(b.alpha, b.sigma), 0.0)
        ratio = a.alpha / b.alpha if isinstance(b.alpha, Tensor) or b.alpha else 1.0
        std = eta * (b.sigma / a.sigma * root(a.sigma**2 - (ratio * b.sigma) ** 2))
        rest = root(b.sigma**2 - std**2)
        return Normal(post.at(b.alpha, rest), std)

    def anchor(self, t: Times, cond: Mapping[str, Any], derivative: bool = False) -> State | None:
        """None: this law has no anchor."""
        return None


@lru_cache(maxsize=8192)
def _cached(process: Gaussian, t: float) -> Coef:
    if not 0 <= t <= 1:
        raise InputError(f"t = {t}: times are in [0, 1], 0 is data and 1 is noise")
    return Coef(*process.law(t, math))


def sde(process: Any, t: Any) -> tuple[Any, Any]:
    """(a, g^2) of the equation dx = a x dt + g dw whose marginals are alpha x0 + sigma eps.

    a = alpha' / alpha and g^2 = 2 sigma sigma' - 2 a sigma^2, at a float or a clock an item (B,), a time of the library.
    Raises InputError for a process that is not Gaussian, and where alpha = 0 (a is infinite) or sigma' is.
    Source: Kingma, Salimans, Poole, Ho, 2021, "Variational Diffusion Models".
    """
    if not isinstance(process, Gaussian):
        raise InputError(f"{type(process).__name__} is no Gaussian process: it has no equation dx = a x dt + g dw")
    c = process.coef(t)
    clock = torch.as_tensor(t, dtype=torch.float64)
    if bool((torch.as_tensor(c.alpha) == 0).any() | (torch.as_tensor(c.sigma) == 0).any()):
        raise InputError(f"alpha or sigma is 0 at t = {clock.flatten()[0]:g}: stay inside (0, 1)")
    rate = c.dalpha / c.alpha
    return rate, 2 * c.sigma * c.dsigma - 2 * rate * c.sigma**2
