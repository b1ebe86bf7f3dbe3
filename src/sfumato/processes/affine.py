"""Anchored laws: data are led to a known anchor (a degraded picture, a noisy recording) while noise is added."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, InputError, Posterior, State, Times, linear
from sfumato.processes.base import Gaussian, Normal, root

ANCHOR = "anchor"


class Affine(Gaussian):
    """x_t = alpha x0 + (1 - alpha) x1 + sigma eps, with the anchor x1 = ``cond["anchor"]`` (B, *), shaped like x0.

    Solvers see y_t = x_t - (1 - alpha) x1 = alpha x0 + sigma eps, so every solver of a Gaussian law serves this one. The
    start is x_1 = x1 + sigma(1) noise, as published: where alpha(1) > 0 the anchor stands for the unknown x0 there.
    Subclasses write ``law`` and ``time`` as any Gaussian does.
    """

    def anchor(self, t: Times, cond: Mapping[str, Any], derivative: bool = False) -> State:
        """(1 - alpha) x1, or its time derivative -alpha' x1. Raises InputError where ``cond`` has no anchor."""
        c = self.coef(t)
        return linear(-c.dalpha if derivative else 1 - c.alpha, self._end(cond))  # type: ignore[no-any-return]

    def prior(self, shape: Any, ctx: Context) -> State:
        """alpha(1) x1 + sigma(1) N(0, I): x_1 in solver coordinates."""
        noise, end = super().prior(shape, ctx), self._end(ctx.cond)
        if end.shape != noise.shape:  # type: ignore[union-attr]
            raise InputError(
                f"the anchor is {tuple(end.shape)} and the samples {tuple(shape)}: resample it to their shape"
            )
        return linear(1.0, noise, self.coef(1.0).alpha, end)  # type: ignore[no-any-return]

    def _end(self, cond: Mapping[str, Any]) -> Tensor:
        if not isinstance(cond.get(ANCHOR), Tensor):
            raise InputError(
                f"{type(self).__name__} leads data to an anchor: give cond={{'anchor': x1}} with x1 shaped like the data; "
                f"the conditions are {sorted(cond) or 'none'}"
            )
        end: Tensor = cond[ANCHOR]
        return end


class _Shifted(Affine):
    """Laws whose increments are (alpha_t - alpha_s) (x0 - x1) plus noise of variance sigma_t^2 - sigma_s^2."""

    def kernel(self, x: State, post: Posterior, t: Times, s: Times, eta: Any = 1.0) -> Normal:
        """q(y_s | y_t, x0) at the believed x0: std = eta (sigma_s / sigma_t) sqrt(sigma_t^2 - sigma_s^2).

        mean = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps. eta = 1 is the published posterior, eta = 0 the deterministic
        step.
        """
        a, b = self.coef(t), self.coef(s)
        if not isinstance(a.sigma, Tensor) and a.sigma == 0:
            return Normal(post.at(b.alpha, b.sigma), 0.0)
        std = eta * (b.sigma / a.sigma * root(a.sigma**2 - b.sigma**2))
        return Normal(post.at(b.alpha, root(b.sigma**2 - std**2)), std)


@dataclass(frozen=True)
class Anchored(Affine):
    """Any Gaussian law, led to an anchor: alpha and sigma are those of ``inner``.

    With anchor 0 it is ``inner`` itself; with VP, x1 is the mean of the noise (a prior mean other than 0).
    """

    inner: Gaussian

    def law(self, t: Any, m: ModuleType) -> tuple[Any, Any, Any, Any]:
        return self.inner.law(t, m)

    def time(self, lam: float) -> float:
        return self.inner.time(lam)


# theta of the 'cosine' schedule is cos^2(K S) - cos^2(K (t + S)) = sin(K t) sin(K (t + 2 S)), scaled to the integral 1
_S, _K = 0.008, math.pi / 2 / 1.008
_WHOLE = math.cos(2 * _K * _S) - math.cos(_K * (1 + 2 * _S)) * math.sin(_K) / _K


