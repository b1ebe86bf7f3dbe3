"""Distributions whose belief about x0 is known exactly: the test bench, the tutorial and the benchmark of everything else.

Each holds float64, follows the dtype and device of the state it is asked about, and gives ``denoiser(process)``,
``sample(n, seed)`` and ``log_prob(x)``. Beliefs are returned as 'v', which is finite at alpha = 0 and at sigma = 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Coef, Context, Denoiser, InputError, Posterior, Streams
from sfumato.core.trees import linear


class Oracle(Denoiser):
    """The exact Denoiser of a distribution under a Gaussian process."""

    def __init__(self, distribution: Distribution, process: Any) -> None:
        super().__init__()
        self.distribution, self.process = distribution, process

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        coef = self.process.coef(t)
        x0, eps = self.distribution.belief(x, coef)
        ctx.run.nfe += len(x) / ctx.batch
        return Posterior(linear(-coef.sigma, x0, coef.alpha, eps), "v", x, coef)


class Distribution:
    """A density on R^d or on tensors of a fixed shape, with its exact belief E[x0 | x_t] and E[eps | x_t]."""

    shape: tuple[int, ...]

    def belief(self, x: Tensor, c: Coef) -> tuple[Tensor, Tensor]:
        """(E[x0 | x], E[eps | x]) at x = alpha x0 + sigma eps, both (B, *)."""
        raise NotImplementedError(f"{type(self).__name__} must give its belief")

    def denoiser(self, process: Any) -> Oracle:
        """The exact Denoiser under ``process``."""
        return Oracle(self, process)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n exact draws (n, *), float64."""
        raise NotImplementedError(f"{type(self).__name__} must give sample")

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log density (n,), in nats."""
        raise NotImplementedError(f"{type(self).__name__} must give log_prob")

    def _flat(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise InputError(f"this distribution lives on {self.shape}, not on {tuple(x.shape[1:])}")
        if not x.is_floating_point():
            raise InputError(f"a state is floating point, not {x.dtype}: use x.double()")
        return x.flatten(1)


def _column(v: Any, x: Tensor) -> Any:
    """A number, or (B,) as (B, 1) on the device and dtype of x."""
    return v.to(x)[:, None] if isinstance(v, Tensor) else v


def _normal(shape: tuple[int, ...], seed: int, draw: int = 0) -> Tensor:
    streams = Streams.of(seed, shape[0])
    streams.at(draw)
    return streams.normal(torch.empty(shape, dtype=torch.float64))


class Gaussian(Distribution):
    """N(mean, cov): mean (d,), cov (d, d), or (d,) variances, or one variance; zero variances are allowed.

    E[x0 | x] = m + alpha C (alpha^2 C + sigma^2 I)^-1 (x - alpha m) in the eigenbasis of C.
    """

    def __init__(self, mean: Tensor | Any, cov: Tensor | Any) -> None:
        self.mean = torch.as_tensor(mean, dtype=torch.float64)
        if self.mean.ndim != 1:
            raise InputError(f"mean must be (d,), not {tuple(self.mean.shape)}")
        d = len(self.mean)
        cov = torch.as_tensor(cov, dtype=torch.float64)
        cov = torch.diag(cov.expand(d)) if cov.ndim < 2 else cov
        if cov.shape != (d, d) or not torch.allclose(cov, cov.T):
            raise InputError(f"cov must be a symmetric ({d}, {d}) matrix, ({d},) variances or a number")
        self.variances, self.basis = torch.linalg.eigh(cov)
        if self.variances.min() < -1e-9 * max(1.0, float(self.variances.max())):
            raise InputError("cov has a negative eigenvalue: it is no covariance")
        self.variances = self.variances.clamp(min=0)
        self.shape = (d,)

    @staticmethod
    def low_rank(mean: Tensor, factor: Tensor, noise: float = 0.0) -> Gaussian:
        """N(mean, F F^T + noise^2 I) with factor F (d, r)."""
        factor = torch.as_tensor(factor, dtype=torch.float64)
        return Gaussian(mean, factor @ factor.T + noise**2 * torch.eye(len(factor), dtype=torch.float64))

    def belief(self, x: Tensor, c: Coef) -> tuple[Tensor, Tensor]:
        flat, m, w, v = self._flat(x), self.mean.to(x), self.variances.to(x), self.basis.to(x)
        a, s = _column(c.alpha, flat), _column(c.sigma, flat)
        z = (flat - a * m) @ v
        total = a * a * w + s * s
        inside = torch.where(total == 0, 0.0, z / torch.where(total == 0, 1.0, total))
        return m + (a * w * inside) @ v.T, (s * inside) @ v.T

    def transport(self, x: Tensor, c: Coef, d: Coef) -> Tensor:
        """The exact probability-flow map from the marginal with coefficients c to the one with d."""
        m, w, v = self.mean.to(x), self.variances.to(x), self.basis.to(x)
        ratio = ((d.alpha**2 * w + d.sigma**2) / (c.alpha**2 * w + c.sigma**2)).sqrt()
        return d.alpha * m + (((x - c.alpha * m) @ v) * ratio) @ v.T

    def sample(self, n: int, seed: int = 0) -> Tensor:
        return self.mean + (_normal((n, *self.shape), seed) * self.variances.sqrt()) @ self.basis.T

    def log_prob(self, x: Tensor) -> Tensor:
        if self.variances.min() == 0:
            raise InputError("a degenerate Gaussian has no density")
        z = (self._flat(x).double() - self.mean) @ self.basis
        d = len(self.mean)
        return -0.5 * ((z * z / self.variances).sum(-1) + self.variances.log().sum() + d * math.log(2 * math.pi))


class GaussianMixture(Distribution):
    """sum_k w_k N(mu_k, diag(s_k^2)): means (K, d), stds (K,) or (K, d), weights (K,) (default: equal)."""

    def __init__(self, means: Tensor | Any, stds: Tensor | Any, weights: Tensor | Any | None = None) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float64)
        if self.means.ndim != 2:
            raise InputError(f"means must be (K, d), not {tuple(self.means.shape)}")
        k, d = self.means.shape
        stds = torch.as_tensor(stds, dtype=torch.float64)
        if stds.ndim > 2 or (stds.ndim and len(stds) != k) or stds.min() < 0:
            raise InputError(f"stds must be ({k},) or ({k}, {d}) non-negative numbers, not {tuple(stds.shape)}")
        self.variances = (stds[:, None] if stds.ndim == 1 else stds).expand(k, d) ** 2
        weights = (
            torch.ones(k, dtype=torch.float64) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        )
        if weights.shape != (k,) or weights.min() < 0 or weights.sum() <= 0:
            raise InputError(f"weights must be ({k},) non-negative numbers")
        self.weights = weights / weights.sum()
        self.shape = (d,)

    def _components(self, x: Tensor, c: Coef) -> tuple[Tensor, Tensor, Tensor]:
        """Residuals (B, K, d), marginal variances (., K, d) and log responsibilities (B, K)."""
        flat, mu, var = self._flat(x), self.means.to(x), self.variances.to(x)
        a, s = (v[:, :, None] if isinstance(v, Tensor) else v for v in (_column(c.alpha, flat), _column(c.sigma, flat)))
        total = (a * a * var + s * s).clamp(min=torch.finfo(x.dtype).tiny)
        residual = flat[:, None] - a * mu
        logits = self.weights.to(x).log() - 0.5 * (residual**2 / total + total.log()).sum(-1)
        return residual, total, logits

    def belief(self, x: Tensor, c: Coef) -> tuple[Tensor, Tensor]:
        residual, total, logits = self._components(x, c)
        share = logits.softmax(-1)[..., None]
        a, s = (v[:, :, None] if isinstance(v, Tensor) else v for v in (_column(c.alpha, x), _column(c.sigma, x)))
        inside = (residual / total).masked_fill(share == 0, 0.0)  # at sigma = 0 other points are infinitely far
        x0 = (share * (self.means.to(x) + a * self.variances.to(x) * inside)).sum(1)
        return x0, (share * (s * inside)).sum(1)

    def classify(self, x: Tensor, c: Coef) -> Tensor:
        """log p(component | x_t), (B, K)."""
        return self._components(x, c)[2].log_softmax(-1)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        return self.sample_with_component(n, seed)[0]

    def sample_with_component(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draws and the components (n,) they came from."""
        streams = Streams.of(seed, n)
        streams.at(1)
        u = streams.uniform(torch.empty(n, 1, dtype=torch.float64))
        k = torch.searchsorted(self.weights.cumsum(0), u.squeeze(-1)).clamp(max=len(self.weights) - 1)
        return self.means[k] + self.variances[k].sqrt() * _normal((n, *self.shape), seed), k

    def log_prob(self, x: Tensor) -> Tensor:
        if self.variances.min() == 0:
            raise InputError("a mixture with a zero std has no density")
        logits = self._components(x.double(), Coef(1.0, 0.0, 0.0, 0.0))[2]
        return logits.logsumexp(-1) - 0.5 * self.means.shape[1] * math.log(2 * math.pi)


