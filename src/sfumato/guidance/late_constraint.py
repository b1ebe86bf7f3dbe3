"""Late constraint: a spatial condition read off a frozen network's features steers the sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, Guidance, InputError, Posterior, Wrapper, linear
from sfumato.core.trees import column
from sfumato.denoisers.features import reading
from sfumato.guidance.loss import through_network

Aligner = Callable[[Sequence[Tensor], Tensor], Tensor]
"""(features, label (B,)) -> (B, c, H, W)."""


class LateConstraint(Wrapper):
    """See :func:`late_constraint`."""

    def __init__(
        self,
        inner: Denoiser,
        aligner: Aligner,
        target: Tensor,
        paths: Sequence[str],
        scale: float = 2.0,
        until: float = 0.5,
    ) -> None:
        super().__init__(inner)
        if not (0 <= until <= 1 and scale >= 0 and math.isfinite(scale)):
            raise InputError(f"until = {until} and scale = {scale}: a time in [0, 1] and a scale of at least 0")
        self.aligner, self.target, self.paths = aligner, target, tuple(paths)
        self.scale, self.until = scale, until

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        if isinstance(t, Tensor):
            raise InputError("a late constraint needs one clock for the batch")
        coef = self.process.coef(t)
        if self.scale == 0 or t <= self.until or coef.sigma == 0:
            return self.inner(x, t, ctx)  # type: ignore[no-any-return]
        found: dict[str, Tensor] = {}

        def keep(path: str) -> Callable[[Tensor], None]:
            """Remembers the conditional rows of the first call."""
            return lambda h: None if path in found else found.update({path: h[: ctx.batch]})

        taps = [reading(path, keep(path)) for path in self.paths]
        if self.paths:
            post, slope, _ = through_network(
                self.inner,
                x,
                t,
                ctx.fork(taps=taps),
                lambda x0: (self.misfit([found[p] for p in self.paths], t).sum(), None),
            )
        else:
            post = self.inner(x, t, ctx)
            with torch.enable_grad():
                at = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self.misfit([at], t).sum(), at)
        return post.but(x0=linear(1.0, post.mean, -self.scale, self.step(post, slope)))

    def misfit(self, features: Sequence[Tensor], t: float) -> Tensor:
        """The mean square distance of what the features say from the target, (B,)."""
        label = torch.full((len(features[0]),), t, dtype=features[0].dtype, device=features[0].device)
        said = self.aligner(features, label)
        if said.shape[1:] != self.target.shape[1:] or len(self.target) not in (1, len(said)):
            raise InputError(f"the aligner says {tuple(said.shape)}, the target is {tuple(self.target.shape)}")
        return (said - self.target.to(said)).square().flatten(1).mean(1)

    @staticmethod
    def step(post: Posterior, slope: Tensor) -> Tensor:
        """sigma / alpha |eps - x| slope / |slope| for a variance-preserving state, item by item; finite where alpha = 0."""
        a, s = post.coef.alpha, post.coef.sigma
        r = math.hypot(a, s)  # any other state is brought to variance one first: x0 stays
        share = 0.0 if a == 0 else (1 - s / r) / a
        pull = linear(1.0, post.mean, -share, post.x)  # alpha / sigma (x - eps)
        size, length = pull.flatten(1).norm(dim=1), slope.flatten(1).norm(dim=1)
        return slope * column(
            torch.where(length > 0, size / length.clamp(min=torch.finfo(length.dtype).tiny), 0.0), slope
        )


def late_constraint(
    aligner: Aligner, target: Tensor, paths: Sequence[str], *, scale: float = 2.0, until: float = 0.5
) -> Guidance:
    """Steer by the misfit of what a frozen network's features say and a condition map: while t > until,

        eps <- eps + scale |eps - x_t| / |g| g,    g = grad_{x_t} |A(F(x_t, t), t) - target|^2,

    x_t fixed, norms an item (published: over the batch), x_t at variance one. In x0 this is a move by scale times
    |x0 - (1 - sigma) / alpha x_t| against g, which stays finite where alpha = 0.

    aligner  what :class:`sfumato.objectives.alignment.ConditionAlignment` learns, for these ``paths`` in this order; without
             paths it is fed with x_t
    target   (B or 1, c, H, W) the map that is wanted
    until    layout is decided above it; a target that no picture of the data meets pushes until there

    Put it outside of guidance that stacks rows, ``late_constraint(...)(cfg(3.0)(denoiser))``: features are those of the
    conditional rows. Costs a backward pass a call. Raises InputError for a target of another shape. Source: Liu, Li, Zhang, Luo,
    Liu, 2024, "LaCon: Late-Constraint Diffusion for Steerable Guided Image Synthesis" (until 0.5 for edges, 0.6 for masks and
    strokes, 0.8 for palettes).
    """
    return lambda inner: LateConstraint(inner, aligner, target, paths, scale, until)


__all__ = ["LateConstraint", "late_constraint"]