@dataclass(frozen=True)
class MeanReverting(Affine):
    """dx = theta (x1 - x) dt + std sqrt(2 theta) dw: alpha = exp(-int theta), sigma = std sqrt(1 - alpha^2).

    rate      int_0^1 theta, so alpha(1) = exp(-rate); the default leaves 0.005 of the data
    std       of the stationary noise; the default is 50 of 255 grey levels for pictures in [0, 1]
    schedule  of theta over time: 'cosine' | 'linear' (0 at t = 0) | 'constant'

    A DPM-Solver++ of any order on this law is the data-prediction MR sampler of that order, the noise form its noise
    prediction. Source: Luo, Gustafsson, Zhao, Sjölund, Schön, 2023, "Image Restoration with Mean-Reverting Stochastic
    Differential Equations"; Li et al., 2025, "MRS: A Fast Sampler for Mean Reverting Diffusion".
    """

    rate: float = -math.log(0.005)
    std: float = 50 / 255
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        if not (self.rate > 0 and self.std > 0):
            raise InputError(f"MeanReverting needs rate > 0 and std > 0, not {self.rate} and {self.std}")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise InputError(f"schedule = {self.schedule!r}: use 'cosine', 'linear' or 'constant'")

    def law(self, t: Any, m: ModuleType) -> tuple[Any, Any, Any, Any]:
        share, slope = self._share(t, m)
        alpha, theta = m.exp(-self.rate * share), self.rate * slope
        sigma = self.std * m.sqrt(-m.expm1(-2 * self.rate * share))
        dsigma = _ratio((self.std * alpha) ** 2 * theta, sigma, self.std * math.sqrt(self.rate * self._bend))
        return alpha, sigma, -theta * alpha, dsigma

    def time(self, lam: float) -> float:
        if abs(lam) > 300:
            return 0.0 if lam > 0 else 1.0
        share = min(math.log1p((self.std * math.exp(lam)) ** -2) / (2 * self.rate), 1.0)
        return share if self.schedule == "constant" else _bisect(lambda t: self._share(t, math)[0], share)

    def _share(self, t: Any, m: ModuleType) -> tuple[Any, Any]:
        """int_0^t theta / int_0^1 theta and its derivative."""
        if self.schedule == "constant":
            return t + 0.0, 1.0 + 0 * t
        if self.schedule == "linear":
            return t * t, 2.0 * t
        wave = m.sin(_K * t)
        spent = t * math.cos(2 * _K * _S) - m.cos(_K * (t + 2 * _S)) * wave / _K
        return spent / _WHOLE, 2 * wave * m.sin(_K * (t + 2 * _S)) / _WHOLE

    @property
    def _bend(self) -> float:
        """The second derivative of the share at 0, where sigma ~ t std sqrt(rate bend)."""
        return {"constant": math.inf, "linear": 2.0, "cosine": 2 * _K * math.sin(2 * _K * _S) / _WHOLE}[self.schedule]


@dataclass(frozen=True)
class OrnsteinUhlenbeckVE(Affine):
    """dx = gamma (x1 - x) dt + sigma_min r^t sqrt(2 ln r) dw with r = sigma_max / sigma_min: alpha = exp(-gamma t) and

    sigma^2 = sigma_min^2 (r^(2 t) - exp(-2 gamma t)) ln r / (gamma + ln r).

    gamma = 0 is VE with the anchor as a mere condition. For complex coefficients kept as two real channels the published
    noise has half the variance in each: divide both sigmas by sqrt(2).
    Source: Richter, Welker, Lemercier, Lay, Gerkmann, 2023, "Speech Enhancement and Dereverberation with Diffusion-based
    Generative Models".
    """

    gamma: float = 1.5
    sigma_min: float = 0.05
    sigma_max: float = 0.5

    def __post_init__(self) -> None:
        if not (self.gamma >= 0 and 0 < self.sigma_min < self.sigma_max):
            raise InputError(f"OrnsteinUhlenbeckVE needs gamma >= 0 and 0 < sigma_min < sigma_max, not {self}")

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    @property
    def _scale(self) -> float:
        """sigma^2 = scale alpha^2 (exp(2 (gamma + ln r) t) - 1)."""
        return self.sigma_min**2 * self._log_ratio / (self.gamma + self._log_ratio)

    def law(self, t: Any, m: ModuleType) -> tuple[Any, Any, Any, Any]:
        alpha, growth = m.exp(-self.gamma * t), self.gamma + self._log_ratio
        sigma = alpha * m.sqrt(self._scale * m.expm1(2 * growth * t))
        slope = self._log_ratio * m.exp(2 * self._log_ratio * t) + self.gamma * alpha * alpha
        return alpha, sigma, -self.gamma * alpha, _ratio(self._scale * slope, sigma, math.inf)

    def time(self, lam: float) -> float:
        if lam < -300:
            return 1.0
        return min(math.log1p(math.exp(-2 * lam) / self._scale) / (2 * (self.gamma + self._log_ratio)), 1.0)


@dataclass(frozen=True)
class Residual(_Shifted):
    """x_t = x0 + A(t) (x1 - x0) + B(t) eps: the residual x1 - x0 and the noise on schedules of their own.

    alpha     share of the residual added by time t, A: 'decreased' (most of it early) | 'average' | 'increased'
    beta      the same words for the share of the noise's variance, B^2 / variance
    power     the density of a share is t^power ('increased') or (1 - t)^power ('decreased')
    variance  B(1)^2: 1 for generation (anchor 0), 0.01 is usual for restoration

    The published sums over N discrete steps differ by O(1 / N). With anchor 0, ``Anchored(VP())`` is the published
    identity with DDIM. Source: Liu, Wang, Fan, Wang, Tang, Qu, 2024, "Residual Denoising Diffusion Models".
    """

    alpha: str = "decreased"
    beta: str = "increased"
    power: float = 1.0
    variance: float = 1.0

    def __post_init__(self) -> None:
        for name in (self.alpha, self.beta):
            if name not in ("decreased", "average", "increased"):
                raise InputError(f"schedule {name!r}: use 'decreased', 'average' or 'increased'")
        if not (self.power > 0 and self.variance > 0):
            raise InputError(f"Residual needs power > 0 and variance > 0, not {self.power} and {self.variance}")

    def law(self, t: Any, m: ModuleType) -> tuple[Any, Any, Any, Any]:
        _, left, dshare = _share(self.alpha, self.power, t)
        noise, _, dnoise = _share(self.beta, self.power, t)
        std, sigma = math.sqrt(self.variance), m.sqrt(self.variance * noise)
        # noise ~ t^n near 0, so sigma ~ t^(n / 2)
        n = 1 + self.power * (self.beta == "increased")
        limit = math.inf if n < 2 else std if n == 2 else 0.0
        return left, sigma, -dshare, _ratio(self.variance * dnoise / 2, sigma, limit)

    def time(self, lam: float) -> float:
        if math.isinf(lam):
            return 0.0 if lam > 0 else 1.0

        def noisiness(t: float) -> float:
            alpha, sigma, *_ = self.law(t, math)
            return math.log(sigma / alpha) if alpha and sigma else math.inf if sigma else -math.inf

        return _bisect(noisiness, -lam)


