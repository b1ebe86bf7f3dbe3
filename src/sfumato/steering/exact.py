"""Mixtures tilted by a linear reward: the law and the soft value in closed form, to judge samplers of tilted laws by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, InputError
from sfumato.denoisers.oracles import GaussianMixture


class LinearTilt:
    """p(x0) exp(slope . x0) for a Gaussian mixture p.

    A component N(m, S) of weight w becomes N(m + S a, S) of weight w exp(a . m + a S a / 2), a the slope.
    """

    def __init__(self, mixture: GaussianMixture, slope: Any) -> None:
        self.mixture, self.slope = mixture, torch.as_tensor(slope, dtype=torch.float64)
        if self.slope.shape != mixture.shape:
            raise InputError(f"a slope of shape {tuple(self.slope.shape)} for a mixture on {mixture.shape}")

    @property
    def law(self) -> GaussianMixture:
        """The tilted mixture."""
        m = self.mixture
        gain = m.means @ self.slope + 0.5 * m.variances @ self.slope**2
        weights = (m.weights.log() + gain - gain.max()).exp()
        return GaussianMixture(m.means + m.variances * self.slope, m.variances.sqrt(), weights)

    def error(self, x: Tensor) -> float:
        """How far the mean and the covariance of samples (N, d) are from those of the law: the norm of both gaps."""
        law = self.law
        mean = law.weights @ law.means
        off = law.means - mean
        cov = torch.diag(law.weights @ law.variances) + off.T @ (law.weights[:, None] * off)
        gaps = x.mean(0) - mean.to(x), torch.cov(x.T) - cov.to(x)
        return float(sum(gap.square().sum() for gap in gaps) ** 0.5)

    def reward(self, x0: Tensor, cond: Any) -> Tensor:
        """slope . x0, (B,)."""
        return x0 @ self.slope.to(x0)

    def value(self, x: Tensor, s: Any, denoiser: Denoiser, ctx: Context) -> Tensor:
        """log E[exp(slope . x0) | x_s], (B,): the soft value at alpha = 1, in the form that ``svdd(value=...)`` takes."""
        m, c, a = self.mixture, denoiser.process.coef(s), self.slope.to(x)
        column = [v[:, None, None] if isinstance(v, Tensor) else v for v in (c.alpha, c.sigma)]
        alpha, sigma = (v.to(x) if isinstance(v, Tensor) else v for v in column)
        mu, var = m.means.to(x), m.variances.to(x)
        gain = alpha * var / (alpha**2 * var + sigma**2)
        mean = mu + gain * (x[:, None] - alpha * mu)
        spread = var - alpha * gain * var
        return (m.classify(x, c) + mean @ a + 0.5 * (spread * a**2).sum(-1)).logsumexp(-1)


__all__ = ["LinearTilt"]
