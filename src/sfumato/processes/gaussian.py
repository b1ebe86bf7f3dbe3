"""Noise schedules: VP, VE, EDM, Flow, Cosine, and DDPM from a table of betas."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sfumato.core import InputError
from sfumato.processes.base import Gaussian


@dataclass(frozen=True)
class VP(Gaussian):
    """Variance preserving, linear in beta: alpha = exp(-1/2 int_0^t beta), sigma = sqrt(1 - alpha^2).

    beta(t) = beta_min + t (beta_max - beta_min).
    Source: Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, 2021, "Score-Based Generative Modeling through SDEs".
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            raise InputError(f"VP needs 0 < beta_min <= beta_max, not {self.beta_min} and {self.beta_max}")

    def law(self, t: Any, m: ModuleType) -> tuple[Any, Any, Any, Any]:
        beta = self.beta_min + t * (self.beta_max - self.beta_min)
        log_alpha = -0.25 * t * t * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        alpha, sigma = m.exp(log_alpha), m.sqrt(-m.expm1(2 * log_alpha))
        slope = math.inf if isinstance(sigma, float) and sigma == 0 else 0.5 * beta * alpha * alpha / sigma
        return alpha, sigma, -0.5 * beta * alpha, slope

    def time(self, lam: float) -> float:
        if lam == math.inf:
            return 0.0
        negative_log_alpha2 = math.log1p(math.exp(-2 * lam)) if lam > -300 else -2 * lam
        d = self.beta_max - self.beta_min
        return 2 * negative_log_alpha2 / (self.beta_min + math.sqrt(self.beta_min**2 + 2 * d * negative_log_alpha2))


@dataclass(frozen=True)
class VE(Gaussian):
    """Variance exploding: alpha = 1, sigma dx = sigma_min r^t sqrt(2 log r) dw with r = sigma_max / sigma_min.

    sigma = sigma_min sqrt(r^(2 t) - 1): the exact marginal of that SDE, 0 at t = 0 and, away from there, the geometric law
    sigma_min r^t that is usually written for it.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise InputError(f"VE needs 0 < sigma_min < sigma_max, not {self.sigma_min} and {self.sigma_max}")

    def law(self, t: Any, m: ModuleType) -> tuple[Any, Any, Any, Any]:
        log_ratio = math.log(self.sigma_max / self.sigma_min)
        sigma = self.sigma_min * m.sqrt(m.expm1(2 * log_ratio * t))
        slope = math.inf if isinstance(sigma, float) and sigma == 0 else (self.sigma_min**2 / sigma + sigma) * log_ratio
        return 1.0 + 0 * t, sigma, 0 * t, slope

    def time(self, lam: float) -> float:
        return math.log1p((math.exp(-lam) / self.sigma_min) ** 2) / (2 * math.log(self.sigma_max / self.sigma_min))


@dataclass(frozen=True)
class EDM(Gaussian):
    """alpha = 1 and sigma = (t / t_max)-powered: sigma = sigma_max t^rho, with sigma(0) = 0.

    rho = 7 spreads times as the schedule of Karras, Aittala, Aila, Laine, 2022, "Elucidating the Design Space of
    Diffusion-Based Generative Models"; ``sigma_min`` is where a grid places its last evaluation before 0.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not (0 < self.sigma_min < self.sigma_max and self.rho >= 1):
            raise InputError(f"EDM needs 0 < sigma_min < sigma_max and rho >= 1, not {self}")

    def law(self, t: Any, m: ModuleType) -> tuple[Any, Any, Any, Any]:
        return 1.0 + 0 * t, self.sigma_max * t**self.rho, 0 * t, self.sigma_max * self.rho * t ** (self.rho - 1)

    def time(self, lam: float) -> float:
        return (math.exp(-lam) / self.sigma_max) ** (1 / self.rho) if lam != math.inf else 0.0


@dataclass(frozen=True)
class Flow(Gaussian):
    """The straight path: alpha = 1 - u, sigma = u with u = shift t / (1 + (shift - 1) t); alpha(1) = 0 exactly.

    shift > 1 spends more time at high noise, as flow models for large images do.
    Source: Lipman, Chen, Ben-Hamu, Nickel, Le, 2023, "Flow Matching for Generative Modeling"; Liu, Gong, Liu, 2023,
    "Flow Straight and Fast"; shift: Esser et al. 2024.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise InputError(f"Flow needs shift > 0, not {self.shift}")

    def law(self, t: Any, m: ModuleType) -> tuple[Any, Any, Any, Any]:
        scale = (1 - t) + self.shift * t
        du = self.shift / scale**2
        return (1 - t) / scale, self.shift * t / scale, -du, du

    def time(self, lam: float) -> float:
        u = 1 / (1 + math.exp(lam)) if lam < 700 else 0.0
        return u / (u + self.shift * (1 - u))


@dataclass(frozen=True)
class Cosine(Gaussian):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): a constant speed in the angle; alpha(1) = 0 exactly.

    Source: Nichol & Dhariwal, 2021, "Improved Denoising Diffusion Probabilistic Models" (s = 0); Salimans & Ho 2022.
    """

    def law(self, t: Any, m: ModuleType) -> tuple[Any, Any, Any, Any]:
        k = math.pi / 2
        alpha: Any = m.cos(k * t)
        sigma: Any = m.sin(k * t)
        alpha = torch.where(t == 1, 0.0, alpha) if isinstance(t, Tensor) else 0.0 if t == 1 else alpha
        return alpha, sigma, -k * sigma, k * alpha

    def time(self, lam: float) -> float:
        return 2 / math.pi * math.atan(math.exp(-lam)) if lam > -700 else 1.0


