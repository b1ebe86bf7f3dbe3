"""Guidance by energies of a network's own features, each with the region of the picture that its gradient may move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, Guidance, InputError, Posterior, Wrapper, linear
from sfumato.denoisers.features import features
from sfumato.guidance.loss import rms

Energy: TypeAlias = Callable[[Mapping[str, Tensor], float], Tensor]
"""({path: features (B, *)}, t) -> (B,)."""

REFERENCE = 64 * 64  # cells of the latents that the published strengths were chosen for


@dataclass(frozen=True)
class Term:
    """An energy, and where its gradient acts: region in [0, 1], (B, 1, H, W) or what broadcasts to the state."""

    energy: Energy
    region: Tensor


class Energetic(Wrapper):
    """See :func:`energies`."""

    def __init__(
        self,
        inner: Denoiser,
        terms: Sequence[Term],
        paths: Sequence[str],
        estimator: Denoiser,
        scale: float,
        limit: float,
        dense: float,
        until: float,
    ) -> None:
        super().__init__(inner)
        if not terms or not paths:
            raise InputError("energies of nothing: give at least one term, and one path of features")
        if not (scale >= 0 and limit > 0 and 0 <= dense <= until <= 1):
            raise InputError(
                f"scale = {scale}, limit = {limit}, dense = {dense}, until = {until}: a scale of at least 0, a positive "
                "limit, and shares of the run with 0 <= dense <= until <= 1"
            )
        self.terms, self.paths, self.estimator = tuple(terms), tuple(paths), estimator
        self.scale, self.limit, self.dense, self.until = scale, limit, dense, until

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        post: Posterior = self.inner(x, t, ctx)
        coef = post.coef
        if not self.scale or coef.alpha == 0 or coef.sigma == 0 or not self.acts(ctx):
            return post
        push = self.push(x, t, ctx)
        size = self.limit * rms(post.view("eps"))
        push = push * (size / torch.maximum(rms(push), size).clamp(min=1e-30))
        return post.but(keep=("eps",), x0=linear(1.0, post.mean, -coef.sigma / coef.alpha, push))

    def acts(self, ctx: Context) -> bool:
        """All steps of the first share ``dense`` of the run, then every other one up to the share ``until``."""
        if ctx.run.total is None:
            return True
        share = ctx.run.step / ctx.run.total
        return share < self.dense or (share < self.until and ctx.run.step % 2 == 0)

    def push(self, x: Tensor, t: float, ctx: Context) -> Tensor:
        """The sum of region times gradient, scaled to the area of the state."""
        cells = x[0, 0].numel() / REFERENCE if x.ndim == 4 else 1.0
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            _, seen = features(self.estimator, at, t, ctx.fork("energies"), self.paths)
            values = [term.energy(seen, t) for term in self.terms]
            for value in values:
                if value.shape != (len(x),):
                    raise InputError(f"an energy gives one number an item, ({len(x)},), not {tuple(value.shape)}")
            slopes = [torch.autograd.grad(v.sum(), at, retain_graph=i + 1 < len(values)) for i, v in enumerate(values)]
        pushes = [term.region.to(x) * slope for term, (slope,) in zip(self.terms, slopes, strict=True)]
        return self.scale * cells * torch.stack(pushes).sum(0)


def energies(
    terms: Sequence[Term],
    paths: Sequence[str],
    *,
    estimator: Denoiser,
    scale: float = 1.0,
    limit: float = 1.0,
    dense: float = 0.2,
    until: float = 0.6,
) -> Guidance:
    """x0 <- x0 - (sigma / alpha) G with G = scale sum_k region_k grad E_k, while eps stays what it was.

    terms      energies of the features, each with the region in which its gradient acts, so that what is to change and what
               is to stay do not pull on the same cells
    paths      submodules whose outputs are the features
    estimator  the denoiser that is asked for them (one call and its backward pass): usually without guidance
    scale      of G, for latents of 64 x 64 cells: it is multiplied by the share of that area, as gradients of means grow with it
    limit      the largest root mean square of G, as a multiple of that of eps
    dense, until   shares of the run: at every step up to the first, at every other one up to the second, then not at all

    The belief becomes the pair (x0 moved, eps): DDIM then is alpha_s x0 + sigma_s eps, the published split of directions;
    ``steering.follow`` gives it to other solvers. Where alpha or sigma is 0 nothing moves. Source: Mou, Wang, Song, Shan,
    Zhang, 2024, "DiffEditor: Boosting Accuracy and Flexibility on Diffusion-based Image Editing"; Epstein, Jabri, Poole,
    Efros, Holynski, 2023, "Diffusion Self-Guidance for Controllable Image Generation".
    """
    return lambda inner: Energetic(inner, terms, paths, estimator, scale, limit, dense, until)


__all__ = ["Energetic", "Energy", "Term", "energies"]