class Empirical(Distribution):
    """The uniform distribution on a data set (N, *), optionally blurred to a kernel density of ``std``.

    E[x0 | x] = softmax(-|x - alpha x_i|^2 / 2 total) x_i with total = alpha^2 std^2 + sigma^2: what a network that
    memorised its training set perfectly would say. Chunked over the data, so tens of thousands of images work.
    """

    def __init__(self, data: Tensor | Any, std: float = 0.0, chunk: int = 4096) -> None:
        self.data = torch.as_tensor(data, dtype=torch.float64)
        if self.data.ndim < 2 or len(self.data) == 0:
            raise InputError(f"data must be (N, *) with N > 0, not {tuple(self.data.shape)}")
        if std < 0:
            raise InputError(f"std = {std}: not negative")
        self.std, self.chunk, self.shape = float(std), int(chunk), tuple(self.data.shape[1:])

    def _log_weights(self, x: Tensor, c: Coef) -> Tensor:
        """-|x - alpha x_i|^2 / (2 total), (B, N); at total = 0 all weight is on the nearest item."""
        flat = self._flat(x)
        a, s = _column(c.alpha, flat), _column(c.sigma, flat)
        total = a * a * self.std**2 + s * s
        out = []
        for part in self.data.split(self.chunk):
            y = part.reshape(len(part), -1).to(x)
            cross = flat @ y.T
            out.append(2 * a * cross - a * a * (y * y).sum(-1))
        score = torch.cat(out, -1)
        if not isinstance(total, Tensor):
            total = score.new_tensor(total)
        score = score - score.amax(-1, keepdim=True)
        nearest = score.masked_fill(score < 0, -math.inf)
        return torch.where(total == 0, nearest, score / (2 * torch.where(total == 0, 1.0, total)))

    def belief(self, x: Tensor, c: Coef) -> tuple[Tensor, Tensor]:
        share = self._log_weights(x, c).softmax(-1)
        parts = zip(share.split(self.chunk, -1), self.data.split(self.chunk), strict=True)
        mean = torch.stack([w @ y.reshape(len(y), -1).to(x) for w, y in parts]).sum(0)
        flat = self._flat(x)
        a, s = _column(c.alpha, flat), _column(c.sigma, flat)
        total = a * a * self.std**2 + s * s
        total = torch.where(total == 0, 1.0, total) if isinstance(total, Tensor) else total or 1.0
        inside = (flat - a * mean) / total
        return (mean + a * self.std**2 * inside).reshape(x.shape), (s * inside).reshape(x.shape)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        streams = Streams.of(seed, n)
        streams.at(1)
        u = streams.uniform(torch.empty(n, 1, dtype=torch.float64)).squeeze(-1)
        chosen = self.data[(u * len(self.data)).long().clamp(max=len(self.data) - 1)]
        return chosen + self.std * _normal((n, *self.shape), seed) if self.std else chosen

    def log_prob(self, x: Tensor) -> Tensor:
        if self.std == 0:
            raise InputError("a finite data set has no density: give it a std")
        flat, d = self._flat(x).double(), self.data[0].numel()
        distance = torch.cat([torch.cdist(flat, p.reshape(len(p), -1)) ** 2 for p in self.data.split(self.chunk)], -1)
        logs = (-distance / (2 * self.std**2)).logsumexp(-1) - math.log(len(self.data))
        return logs - 0.5 * d * math.log(2 * math.pi * self.std**2)


