"""The Fokker-Planck equation as a training signal: scalar networks for the log density, their residual, the penalty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import Context, InputError, Loss, Objective
from sfumato.objectives.denoising import Denoising
from sfumato.objectives.times import Times, Uniform
from sfumato.processes.base import sde


def divergence(field: Tensor, x: Tensor, probes: Tensor | None = None, *, create_graph: bool = False) -> Tensor:
    """sum_i d field_i / d x_i, (B,), of a field (B, *) that was computed from x (B, *) with a graph.

    probes  None: exact, one backward pass a dimension; (k, B, *) of unit variance: the mean of v^T (d field / dx) v, one
            backward pass a probe (Hutchinson, 1989, "A stochastic estimator of the trace of the influence matrix")
    """
    if not field.requires_grad:  # constant in x
        return field.new_zeros(len(x))

    def pulled(scalar: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(scalar, x, retain_graph=True, create_graph=create_graph, materialize_grads=True)
        return slope.flatten(1)

    flat = field.flatten(1)
    if probes is None:
        return torch.stack([pulled(flat[:, i].sum())[:, i] for i in range(flat.shape[1])]).sum(0)
    return torch.stack([(pulled((field * v).sum()) * v.flatten(1)).sum(1) for v in probes]).mean(0)


def signs(x: Tensor, count: int | None, ctx: Context) -> Tensor | None:
    """``count`` probes of random signs (count, B, *), item by item from the streams of the context; None for None."""
    if count is None:
        return None
    if count < 1:
        raise InputError(f"probes = {count}: at least 1, or None for the exact divergence")
    if ctx.rng is None:
        raise InputError("probes are drawn: give a context with streams, Context.of(batch, seed)")
    draws = [ctx.rng.uniform(torch.empty_like(x, dtype=torch.float64)) for _ in range(count)]
    return torch.where(torch.stack(draws) < 0.5, -1.0, 1.0).to(x)


def log_density_residual(
    denoiser: Any, x: Tensor, t: Any, *, probes: int | None = None, ctx: Context | None = None, seed: int = 0,
    create_graph: bool = False,
) -> Tensor:  # fmt: skip
    """R[u] = du/dt + div f + f . grad u - g^2 (|grad u|^2 + lap u) / 2, (B,), of a scalar log density u.

    It is 0 everywhere exactly where exp(u) solves the Fokker-Planck equation of dx = f dt + g dw, f = a x. Where R = 0
    the reverse equation and the probability flow of the model have the same marginals, if they start from the same.

    denoiser  a :class:`Potential`, or anything with ``process`` and ``log_density(x, t, ctx)``; its normalisation counts
              here: a constant c(t) added to u adds c'(t)
    t         a float, or one clock an item (B,), in the library's time in (0, 1)
    probes    None: the exact Laplacian, one backward pass a dimension; else Hutchinson's with that many probes

    Source: Deveney, Stanczuk, Kreusser, Budd, Schonlieb, 2023, "Closing the ODE-SDE gap in score-based diffusion models
    through the Fokker-Planck equation".
    """
    if not hasattr(denoiser, "log_density"):
        raise InputError(
            f"{type(denoiser).__name__} has no log density: use a Potential, or analysis.score_residual of its score"
        )
    ctx = Context.of(len(x), seed, dtype=x.dtype, device=x.device) if ctx is None else ctx
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        clock = clocks(t, x).requires_grad_(True)
        rate, g2 = (v.detach().to(x) for v in sde(denoiser.process, clock))
        u = denoiser.log_density(x, clock, ctx)
        slope, speed = torch.autograd.grad(u.sum(), (x, clock), create_graph=True, materialize_grads=True)
        laplacian = divergence(slope, x, signs(x, probes, ctx), create_graph=create_graph)
        flat, place = slope.flatten(1), x.flatten(1)
        transport = rate * (place.shape[1] + (place * flat).sum(1))
        residual = speed.to(x) + transport - 0.5 * g2 * (flat.square().sum(1) + laplacian)
    return residual if create_graph else residual.detach()


def clocks(t: Any, x: Tensor) -> Tensor:
    """One clock an item, (B,) float64, without a graph."""
    if isinstance(t, Tensor) and t.shape not in ((), (len(x),)):
        raise InputError(f"t has shape {tuple(t.shape)}: one time, or one an item ({len(x)},)")
    return torch.as_tensor(t, dtype=torch.float64, device=x.device).detach().expand(len(x)).clone()


class FokkerPlanck(Objective):
    """base + weight mean R[u]^2: the penalty on the Fokker-Planck residual of a log density, at collocation points.

    base      a :class:`Denoising` objective of a :class:`Potential`; its player is the only one
    weight    of the squared residual, with R in the library's time: a clock that runs k times as fast has k times the R
    box       (low, high): points uniform in that cube; None: the noised data x_t, for more than about ten dimensions
    every     one point for every so many items of a batch
    times     sampler of their times (default: uniform on [1e-4, 1])
    probes    of the Laplacian, None for the exact one (small dimensions)

    Logs 'error' and 'residual' (the mean square). Raises InputError where the denoiser has no log density, where the weight is
    not positive, and where data lie outside of the box, which would leave their density unconstrained.
    Source: Deveney et al., 2023, "Closing the ODE-SDE gap ..."; the form is that of Raissi, Perdikaris, Karniadakis,
    2019, "Physics-informed neural networks".
    """

    def __init__(
        self, base: Denoising, weight: float, *, box: tuple[float, float] | None = None, times: Times | None = None,
        every: int = 1, probes: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not hasattr(base.denoiser, "log_density"):
            raise InputError(f"{type(base.denoiser).__name__} has no log density to penalise: train a Potential")
        if not weight > 0 or every < 1 or (box is not None and not box[0] < box[1]):
            raise InputError(f"weight = {weight}, every = {every}, box = {box}: above 0, at least 1, and low < high")
        self.base, self.weight, self.box, self.every, self.probes = base, weight, box, every, probes
        self.times = Uniform(1e-4, 1.0) if times is None else times

    def players(self) -> Mapping[str, nn.Module]:
        return self.base.players()

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str = "denoiser") -> Loss:
        loss, denoiser = self.base(batch, ctx, player), self.base.denoiser
        if ctx.rng is None:
            raise InputError("collocation points are drawn: give a context with streams, Context.of(batch, seed)")
        some = slice(None, None, self.every)
        streams = ctx.rng.select(some)
        ctx = replace(ctx, rng=streams, batch=len(batch["x"][some]))
        t, importance = self.times(denoiser.process, streams)
        x = self._points(batch["x"], t.to(batch["x"].device), ctx)
        residual = log_density_residual(denoiser, x, t.to(x.device), probes=self.probes, ctx=ctx, create_graph=True)
        square = (residual.square() * importance.to(residual)).mean()
        return Loss(loss.total + self.weight * square, {**loss.terms, "residual": square.detach()})

    def after_step(self, it: int) -> None:
        self.base.after_step(it)

    def _points(self, x0: Tensor, t: Tensor, ctx: Context) -> Tensor:
        if self.box is None:
            return self.base.denoiser.process.corrupt(x0[:: self.every], t, ctx)[0]  # type: ignore[no-any-return]
        low, high = self.box
        if bool(((x0 < low) | (x0 > high)).any()):
            raise InputError(
                f"data between {float(x0.min()):g} and {float(x0.max()):g} in a box [{low:g}, {high:g}]: widen it"
            )
        return low + (high - low) * ctx.rng.uniform(x0[:: self.every])  # type: ignore[no-any-return, union-attr]
