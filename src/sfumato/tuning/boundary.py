"""Optimal boundary conditions: one start noise that serves every condition well, found once on a few references.

With a deterministic solver, restoration is a function x_0 = h(z, y) of the start noise z and the condition y. The ranking of
noises by quality depends little on y, so the best of K candidates over R reference pairs serves new conditions:

    z* = argmin_{z in z_1 .. z_K} sum_{i <= R} M(h(z, y_i), x_i),    z_k ~ N(0, I).

For a Gaussian posterior N(m(y), C) with C free of y, h(z, y) = m(y) + C^(1/2) z, so E |h(z, y) - x|^2 = z' C z + tr C: the
ranking is the same for every y, and under squared error z = 0, the posterior mean, beats all. Judge z* with a perceptual M,
and beside z = 0.
Source: Ma, Yang, Yang, Fu, Liu, 2024, "Solving Diffusion ODEs with Optimal Boundary Conditions for Better Image
Super-Resolution".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, Grid, InputError, Solver, Streams, linear, sample, tree_map

Metric = Callable[[Tensor, Tensor], Tensor]
"""(restored (B, *), truth (B, *)) -> (B,), lower is better."""


@dataclass(frozen=True, eq=False)
class BoundaryCondition:
    """A start at t = 1 whose noise is the same for every item.

    noise     z (*), in units of the prior's noise: of an event's shape, and only of that shape
    tuned_on  where it came from and what it was chosen on, JSON-able
    """

    noise: Tensor
    tuned_on: Mapping[str, Any] = field(default_factory=dict)

    name: ClassVar[str] = "boundary"
    time: ClassVar[float] = 1.0

    def __call__(self, process: Any, shape: Sequence[int], ctx: Context) -> Tensor:
        """Raw x at t = 1, (B, *): the prior's draw with this noise, with the anchor of ``ctx.cond`` added.

        Give it to ``trajectory(x=..., cond=...)``. Raises InputError for another shape than the noise has.
        """
        return raw_start(process, self.noise.expand(_events(self.noise, shape)), ctx)

    def tensors(self) -> dict[str, Tensor]:
        """What a card keeps as tensors."""
        return {"noise": self.noise}

    def config(self) -> dict[str, Any]:
        """What a card keeps as JSON: all but the tensors."""
        return {"tuned_on": dict(self.tuned_on)}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> BoundaryCondition:
        """From what :meth:`tensors` and :meth:`config` gave."""
        return BoundaryCondition(tensors["noise"], **config)


def _events(noise: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape (B, *) as a tuple; InputError where its items are not shaped like the noise."""
    if tuple(shape[1:]) != tuple(noise.shape):
        raise InputError(
            f"this boundary condition was tuned for {tuple(noise.shape)}, not for {tuple(shape[1:])}: tune one for that "
            "shape, or restore in tiles of this one"
        )
    return tuple(shape)


def raw_start(process: Any, noise: Tensor, ctx: Context) -> Tensor:
    """x_1 as :func:`sfumato.trajectory` would start from if its first draw were ``noise`` (B, *), anchor included."""
    fixed = Context(
        cond=ctx.cond,
        batch=len(noise),
        dtype=ctx.dtype,
        device=ctx.device,
        source=lambda *_: noise.to(ctx.device, ctx.dtype),
    )
    return linear(1.0, process.prior(tuple(noise.shape), fixed), 1.0, process.anchor(1.0, ctx.cond))  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Search:
    """Candidates and their scores: ``scores[k, i]`` is the metric of candidate k on reference i, (K, R) float64."""

    noises: Tensor
    scores: Tensor
    seed: int

    @property
    def best(self) -> int:
        """The candidate of the least mean score."""
        return int(self.scores.mean(1).argmin())

    def margin(self) -> tuple[float, float]:
        """(mean, standard error) over references of how much the best beats the runner-up: luck where they are alike."""
        first, second = self.scores[self.scores.mean(1).argsort()[:2]]
        gap = second - first
        return float(gap.mean()), float(gap.std() / len(gap) ** 0.5)


def candidates(event: Sequence[int], n: int, seed: int = 0) -> Tensor:
    """n noises (n, *) of an event's shape: noise k is the start that ``trajectory(shape=(n, *event), seed=seed)`` draws for
    item k."""
    return Streams.of(seed, n).normal(torch.empty((n, *event)))


def scores(
    denoiser: Denoiser,
    noises: Tensor,
    truth: Tensor,
    cond: Mapping[str, Any],
    metric: Metric,
    *,
    solver: Solver,
    grid: Grid,
    steps: int,
    batch: int = 1024,
) -> Tensor:
    """The metric of every noise (K, *) on every pair of a condition and its truth (R, *): (K, R) float64.

    Conditions are (R, *) each. Raises InputError for a solver that draws noise.
    """
    if solver.stochastic:
        raise InputError(
            f"{type(solver).__name__} draws noise, so a start does not decide its result: a boundary search needs a "
            "deterministic solver such as 'dpm-solver++'"
        )
    k, r = len(noises), len(truth)
    out = []
    for pairs in torch.arange(k * r).split(batch):
        which, rows = pairs // r, pairs % r
        part = tree_map(lambda v, rows=rows: v[rows.to(v.device)], dict(cond))
        ctx = Context(cond=part, dtype=truth.dtype, device=truth.device, batch=len(pairs))
        x = raw_start(denoiser.process, noises[which.to(noises.device)], ctx)
        restored = sample(denoiser, solver, grid, steps, x=x, cond=part)
        value = metric(restored, truth[rows.to(truth.device)])
        if value.shape != (len(pairs),):
            raise InputError(f"a metric gives one number an item, ({len(pairs)},), not {tuple(value.shape)}")
        out.append(value.double().cpu())
    return torch.cat(out).view(k, r)


def optimal_boundary(
    denoiser: Denoiser,
    truth: Tensor,
    cond: Mapping[str, Any],
    metric: Metric,
    *,
    solver: Solver,
    grid: Grid,
    steps: int,
    n: int = 200,
    seed: int = 0,
    batch: int = 1024,
    tuned_on: Mapping[str, Any] | None = None,
) -> tuple[BoundaryCondition, Search]:
    """The best of n candidate noises on reference pairs, and all scores.

    truth, cond  the references: x (R, *) and their conditions, (R, *) each; none of them may be in the test set
    metric       what "good" is; under squared error a noise of small norm wins
    solver, grid, steps, guidance (inside ``denoiser``)  as they will be at use: with few steps their errors depend on z

    ``tuned_on`` of the result says the seed and index of the noise, its norm beside the candidates' mean, and the scores.
    """
    noises = candidates(tuple(truth.shape[1:]), n, seed)
    found = scores(denoiser, noises, truth, cond, metric, solver=solver, grid=grid, steps=steps, batch=batch)
    search = Search(noises, found, seed)
    means, norms = found.mean(1), noises.flatten(1).square().mean(1).sqrt()
    facts = {
        "seed": seed, "index": search.best, "candidates": n, "references": len(truth), "solver": repr(solver), "steps": steps,
        "score": float(means[search.best]), "mean_score": float(means.mean()), "norm": float(norms[search.best]),
        "mean_norm": float(norms.mean()),
    }  # fmt: skip
    return BoundaryCondition(noises[search.best].clone(), {**facts, **(tuned_on or {})}), search