class LinearSubspace(Distribution):
    """x = A z with orthonormal columns A (D, d) and z from another exact distribution on R^d.

    E[x0 | x] = A E[z | A^T x] and E[eps | x] = A E[eps_z | A^T x] + (I - A A^T) x / sigma: the second term is known, so
    only d dimensions have to be learned. Source: Chen, Mei, Fan, Wang, 2024, "An Overview of Diffusion Models".
    """

    def __init__(self, basis: Tensor | Any, latent: Distribution) -> None:
        self.basis = torch.as_tensor(basis, dtype=torch.float64)
        if self.basis.ndim != 2 or (self.basis.shape[1],) != latent.shape:
            raise InputError(f"basis must be (D, {latent.shape[0]}) for this latent, not {tuple(self.basis.shape)}")
        if not torch.allclose(
            self.basis.T @ self.basis, torch.eye(self.basis.shape[1], dtype=torch.float64), atol=1e-8
        ):
            raise InputError("the columns of the basis must be orthonormal: use torch.linalg.qr")
        self.latent, self.shape = latent, (self.basis.shape[0],)

    def belief(self, x: Tensor, c: Coef) -> tuple[Tensor, Tensor]:
        flat, a = self._flat(x), self.basis.to(x)
        inside = flat @ a
        z, eps = self.latent.belief(inside, c)
        s = _column(c.sigma, flat)
        off = flat - inside @ a.T
        if isinstance(s, Tensor):
            off = torch.where(s == 0, 0.0, off / torch.where(s == 0, 1.0, s))
        else:
            off = off / s if s else torch.zeros_like(off)
        return z @ a.T, eps @ a.T + off

    def sample(self, n: int, seed: int = 0) -> Tensor:
        return self.latent.sample(n, seed) @ self.basis.T

    def log_prob(self, x: Tensor) -> Tensor:
        """The density on the subspace (with respect to its d-dimensional volume); -inf off it."""
        flat = self._flat(x).double()
        inside = flat @ self.basis
        off = (flat - inside @ self.basis.T).norm(dim=-1) > 1e-6 * flat.norm(dim=-1).clamp(min=1.0)
        return torch.where(off, -math.inf, self.latent.log_prob(inside))