@dataclass(frozen=True, eq=False)
class Table(Gaussian):
    """A discrete schedule made continuous: index i of N lives at t = (i + 1) / N, and t = 0 is clean data.

    Between table points the angle atan2(sigma, alpha) is linear: it is finite at alpha = 0 and at sigma = 0, inverts
    exactly, and the table's own points are exact. ``angles`` holds the N + 1 angles, the first of them 0.
    """

    angles: tuple[float, ...]

    @staticmethod
    def of(alphas_cumprod: Tensor) -> Table:
        """From alpha^2 at the N discrete steps (what diffusers calls alphas_cumprod), decreasing in [0, 1]."""
        a2 = alphas_cumprod.double().flatten().cpu()
        if len(a2) < 1 or not (a2.min() >= 0 and a2.max() < 1 and (a2[1:] < a2[:-1]).all()):
            raise InputError("alphas_cumprod must fall strictly from below 1 to at least 0")
        return Table((0.0, *torch.atan2((1 - a2).sqrt(), a2.sqrt()).tolist()))

    def __repr__(self) -> str:
        return f"Table({self.steps} steps)"

    @property
    def steps(self) -> int:
        """N, the number of discrete steps."""
        return len(self.angles) - 1

    def label(self, t: float) -> float:
        """The integer timestep N t - 1 that a network trained on this table knows the time t by."""
        return self.steps * t - 1

    def law(self, t: Any, m: ModuleType) -> tuple[Any, Any, Any, Any]:
        return self._points(t) if isinstance(t, Tensor) else self._point(t)

    def _point(self, t: float) -> tuple[float, float, float, float]:
        n = self.steps
        i = min(int(t * n), n - 1)
        slope = (self.angles[i + 1] - self.angles[i]) * n
        angle = self.angles[-1] if t == 1 else self.angles[i] + (t - i / n) * slope
        alpha, sigma = math.cos(angle), math.sin(angle)
        if abs(alpha) < 1e-12:
            alpha, sigma = 0.0, 1.0
        return alpha, sigma, -sigma * slope, alpha * slope

    def _points(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n = self.steps
        angles = torch.tensor(self.angles, dtype=torch.float64, device=t.device)
        at = (t * n).long().clamp(max=n - 1)
        slope = (angles[at + 1] - angles[at]) * n
        angle = torch.where(t == 1, angles[-1], angles[at] + (t - at.double() / n) * slope)
        alpha, sigma = torch.cos(angle), torch.sin(angle)
        alpha = torch.where(alpha.abs() < 1e-12, 0.0, alpha)
        return alpha, sigma, -sigma * slope, alpha * slope

    def time(self, lam: float) -> float:
        angle = math.atan(math.exp(-lam)) if lam > -700 else math.pi / 2
        i = min(max(bisect.bisect_left(self.angles, angle) - 1, 0), self.steps - 1)
        return (i + (angle - self.angles[i]) / (self.angles[i + 1] - self.angles[i])) / self.steps


def DDPM(betas: str | Tensor = "linear", steps: int = 1000) -> Table:
    """The discrete schedules: alpha_i^2 = prod_{j <= i} (1 - beta_j), continuous through :class:`Table`.

    betas  'linear'         1e-4 ... 0.02 (scaled by 1000 / steps), Ho, Jain, Abbeel, 2020
           'scaled_linear'  (sqrt(0.00085) ... sqrt(0.012))^2, Rombach et al. 2022 (what its code calls linear)
           'cosine'         alpha-bar = cos^2((t + 0.008) / 1.008 pi / 2), betas capped at 0.999, Nichol & Dhariwal, 2021
           or a tensor (N,) of betas in (0, 1]
    """
    if steps < 1:
        raise InputError(f"steps = {steps}: at least 1")
    if isinstance(betas, Tensor):
        table = betas.double().flatten()
        if len(table) < 1 or not (table.min() > 0 and table.max() <= 1):
            raise InputError("betas must lie in (0, 1]")
    elif betas == "linear":
        table = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps)
    elif betas == "scaled_linear":
        table = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2 * (1000 / steps)
    elif betas == "cosine":
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        table = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    else:
        raise InputError(f"betas = {betas!r}: use 'linear', 'scaled_linear', 'cosine' or a tensor of betas")
    if table.max() > 1:
        raise InputError(f"{steps} steps are too few for {betas!r} betas: one of them exceeds 1")
    return Table.of(torch.cumprod(1 - table, 0))
