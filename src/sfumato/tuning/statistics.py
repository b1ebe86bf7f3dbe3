"""Empirical model statistics: the split of the flow that suits one model, measured on noised data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, InputError, Streams, linear
from sfumato.solvers.empirical import EmpiricalStatistics

CHUNK = 64


def estimate(
    denoiser: Denoiser,
    data: Tensor,
    *,
    levels: int = 60,
    probes: int = 2,
    lam_min: float = -4.6,
    lam_max: float = 5.0,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> EmpiricalStatistics:
    """l, s and b of DPM-Solver-v3 at ``levels`` equal steps of lambda, from clean ``data`` (N, *), all of it at each level.

    l = E[diag(sigma d eps / d x)], by Hutchinson's estimator v * (J^T v) with v = +-1 (``probes`` a data point), smoothed
    over five levels, and with f = e^(-lambda) eps - l x / alpha and f' its derivative along the flow (central
    differences in lambda): s = Cov(f, f') / Var(f) and b = E[f'] - s E[f], coordinate by coordinate. Where alpha is small, f
    is mostly the network's own error, sigma / alpha times that of eps, and s about -1. Where f does not vary (a constant
    border, Gaussian data) s falls to 0: l, a straight line between levels, is off by up to (step of lambda)^2 / 20, and that
    share of the state's variance is taken off f's. The guidance of the run belongs into ``denoiser``. ``cond`` has one entry
    a data point. Raises InputError where the process does not reach these levels.
    Source: Zheng, Lu, Chen, Zhu, 2023, "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics" (the
    optimum; the estimators are ours).
    """
    process = denoiser.process
    low, high = process.coef(1.0).lam, process.coef(0.0).lam
    inside = (min(high, lam_max) - max(low, lam_min)) / (2 * max(levels, 1))  # differences must not leave the process
    lams = torch.linspace(max(low + inside, lam_min), min(high - inside, lam_max), levels, dtype=torch.float64)
    if levels < 3 or not bool((lams.diff() > 0).all()) or len(data) < 2:
        raise InputError(
            f"{levels} levels of lambda from {lams[0]:.2f} to {lams[-1]:.2f} on {len(data)} data: >= 3 and >= 2"
        )
    given = dict(cond or {})
    noise = Streams.of(seed, len(data)).normal(data)
    signs = [
        torch.where(Streams.of(seed + 1 + k, len(data)).normal(data) > 0, 1.0, -1.0).to(data) for k in range(probes)
    ]

    def eps(y: Tensor, lam: float, rows: slice) -> Tensor:
        """The prediction at x = alpha y."""
        t = process.time(lam)
        ctx = Context.of(len(y), None, cond={k: v[rows] for k, v in given.items()}, dtype=y.dtype, device=y.device)
        return denoiser(linear(process.coef(t).alpha, y), t, ctx).view("eps")  # type: ignore[no-any-return]

    parts = [slice(i, min(i + CHUNK, len(data))) for i in range(0, len(data), CHUNK)]
    l = torch.stack([_diagonal(eps, data, noise, signs, float(lam), parts) for lam in lams])  # noqa: E741
    l = _smoothed(l)  # noqa: E741
    plain = EmpiricalStatistics(lams, l, torch.zeros_like(l), torch.zeros_like(l))
    slopes, offsets = zip(*[_affine(eps, data, noise, plain, float(lam), parts) for lam in lams], strict=True)
    return EmpiricalStatistics(lams, l, torch.stack(slopes), torch.stack(offsets))


def _diagonal(eps: Any, data: Tensor, noise: Tensor, signs: list[Tensor], lam: float, parts: list[slice]) -> Tensor:
    """E[diag(sigma d eps / d x)] = e^(-lambda) E[diag(d eps / d y)]."""
    total = torch.zeros_like(data[0], dtype=torch.float64)
    rho = float(torch.exp(torch.tensor(-lam, dtype=torch.float64)))
    for rows in parts:
        y = (data[rows] + rho * noise[rows]).requires_grad_()
        with torch.enable_grad():
            out = eps(y, lam, rows)
        for k, v in enumerate(signs):
            (row,) = torch.autograd.grad(out, y, v[rows], retain_graph=k + 1 < len(signs))
            total += (v[rows] * row).double().sum(0)
    return rho * total / (len(data) * len(signs))


@torch.no_grad()
def _affine(
    eps: Any, data: Tensor, noise: Tensor, plain: EmpiricalStatistics, lam: float, parts: list[slice]
) -> tuple[Tensor, Tensor]:
    """The best s and b of df/dlambda = s f + b along the flow dy/dlambda = -e^(-lambda) eps."""
    rho = float(torch.exp(torch.tensor(-lam, dtype=torch.float64)))
    spacing = float(plain.lams[1] - plain.lams[0])
    step, here, slope, whole = spacing / 4, [], [], []
    for rows, sign in [
        (rows, sign) for rows in parts for sign in (1.0, -1.0)
    ]:  # pairs of opposite noise: odd errors cancel
        y = data[rows] + sign * rho * noise[rows]
        move = -rho * eps(y, lam, rows)

        def f(at: Tensor, level: float, rows: slice = rows) -> Tensor:
            return (  # type: ignore[no-any-return]
                eps(at, level, rows).double() * float(torch.exp(torch.tensor(-level, dtype=torch.float64)))
                - plain.at(level)[0].to(at.device) * at.double()
            )

        here.append(f(y, lam))
        whole.append(y.double())
        slope.append((f(y + step * move, lam + step) - f(y - step * move, lam - step)) / (2 * step))
    value, rate = torch.cat(here), torch.cat(slope)
    mean, mean_rate = value.mean(0), rate.mean(0)
    variance = (value - mean).square().mean(0)
    covariance = ((value - mean) * (rate - mean_rate)).mean(0)
    error = (spacing**2 / 20) ** 2 * torch.cat(whole).var(0, unbiased=False)
    s = covariance / variance.clamp(min=1e-30) * (1 - error / variance.clamp(min=1e-30)).clamp(min=0)
    return s, mean_rate - s * mean


def _smoothed(values: Tensor) -> Tensor:
    """A quadratic fitted to each level and two neighbours on each side; the two levels at each end stay."""
    if len(values) < 5:
        return values
    parts = [w * values[k : len(values) - 4 + k] for k, w in enumerate((-3, 12, 17, 12, -3))]
    return torch.cat([values[:2], sum(parts[1:], parts[0]) / 35, values[-2:]])