@dataclass(frozen=True)
class ResidualShift(_Shifted):
    """x_t = x0 + eta (x1 - x0) + kappa sqrt(eta) eps: the noise grows as the shift towards the anchor does.

    sqrt(eta) runs geometrically from min(min_noise / kappa, min_noise) at the first of ``steps`` discrete times to ``end``
    at the last, as sqrt(eta_i) = first (end / first)^(u^power) with u = (i - 1) / (steps - 1) and t = i / steps; below the
    first time it is proportional to t.
    Source: Yue, Wang, Loy, 2023, "ResShift: Efficient Diffusion Model for Image Super-resolution by Residual Shifting".
    """

    kappa: float = 2.0
    steps: int = 15
    power: float = 0.3
    min_noise: float = 0.04
    end: float = 0.99

    def __post_init__(self) -> None:
        if not (self.kappa > 0 and self.power > 0 and self.steps >= 2):
            raise InputError(f"ResidualShift needs kappa > 0, power > 0 and at least 2 steps, not {self}")
        if not 0 < self.first < self.end <= 1:
            raise InputError(f"sqrt(eta) rises from {self.first:g} to end = {self.end:g}: 0 < first < end <= 1")

    @property
    def first(self) -> float:
        """sqrt(eta) at t = 1 / steps."""
        return min(self.min_noise / self.kappa, self.min_noise)

    def law(self, t: Any, m: ModuleType) -> tuple[Any, Any, Any, Any]:
        single = isinstance(t, float)
        shift, slope = self._root(torch.tensor(t, dtype=torch.float64) if single else t)
        if single:
            return self._numbers(float(shift), float(slope))
        return self._numbers(shift, slope)

    def _numbers(self, shift: Any, slope: Any) -> tuple[Any, Any, Any, Any]:
        return 1 - shift * shift, self.kappa * shift, -2 * shift * slope, self.kappa * slope

    def time(self, lam: float) -> float:
        if math.isinf(lam):
            return 0.0 if lam > 0 else 1.0
        k = self.kappa * math.exp(min(lam, 700.0))  # (1 - s^2) / (kappa s) = exp(lam) for s = sqrt(eta)
        shift = 2 / (k + math.sqrt(k * k + 4)) if k < 1e150 else 1 / k
        if shift <= self.first:
            return shift / (self.first * self.steps)
        u: float = (math.log(shift / self.first) / math.log(self.end / self.first)) ** (1 / self.power)
        return min((1 + u * (self.steps - 1)) / self.steps, 1.0)

    def _root(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(eta) and its derivative; at the first discrete time the derivative is the one from below."""
        n, low = self.steps, self.first
        growth = math.log(self.end / low)
        u = (t * n - 1) / (n - 1)
        inside = u > 1e-12
        u = torch.where(inside, u, 1.0)
        above = low * torch.exp(growth * u**self.power)
        steep = above * growth * self.power * u ** (self.power - 1) * n / (n - 1)
        return torch.where(inside, above, low * n * t), torch.where(inside, steep, low * n)


def _share(name: str, power: float, t: Any) -> tuple[Any, Any, Any]:
    """A cumulative share of [0, 1], what is left of it, and its derivative."""
    n = power + 1
    if name == "average":
        return t + 0.0, 1 - t, 1.0 + 0 * t
    if name == "increased":
        return t**n, 1 - t**n, n * t**power
    left = (1 - t) ** n
    return 1 - left, left, n * (1 - t) ** power


def _ratio(top: Any, bottom: Any, limit: float) -> Any:
    """top / bottom, and ``limit`` where bottom = 0."""
    if isinstance(bottom, Tensor):
        return torch.where(bottom == 0, limit, top / torch.where(bottom == 0, 1.0, bottom))
    return limit if bottom == 0 else top / bottom


def _bisect(rising: Callable[[float], float], value: float) -> float:
    """The t in [0, 1] where a rising function has this value; the nearer end where it has not."""
    low, high = 0.0, 1.0
    if value <= rising(low):
        return low
    if value >= rising(high):
        return high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return high
