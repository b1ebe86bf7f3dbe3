"""Mixtures of whole Gaussians: correlated components, the belief given one of them, and what a measurement leaves of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Coef, Context, InputError, Posterior, Streams, linear
from sfumato.denoisers.oracles import Distribution, Gaussian, Oracle, _column, _normal


class Mixture(Distribution):
    """sum_k w_k N(m_k, C_k) with whole covariances: ``components`` (K Gaussians of one dimension), weights (K,).

    Each component is evaluated in its own eigenbasis. ``labelled(process)`` is the belief given the component, and
    ``given(A, y, noise)`` what a measurement leaves of it: again a mixture, one an item. Weights are equal by default.
    """

    def __init__(self, components: Sequence[Gaussian], weights: Tensor | Any | None = None) -> None:
        if not components or len({part.shape for part in components}) != 1:
            raise InputError("a mixture needs at least one Gaussian, all of one dimension")
        k, self.shape = len(components), components[0].shape
        weights = torch.as_tensor([1.0] * k if weights is None else weights, dtype=torch.float64)
        if weights.shape != (k,) or weights.min() < 0 or weights.sum() <= 0:
            raise InputError(f"weights must be ({k},) non-negative numbers")
        self.variances = torch.stack([part.variances for part in components])
        self.basis = torch.stack([part.basis for part in components])
        self.axes = self.basis.transpose(0, 1).flatten(1)  # (d, K d): all eigenbases side by side
        self._place(torch.stack([part.mean for part in components]), (weights / weights.sum()).log())

    def _place(self, means: Tensor, log_weights: Tensor) -> None:
        """Means (K, d) and log weights (K,), or one law an item: (B, K, d) and (B, K)."""
        self.means, self.log_weights = means, log_weights
        self.centres = (means[..., None, :] @ self.basis).squeeze(-2)  # in the eigenbases

    @property
    def covariances(self) -> Tensor:
        """C_k, (K, d, d)."""
        return (self.basis * self.variances[:, None]) @ self.basis.mT

    def labelled(self, process: Any, name: str = "label") -> Oracle:
        """The exact Denoiser given ``cond[name]`` (B,) int64, a component, or K for the whole mixture (its ``null``)."""
        return LabelledOracle(self, process, name)

    def given(self, matrix: Tensor | Any, y: Tensor, noise: float) -> Mixture:
        """p(x0 | y) for y = A x0 + noise N(0, I): A (m, d), y (B, m). A mixture for each of B items, in their order.

        The weights go with the evidence N(y; A m_k, A C_k A^T + noise^2 I), the means by Kalman's gain.
        """
        a, y = torch.as_tensor(matrix, dtype=torch.float64), y.double()
        if a.ndim != 2 or a.shape[1:] != self.shape or y.ndim != 2 or y.shape[1] != len(a):
            raise InputError(f"A is (m, {self.shape[0]}) and y (B, m), not {tuple(a.shape)} and {tuple(y.shape)}")
        if not noise > 0:
            raise InputError(f"noise = {noise}: positive, since exact measurements leave no density")
        parts, means, logs = [], [], []
        for k, cov in enumerate(self.covariances):
            factor = torch.linalg.cholesky(a @ cov @ a.T + noise**2 * torch.eye(len(a), dtype=torch.float64))
            gain = torch.cholesky_solve(a @ cov, factor).T
            mean = self.means[..., k, :]
            off = y - mean @ a.T
            left = cov - gain @ a @ cov
            parts.append(Gaussian(torch.zeros_like(left[0]), (left + left.T) / 2))
            means.append(mean + off @ gain.T)
            white = torch.linalg.solve_triangular(factor, off.T, upper=False)
            logs.append(-0.5 * (white**2).sum(0) - factor.diag().log().sum())
        out = Mixture(parts)
        out._place(torch.stack(means, 1), (self.log_weights + torch.stack(logs, 1)).log_softmax(-1))
        return out

    def shifted(self, by: Tensor) -> Mixture:
        """The law of x0 + by, with by (d,), or (B, d) for a law an item."""
        out = Mixture([Gaussian(torch.zeros(self.shape, dtype=torch.float64), c) for c in self.covariances])
        moved = self.means + (by if by.ndim == 1 else by[:, None])
        out._place(moved, self.log_weights.expand(moved.shape[:-1]))
        return out

    def _components(self, x: Tensor, c: Coef) -> tuple[Tensor, Tensor, Tensor]:
        """Residuals in the eigenbases (B, K, d), marginal variances (., K, d) and log responsibilities (B, K)."""
        flat = self._flat(x)
        if self.means.ndim == 3 and len(flat) != len(self.means):
            raise InputError(f"this mixture was measured for {len(self.means)} items, not for {len(flat)}")
        a, s = (v[:, :, None] if isinstance(v, Tensor) else v for v in (_column(c.alpha, flat), _column(c.sigma, flat)))
        total = (a * a * self.variances.to(x) + s * s).clamp(min=torch.finfo(x.dtype).tiny)
        residual = (flat @ self.axes.to(x)).view(len(flat), *self.variances.shape) - a * self.centres.to(x)
        logits = self.log_weights.to(x) - 0.5 * ((residual**2 / total).sum(-1) + total.log().sum(-1))
        return residual, total, logits

    def belief(self, x: Tensor, c: Coef, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(E[x0 | x], E[eps | x]), of component ``label`` (B,) where it is given; K stands for the whole mixture."""
        residual, total, logits = self._components(x, c)
        if label is not None:
            k = torch.arange(logits.shape[1], device=x.device)
            logits = logits.masked_fill((label[:, None] != k) & (label[:, None] != len(k)), -math.inf)
        share = logits.softmax(-1)[..., None]
        a, s = (v[:, :, None] if isinstance(v, Tensor) else v for v in (_column(c.alpha, x), _column(c.sigma, x)))
        inside = (share / total * residual).masked_fill_(share == 0, 0.0)
        axes = self.axes.T.to(x)
        x0 = ((share * self.centres.to(x)) + a * self.variances.to(x) * inside).flatten(1) @ axes
        return x0, (s * inside).flatten(1) @ axes

    def classify(self, x: Tensor, c: Coef) -> Tensor:
        """log p(component | x_t), (B, K)."""
        return self._components(x, c)[2].log_softmax(-1)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        return self.sample_with_component(n, seed)[0]

    def sample_with_component(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draws and the components (n,) they came from; of a measured mixture one an item."""
        if self.means.ndim == 3 and n != len(self.means):
            raise InputError(f"this mixture was measured for {len(self.means)} items: draw as many, not {n}")
        streams = Streams.of(seed, n)
        streams.at(1)
        u = streams.uniform(torch.empty(n, 1, dtype=torch.float64))
        edges = self.log_weights.exp().cumsum(-1).expand(n, -1)
        k = (u >= edges).sum(-1).clamp(max=len(self.variances) - 1)
        z = self.variances[k].sqrt() * _normal((n, *self.shape), seed)
        mean = self.means[k] if self.means.ndim == 2 else self.means[torch.arange(n), k]
        return mean + (self.basis[k] @ z[..., None]).squeeze(-1), k

    def log_prob(self, x: Tensor) -> Tensor:
        if self.variances.min() == 0:
            raise InputError("a mixture with a degenerate component has no density")
        logits = self._components(x.double(), Coef(1.0, 0.0, 0.0, 0.0))[2]
        return logits.logsumexp(-1) - 0.5 * self.shape[0] * math.log(2 * math.pi)


class LabelledOracle(Oracle):
    """See :meth:`Mixture.labelled`."""

    distribution: Mixture

    def __init__(self, distribution: Mixture, process: Any, name: str) -> None:
        super().__init__(distribution, process)
        self.name, self.null = name, {name: len(distribution.variances)}

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        coef = self.process.coef(t)
        label = ctx.cond.get(self.name)
        if not isinstance(label, Tensor) or label.shape != (len(x),):
            raise InputError(f"give cond={{{self.name!r}: components (B,)}}, {self.null[self.name]} for none of them")
        x0, eps = self.distribution.belief(x, coef, label)
        ctx.run.nfe += len(x) / ctx.batch
        return Posterior(linear(-coef.sigma, x0, coef.alpha, eps), "v", x, coef)
