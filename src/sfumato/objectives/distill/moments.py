"""Tune a model through its own few-step sampler, until the moments of its samples are those of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import gradients, grids, solvers
from sfumato.core import Context, Denoiser, Frozen, Grid, InputError, Loss, Objective, Solver

KERNELS = ("cubic", "gaussian", "linear")


def gram(u: Tensor, v: Tensor, kernel: str = "cubic") -> Tensor:
    """k(u_i, v_j), (n, m), in float64: 'cubic' (<u, v> / d + 1)^3, 'gaussian' exp(-|u - v|^2 / d), 'linear' <u, v> / d + 1."""
    u, v, d = u.double(), v.double(), u.shape[1]
    if kernel == "gaussian":
        return (-((u[:, None] - v[None]) ** 2).sum(-1) / d).exp()
    inner = u @ v.T / d + 1
    if kernel not in KERNELS:
        raise InputError(f"kernel = {kernel!r}: use one of {', '.join(KERNELS)}")
    return inner**3 if kernel == "cubic" else inner


def squared_mmd(x: Tensor, y: Tensor, kernel: str = "cubic") -> Tensor:
    """The unbiased estimate of the squared maximum mean discrepancy of features x (n, d) and y (m, d).

    sum_{i != j} k(x_i, x_j) / (n (n - 1)) + the same of y - 2 mean k(x_i, y_j). It may be negative. Raises InputError for
    fewer than two items. Source: Gretton, Borgwardt, Rasch, Schoelkopf, Smola, 2012, "A Kernel Two-Sample Test".
    """
    if min(len(x), len(y)) < 2 or x.shape[1:] != y.shape[1:] or x.ndim != 2:
        raise InputError(f"features {tuple(x.shape)} and {tuple(y.shape)}: (n, d) and (m, d) of at least two items")

    def among(z: Tensor) -> Tensor:
        """The mean over pairs of different items."""
        k = gram(z, z, kernel)
        return (k.sum() - k.diagonal().sum()) / (len(z) * (len(z) - 1))

    return among(x) + among(y) - 2 * gram(x, y, kernel).mean()


class SamplerMMD(Objective):
    """min MMD^2(features(G(noise)), features(data)), G being a deterministic sampler of a few steps, differentiated through.

    denoiser   player 'denoiser'; tuned for exactly this sampler: use solver, grid and steps again to sample
    features   a frozen network (B, *) -> (B, d)
    solver, grid, steps   the sampler; one that draws noise is refused
    kernel     'cubic' | 'gaussian' | 'linear'
    memory     how gradients come back, a method of :func:`sfumato.gradients.sample`: 'checkpoint' keeps one step in memory

    A batch is {"x": data, "cond"}: its samples are made under the same conditions. Items are compared with each other, so
    a batch is never split. Source: Aiello, Valsesia, Magli, 2023, "Fast Inference in Denoising Diffusion Models via MMD
    Finetuning".
    """

    couples = True

    def __init__(
        self,
        denoiser: Denoiser,
        features: nn.Module,
        *,
        solver: str | Solver = "ddim",
        grid: str | Grid = "uniform",
        steps: int = 4,
        kernel: str = "cubic",
        memory: str = "checkpoint",
    ) -> None:
        super().__init__()
        self.denoiser, self.features = denoiser, Frozen(features)
        self.solver: Solver = solvers.registry.make(solver) if isinstance(solver, str) else solver
        self.grid: Grid = grids.registry.make(grid) if isinstance(grid, str) else grid
        if self.solver.stochastic or steps < 1 or kernel not in KERNELS:
            raise InputError(
                f"solver = {solver}, steps = {steps}, kernel = {kernel!r}: a deterministic solver, at least one step, and one "
                f"of {', '.join(KERNELS)}"
            )
        self.steps, self.kernel, self.memory = steps, kernel, memory

    def players(self) -> Mapping[str, nn.Module]:
        return {"denoiser": self.denoiser}

    def sampled(self, shape: Sequence[int], ctx: Context) -> Tensor:
        """Samples of the sampler that is tuned, with gradients."""
        process = self.denoiser.process
        noise = process.prior(shape, ctx)
        inner = Context(cond=ctx.cond, rng=ctx.rng, batch=ctx.batch, device=ctx.device, dtype=noise.dtype)
        return gradients.sample(  # type: ignore[no-any-return]
            self.denoiser, method=self.memory, solver=self.solver, grid=self.grid, steps=self.steps, x=noise, ctx=inner
        )

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str = "denoiser") -> Loss:
        if "x" not in batch:
            raise InputError(f"SamplerMMD reads batch['x'], the data; the batch has {sorted(batch)}")
        ctx = ctx.fork(cond=batch.get("cond", {}))
        made = self.sampled(batch["x"].shape, ctx)
        with torch.no_grad():
            real = self.features(batch["x"])
        loss = squared_mmd(self.features(made), real, self.kernel)
        return Loss(loss, {"mmd": loss.detach()})
